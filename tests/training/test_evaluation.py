"""Held-out numbers against sums done by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_collect import ScriptedScorer, teacher

from envs.datasets import Row
from envs.prompt_only import PromptOnlyGroupBuilder
from envs.rendering import make_renderer
from envs.types import Sampled, SamplingParams
from errors import NoSignalError, SamplerError
from models.types import SignalKind
from recipes.embedded import char_tokenizer
from training.distribution_losses import JSD
from training.evaluation import EvalSet, Judge, evaluate
from training.learner import ItemMetrics
from training.objectives import ReverseKL

RENDERER = make_renderer(char_tokenizer())
END = RENDERER.end_of_turn_id
ROWS = [
    Row("a", ({"role": "user", "content": "1+1="},), expected_answer="2"),
    Row("b", ({"role": "user", "content": "1+2="},), expected_answer="3"),
    Row("c", ({"role": "user", "content": "1+3="},), expected_answer="4"),
    Row("d", ({"role": "user", "content": "1+4="},)),  # has no known answer
]

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class Answers:
    """Says, per question, these answers in turn: greedy ones where the temperature is 0. None fails."""

    greedy: dict[str, list[str | None]]
    drawn: dict[str, list[str | None]] = field(default_factory=dict)
    temperatures: set[float] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.greedy, self.drawn = copy.deepcopy((self.greedy, self.drawn))

    async def sleep(self) -> None: ...

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams) -> Sampled:
        question = RENDERER.tokenizer.decode(list(prompt_ids)).split("<|user|>")[1].split("=")[0]
        said = (self.drawn if params.temperature else self.greedy)[question].pop(0)
        self.temperatures.add(params.temperature)
        if said is None:
            raise SamplerError("lost")
        ids = RENDERER.tokenizer.encode(said, add_special_tokens=False)
        stopped = len(ids) < params.max_tokens
        ids = [*ids, END] if stopped else ids[: params.max_tokens]
        return Sampled(ids, [-1.0] * len(ids), stopped)


def eval_set(rows: Sequence[Row] = ROWS) -> EvalSet:
    def builder(row: Row, samples: int) -> PromptOnlyGroupBuilder:
        return PromptOnlyGroupBuilder("sums", row.row_id, "big", None, row.messages, RENDERER, samples, 6)

    return EvalSet("sums", rows, "arithmetic", builder)


async def measured(sampler: Any, rows: Sequence[Row] = ROWS, **options: Any) -> dict[str, float]:
    given = {"temperature": 0.7, "samples": 0, "seed": 0, **options}
    return await evaluate(eval_set(rows), sampler, RENDERER, **given)


GREEDY: dict[str, list[str | None]] = {"1+1": [";2"], "1+2": [";4"], "1+3": [";4"]}


async def test_greedy_accuracy_length_and_truncation():
    found = await measured(Answers({**GREEDY, "1+2": ["1+2=333"]}))
    assert found["eval/accuracy"] == pytest.approx(2 / 3)
    # sqrt(p (1 - p) / (n - 1)) of 2 in 3
    assert found["eval/accuracy_se"] == pytest.approx(math.sqrt(2 / 3 * 1 / 3 / 2))
    assert found["eval/greedy_length"] == pytest.approx((3 + 6 + 3) / 3)
    assert found["eval/greedy_truncated_fraction"] == pytest.approx(1 / 3)
    assert found["eval/greedy_dropped_fraction"] == 0
    assert not any("kl" in name or "sampled" in name for name in found)


async def test_sampled_attempts_are_clustered_by_row():
    drawn: dict[str, list[str | None]] = {
        "1+1": [";2", ";2"],
        "1+2": [";3", ";9"],
        "1+3": [";9", ";9"],
        "1+4": [";9", "999999"],
    }
    sampler = Answers(GREEDY, drawn)
    found = await measured(sampler, samples=2)
    assert sampler.temperatures == {0.0, 0.7}
    assert found["eval/sampled_accuracy"] == pytest.approx(3 / 6)
    # Residuals by row: 2 x 1/2, 0, -2 x 1/2; so 2 x 3/2 of squares, over 6 attempts.
    assert found["eval/sampled_accuracy_se"] == pytest.approx(math.sqrt(2 * 3 / 2) / 6)
    assert found["eval/length"] == pytest.approx((7 * 3 + 6) / 8)  # the row without an answer counts here
    assert found["eval/truncated_fraction"] == pytest.approx(1 / 8)


async def test_drops_are_left_out_of_rates_and_counted():
    drawn: dict[str, list[str | None]] = {"1+1": [";2"], "1+2": [None], "1+3": [";9"], "1+4": [";1"]}
    found = await measured(Answers({**GREEDY, "1+1": [None]}, drawn), samples=1)
    assert found["eval/accuracy"] == pytest.approx(1 / 2) and found["eval/greedy_dropped_fraction"] == 1 / 3
    assert found["eval/sampled_accuracy"] == pytest.approx(1 / 2) and found["eval/dropped_fraction"] == 1 / 4
    with pytest.raises(NoSignalError, match="every attempt was dropped"):
        await measured(Answers({"1+1": [None], "1+2": [None], "1+3": [None]}))


async def test_rows_without_answers_have_a_length_and_no_accuracy():
    found = await measured(Answers({}, {"1+4": [";5"]}), rows=ROWS[3:], samples=1)
    assert not any("accuracy" in name for name in found)
    assert found["eval/length"] == 3


class Measuring:
    """A learner whose KL of every token is given by row, and its exact KL ten times that."""

    def __init__(self, kl: dict[str, list[float]]) -> None:
        self.kl, self.objectives = kl, []

    def measure(self, items: Any, objective: Any) -> list[ItemMetrics]:
        self.objectives.append(objective)
        left = {row: list(values) for row, values in self.kl.items()}
        out = []
        for item in items:
            n = item.episode.num_sampled
            values = np.array([left[item.episode.row_id].pop(0) for _ in range(n)])
            out.append(ItemMetrics(n, {"kl": values, "exact_kl": 10 * values}))
        return out


class FullScorer(ScriptedScorer):
    async def score(self, views: Any, need: SignalKind) -> Any:
        assert need is SignalKind.FULL
        return [SimpleNamespace() for _ in views]


async def test_kl_is_a_mean_over_tokens_whose_error_is_taken_over_rows():
    drawn: dict[str, list[str | None]] = {"1+1": ["1", ""], "1+2": ["111", "1"]}
    learner: Any = Measuring({"a": [1.0, 2.0, 3.0], "b": [0.0, 0.0, 1.0, 1.0, 0.0, 2.0]})
    judge = Judge(learner, {"big": teacher(FullScorer())})
    greedy: dict[str, list[str | None]] = {"1+1": ["1"], "1+2": ["1"]}
    found = await measured(Answers(greedy, drawn), rows=ROWS[:2], samples=2, judge=judge)
    assert isinstance(learner.objectives[0], JSD) and learner.objectives[0].beta == 1
    # Row a: 3 tokens with 6 in all; row b: 6 tokens with 4. Mean 10/9; residuals +-(6 - 30/9).
    assert found["eval/reverse_kl"] == pytest.approx(10 / 9)
    assert found["eval/reverse_kl_se"] == pytest.approx(math.sqrt(2 * (6 - 30 / 9) ** 2 * 2) / 9)
    assert found["eval/exact_reverse_kl"] == pytest.approx(100 / 9)
    assert found["eval/exact_reverse_kl_se"] == pytest.approx(10 * found["eval/reverse_kl_se"])


async def test_a_teacher_without_distributions_gives_the_sampled_kl_only():
    learner: Any = Measuring({"a": [1.0, 2.0]})
    judge = Judge(learner, {"big": teacher(ScriptedScorer())}, exact=False)
    found = await measured(Answers({"1+1": ["1"]}, {"1+1": ["1"]}), rows=ROWS[:1], samples=1, judge=judge)
    assert isinstance(learner.objectives[0], ReverseKL)
    assert found["eval/reverse_kl"] == 1.5 and math.isnan(found["eval/reverse_kl_se"])
    assert "eval/exact_reverse_kl" not in found
