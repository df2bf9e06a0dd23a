"""Rollouts and scores together: what overlaps, what is dropped, and that nothing changes places."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio
import numpy as np
import pytest
import torch

from envs.prompt_only import PromptOnlyEnv
from envs.types import Env, Episode, Message, Observation, Sampled, SamplingParams, StopCondition
from errors import InfrastructureError, SamplerError, TeacherError
from models.types import Signal, SignalKind, TeacherView, WeightSource
from training import collect as module
from training.collect import Blend, Collected, Teacher, collect
from training.metrics import StageTimer

STOP = 1


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class Row:
    """A builder whose prompt is its number. `unbuildable`: its environments cannot be made."""

    number: int
    dataset: str = "data"
    teacher: str = "big"
    group_size: int = 1
    teacher_messages: tuple[Message, ...] | None = None
    unbuildable: bool = False
    cleaned: int = 0

    @property
    def row_id(self) -> str:
        return f"row{self.number}"

    async def make_envs(self) -> Sequence[Env]:
        if self.unbuildable:
            raise InfrastructureError("no room for a sandbox")
        prompt = Observation([0, self.number], ({"role": "user", "content": str(self.number)},))
        return [PromptOnlyEnv(prompt, StopCondition(frozenset({STOP})), 8, 10)] * self.group_size

    async def cleanup(self) -> None:
        self.cleaned += 1


@dataclass
class ScriptedSampler:
    """Answers `[row number, attempt's call number, STOP]` after as many naps as `naps` says; may fail."""

    naps: Callable[[int], int] = lambda number: 0
    fails: Callable[[int, int], bool] = lambda number, call: False
    error: Exception = field(default_factory=lambda: SamplerError("out of memory"))
    events: list[str] = field(default_factory=list)
    seeds: dict[int, list[int]] = field(default_factory=dict)

    async def __aenter__(self) -> ScriptedSampler:
        return self

    async def __aexit__(self, *exc: object) -> None:
        pass

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams) -> Sampled:
        number = prompt_ids[1]
        self.seeds.setdefault(number, []).append(params.seed)
        call = len(self.seeds[number]) - 1
        for _ in range(self.naps(number)):
            await anyio.sleep(0.01)
        if self.fails(number, call):
            raise self.error
        self.events.append(f"sampled {number}")
        return Sampled([number, 10 + call, STOP], [-1.0, -2.0, -3.0], stopped=True)

    async def sleep(self) -> None:
        pass

    async def update_weights(self, source: WeightSource, version: int) -> None:
        pass


@dataclass
class ScriptedScorer:
    """Gives every token the logprob -token/100, so that a signal tells whose it is. Refuses the `bad` rows."""

    name: str = "big"
    temperature: float = 1.0
    bad: frozenset[int] = frozenset()
    nap: float = 0.0
    events: list[str] = field(default_factory=list)
    batches: list[list[int]] = field(default_factory=list)
    short: bool = False

    async def score(self, views: Sequence[TeacherView], need: SignalKind) -> list[Signal]:
        assert need is SignalKind.SAMPLED
        numbers = [int(view.token_ids[1]) for view in views]
        self.batches.append(numbers)
        self.events.append(f"score {numbers}")
        await anyio.sleep(self.nap)
        if self.bad & set(numbers):
            raise TeacherError(f"cannot read {sorted(self.bad & set(numbers))}")
        self.events.append(f"scored {numbers}")
        signals = [Signal(logprobs=torch.from_numpy(-view.token_ids[view.positions] / 100)) for view in views]
        return signals[1:] if self.short else signals


class Verbatim:
    """Views that are the episodes themselves."""

    def view(self, episode: Episode) -> TeacherView:
        own = np.flatnonzero(episode.sampled)
        return TeacherView(episode.token_ids.astype(np.int64), own, own)


def teacher(scorer: ScriptedScorer) -> Teacher:
    return Teacher(scorer, Verbatim())  # type: ignore[arg-type]


async def collected(
    rows: Sequence[Row],
    sampler: ScriptedSampler | None = None,
    scorer: ScriptedScorer | None = None,
    need: SignalKind = SignalKind.SAMPLED,
    seed: int = 0,
    timer: StageTimer | None = None,
) -> Collected:
    teachers = {"big": teacher(scorer or ScriptedScorer())}
    return await collect(
        rows, sampler or ScriptedSampler(), teachers, need, temperature=1.0, seed=seed, timer=timer or StageTimer()
    )


def numbers(found: Collected) -> list[list[int]]:
    return [[int(item.episode.token_ids[1]) for item in group] for group in found.items]


pytestmark = pytest.mark.anyio


async def test_groups_keep_the_order_of_their_builders_and_episodes_their_signals(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "SCORE_TOKENS", 7)
    rows = [Row(n, group_size=2) for n in (30, 20, 40)]
    found = await collected(rows, ScriptedSampler(naps=lambda number: (40 - number) // 10))  # 40 ends first
    assert [group.row_id for group in found.groups] == ["row30", "row20", "row40"]
    assert numbers(found) == [[30, 30], [20, 20], [40, 40]]
    for item in found.flat:
        assert item.signal is not None and item.signal.logprobs is not None
        sampled = item.episode.token_ids[item.episode.sampled]
        assert item.signal.logprobs.tolist() == pytest.approx((-sampled / 100).tolist())
    assert found.attempts == 6 and not found.dropped
    assert all(row.cleaned == 1 for row in rows)


async def test_scoring_begins_while_others_still_sample(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "SCORE_TOKENS", 10)  # two episodes of five tokens
    events: list[str] = []
    timer = StageTimer()
    scorer = ScriptedScorer(events=events, nap=0.03)
    sampler = ScriptedSampler(naps=lambda number: number, events=events)
    await collected([Row(n) for n in (2, 3, 4, 8, 9)], sampler, scorer, timer=timer)
    assert events.index("score [2, 3]") < events.index("sampled 4")
    assert events.index("scored [2, 3]") < events.index("sampled 9")  # and generation did not wait for it
    assert scorer.batches == [[2, 3], [4, 8], [9]]
    times = timer.lap()
    assert times["time/sampling"] + times["time/scoring"] > times["time/total"]


async def test_batches_do_not_depend_on_how_long_scoring_takes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "SCORE_TOKENS", 10)
    batches = []
    for nap in (0.0, 0.05):
        scorer = ScriptedScorer(nap=nap)
        await collected([Row(n) for n in (2, 3, 5, 7)], ScriptedSampler(naps=lambda number: number), scorer)
        batches.append(scorer.batches)
    assert batches[0] == batches[1]


async def test_nothing_is_scored_where_no_signal_is_needed():
    scorer = ScriptedScorer()
    found = await collected([Row(2), Row(3)], scorer=scorer, need=SignalKind.NONE)
    assert scorer.batches == [] and [item.signal for item in found.flat] == [None, None]


async def test_a_failed_sampler_drops_its_episode_and_shifts_nobody_elses():
    rows = [
        Row(20, dataset="a", teacher="big", group_size=2),
        Row(30, dataset="b", teacher="small", group_size=2),
        Row(40, dataset="c", teacher="big", group_size=2),
    ]
    big, small = ScriptedScorer(), ScriptedScorer(name="small")
    sampler = ScriptedSampler(fails=lambda number, call: number == 20 or (number == 40 and call == 0))
    found = await collect(
        rows, sampler, {"big": teacher(big), "small": teacher(small)}, SignalKind.SAMPLED,
        temperature=1.0, seed=0, timer=StageTimer(),
    )  # fmt: skip
    assert numbers(found) == [[], [30, 30], [40]]
    assert found.dropped == {"sampler": 3} and found.attempts == 6
    assert "out of memory" in found.causes["sampler"]
    assert [(e.dataset, e.teacher) for e in (item.episode for item in found.flat)] == [
        ("b", "small"), ("b", "small"), ("c", "big"),
    ]  # fmt: skip
    assert (small.batches, big.batches) == ([[30, 30]], [[40]])


async def test_a_row_whose_environments_cannot_be_made_is_dropped_whole():
    rows = [Row(20, group_size=3, unbuildable=True), Row(30)]
    found = await collected(rows)
    assert numbers(found) == [[], [30]]
    assert found.dropped == {"infrastructure": 3} and found.attempts == 4
    assert "no room" in found.causes["infrastructure"] and [row.cleaned for row in rows] == [1, 1]


async def test_one_view_that_cannot_be_scored_does_not_take_its_neighbours_with_it():
    scorer = ScriptedScorer(bad=frozenset({30}))
    found = await collected([Row(n) for n in (20, 30, 40)], scorer=scorer)
    assert numbers(found) == [[20], [], [40]]
    assert found.dropped == {"teacher": 1} and found.attempts == 3
    assert "cannot read [30]" in found.causes["teacher"]
    assert scorer.batches == [[20, 30, 40], [20], [30], [40]]


async def test_failures_of_both_kinds_are_counted_apart():
    scorer = ScriptedScorer(bad=frozenset({30}))
    found = await collected([Row(n) for n in (20, 30)], ScriptedSampler(fails=lambda n, _: n == 20), scorer)
    assert found.flat == [] and found.dropped == {"sampler": 1, "teacher": 1} and found.attempts == 2


async def test_every_teacher_of_a_blend_scores_every_episode_and_a_failure_of_one_drops_it_once():
    big, small = ScriptedScorer(bad=frozenset({30})), ScriptedScorer(name="small", bad=frozenset({30, 50}))
    members = {"big": teacher(big), "small": teacher(small)}
    blend = Blend({"big": members["big"], "small": members["small"]}, (0.75, 0.25))
    rows = [Row(n, teacher="both") for n in (20, 30, 40, 50)] + [Row(60, teacher="small")]
    found = await collect(
        rows, ScriptedSampler(), {**members, "both": blend}, SignalKind.SAMPLED,
        temperature=1.0, seed=0, timer=StageTimer(),
    )  # fmt: skip
    assert numbers(found) == [[20], [], [40], [], [60]]
    assert found.dropped == {"teacher": 2} and found.attempts == 5
    for item in found.flat:
        assert item.signal is not None and item.signal.logprobs is not None  # both said the same
        expected = (-item.episode.token_ids[item.episode.sampled] / 100).tolist()
        assert item.signal.logprobs.tolist() == pytest.approx(expected)
        assert set(item.signal.opinions) == ({"big", "small"} if item.episode.teacher == "both" else set())


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), KeyError("a bug")])
async def test_a_bug_is_not_a_dropped_episode(error: Exception):
    rows = [Row(20), Row(30)]
    with pytest.raises(ExceptionGroup) as raised:
        await collected(rows, ScriptedSampler(fails=lambda number, _: number == 20, error=error))
    assert raised.group_contains(type(error))
    assert [row.cleaned for row in rows] == [1, 1]


async def test_a_scorer_that_answers_for_fewer_views_is_a_bug():
    with pytest.raises(ExceptionGroup) as raised:
        await collected([Row(20), Row(30)], scorer=ScriptedScorer(short=True))
    assert raised.group_contains(ValueError)


async def test_every_attempt_has_a_seed_of_its_own_that_its_neighbours_do_not_change():
    async def seeds(rows: list[Row], seed: int = 0) -> dict[int, list[int]]:
        sampler: Any = ScriptedSampler()
        await collected(rows, sampler, seed=seed)
        return sampler.seeds

    first = await seeds([Row(20, group_size=2), Row(30), Row(20)])
    flat = [seed for row in first.values() for seed in row]
    assert len(set(flat)) == 4  # also the row that is drawn twice in one step
    assert (await seeds([Row(20, group_size=2), Row(40)]))[20] == first[20][:2]
    assert set(flat).isdisjoint(seed for row in (await seeds([Row(20), Row(30)], seed=1)).values() for seed in row)
