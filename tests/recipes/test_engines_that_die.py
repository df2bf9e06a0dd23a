"""Whole runs on engines that keep a copy of the weights, and die: plain forwards behind vLLM's sampler."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import anyio
import pytest
import tiny_models
import torch
from tiny_models import evaluation_rows, training_rows
from transformers import AutoModelForCausalLM

from envs.types import SamplingParams
from models.vllm.engine import Answer, Unreachable
from models.vllm.handover import Model
from models.vllm.sampler import VLLMSampler, Waits
from recipes import on_policy_distillation, samplers
from recipes.cli import run_cli

OPTIONS: dict[str, Any] = {"objective": "jsd", "max_steps": 4, "save_every": 1, "learning_rate": 3e-2}
QUICK = Waits(patience_s=0.2, look_every_s=0.05)


class CopyEngine:
    """`Engine` on the model in the folder that it was last handed."""

    takes_adapters, takes_tensors, started = False, False, True

    def __init__(self, name: str, dies_after: float = float("inf")) -> None:
        self.name = name
        self.left = dies_after  # requests
        self.answered = 0
        self.current = "default"

    def _check(self) -> None:
        if self.left <= 0:
            raise Unreachable(f"{self.name} is gone")

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def sleep(self) -> None: ...

    async def wake(self) -> None: ...

    async def check_alive(self) -> None:
        self._check()

    async def label(self) -> str:
        return self.current

    async def reload(self, folder: Path, label: str) -> None:
        self._check()
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.current = label

    @torch.no_grad()
    async def generate(self, prompt_ids: Sequence[int], params: SamplingParams, adapter: str | None) -> Answer:
        self._check()
        self.left -= 1
        await anyio.sleep(0)
        generator = torch.Generator().manual_seed(params.seed)
        ids, logprobs = list(prompt_ids), []
        for _ in range(params.max_tokens):
            greedy = params.temperature == 0
            logits = self.model(input_ids=torch.tensor([ids])).logits[0, -1] / (params.temperature or 1.0)
            token = int(logits.argmax() if greedy else torch.multinomial(logits.softmax(-1), 1, generator=generator))
            ids.append(token)
            logprobs.append(logits.log_softmax(-1)[token].item())
            if token in params.stop.token_ids:
                break
        self.answered += 1
        return Answer(ids[len(prompt_ids) :], logprobs, ids[-1] in params.stop.token_ids, (self.current,))


def on(*engines: CopyEngine) -> Any:
    """Runs inside this block sample on these engines."""

    def make(config: Any, student: Any, tokenizer: Any, *, servers: Any, folder: Path) -> VLLMSampler:
        return VLLMSampler(engines, Model(folder, tokenizer, "float32"), temperature=1.0, slots=64, waits=QUICK)

    return mock.patch.object(samplers, "make_sampler", make)


def test_a_run_on_a_copy_learns_as_on_the_learners_own_weights(tmp_path: Path, models: dict[str, str]):
    options = {**OPTIONS, "eval_size": 8}
    own = tiny_models.run(tmp_path / "own", models, **options)
    with on(CopyEngine("copy")):
        copy = tiny_models.run(tmp_path / "copy", models, **options)
    fell = [[row["eval/exact_reverse_kl"] for row in evaluation_rows(run)] for run in (own, copy)]
    assert fell[1][1] < 0.95 * fell[1][0]
    assert fell[1][1] == pytest.approx(fell[0][1], rel=0.3)
    assert all(row["sampler_gap/max"] < 1e-3 and row["mismatch_kl"] < 1e-6 for row in training_rows(copy))
    versions = [tiny_models.episodes(copy, step)[0]["weight_version"] for step in (1, 2, 3, 4)]
    assert versions == [0, 1, 2, 3], "every step was sampled from the weights that the last one made"
    assert not tiny_models.leftovers(copy)


def test_a_run_goes_on_when_one_of_two_engines_dies(tmp_path: Path, models: dict[str, str]):
    dying, other = CopyEngine("a", dies_after=9), CopyEngine("b")
    with on(dying, other):
        run = tiny_models.run(tmp_path / "run", models, **OPTIONS, eval_size=8)
    assert dying.answered == 9 and other.answered > 9
    rows = training_rows(run)
    assert len(rows) == OPTIONS["max_steps"]
    assert all(row["dropped_fraction"] == 0 for row in rows), "what was in flight was asked elsewhere"


def test_without_an_engine_a_run_ends_with_one_error_and_the_same_command_goes_on(
    tmp_path: Path, models: dict[str, str], capsys: pytest.CaptureFixture[str]
):
    command = tiny_models.argv(tmp_path / "run", models, **OPTIONS)

    def repeat() -> int | str | None:
        recipe = on_policy_distillation
        with tiny_models.no_report(), pytest.raises(SystemExit) as ended:
            run_cli(recipe.main, recipe.Config, presets=recipe.presets, argv=command)
        return ended.value.code

    with on(CopyEngine("a", dies_after=13)):
        assert repeat() == 1
    errors = capsys.readouterr().err
    assert errors.count("no engine is left") == 1 and "a is gone" in errors and "last checkpoint" in errors
    done = len(training_rows(tmp_path / "run"))
    assert 0 < done < OPTIONS["max_steps"]
    with on(CopyEngine("a")):
        assert repeat() == 0
    assert [row["step"] for row in training_rows(tmp_path / "run")] == [1, 2, 3, 4]
    assert not tiny_models.leftovers(tmp_path / "run")
