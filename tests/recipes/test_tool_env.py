"""Training on environments that a program defines."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models

from envs.datasets import Row
from envs.message_env import AssistantTurn, MessageStep, Outcome, TokenEnv
from envs.rendering import Renderer
from envs.types import Message, StopReason, TeacherHint
from errors import ConfigError, DataError, TemplateError
from recipes import setup, training_run
from recipes.tiny_tool_models import make_models
from recipes.tool_env import Config, train
from tool_use import AgentLimits, ToolEnvGroupBuilder, tool
from training import loop
from training.run_dir import read_metrics

ROWS = [Row(f"row {n}", ({"role": "user", "content": f"double {n}"},)) for n in range(4)]


@tool
def double(n: int) -> int:
    """Doubles."""
    return 2 * n


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (loop, training_run):  # a second each
        monkeypatch.setattr(module, "write_report", lambda path: None)


def config(models: tuple[str, str], path: Path, **options: Any) -> Config:
    given: dict[str, Any] = {
        "model_name": models[0], "teacher_model": models[1], "name": "doubling", "log_path": str(path / "run"),
        "groups_per_batch": 2, "max_steps": 2, "learning_rate": 3e-3, "objective": "jsd", "device": "cpu",
    }  # fmt: skip
    return Config(**given | options)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"lmbda": 0.5}, "lmbda=0.5: environments have no given answers"),
        ({"objective": "kd"}, "objective=kd learns from given answers, and here are none"),
        ({"objective": "sft"}, "objective=sft learns from given answers, and here are none"),
        ({"eval_every": 1}, "eval_every=1: there is no evaluation here"),
        ({"eval_teacher": True}, "eval_teacher=True: there is no evaluation here"),
    ],
)
def test_options_that_have_no_meaning_in_an_environment(options: dict[str, Any], part: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=part):
        config(("s", "t"), tmp_path, **options)


def grouping(to: str, **changes: Any) -> Any:
    def make_group(row: Row, renderer: Renderer) -> ToolEnvGroupBuilder:
        given: dict[str, Any] = {
            "dataset": "doubling", "row_id": row.row_id, "teacher": to, "messages": row.messages,
            "renderer": renderer, "make_tools": lambda: [double], "group_size": 2,
            "limits": AgentLimits(max_turns=2, max_generation_tokens=24, max_trajectory_tokens=400),
        }  # fmt: skip
        return ToolEnvGroupBuilder(**given | changes)

    return make_group


def test_a_run_trains_and_goes_on_where_it_stopped(models: tuple[str, str], tmp_path: Path):
    folder = train(config(models, tmp_path), ROWS, grouping(models[1]))
    steps = [row for row in read_metrics(folder) if "trained_tokens" in row]
    assert [row["step"] for row in steps] == [1, 2]
    assert all(1 <= row["env/turns"] <= 2 and row["kl"] > 0 and row["dropped_fraction"] == 0 for row in steps)
    assert {"env/tool_calls", "env/parse_errors", "env/tool_errors/timeout"} <= steps[0].keys()
    lines = (folder / "episodes" / "step_000001.jsonl").read_text().splitlines()
    episodes = [json.loads(line) for line in lines]
    assert len(episodes) == 4
    for episode in episodes:
        taught = [value is not None for value in episode["teacher_logprobs"]]
        assert taught == episode["sampled"] and "double" in "".join(episode["tokens"])
    assert steps[0]["trained_tokens"] == sum(sum(episode["sampled"]) for episode in episodes)
    before = tiny_models.weights(tiny_models.final(folder))
    train(config(models, tmp_path, max_steps=3), ROWS, grouping(models[1]))
    assert [row["step"] for row in read_metrics(folder) if "trained_tokens" in row] == [1, 2, 3]
    after = tiny_models.weights(tiny_models.final(folder))
    assert any((before[name] != after[name]).any() for name in before)
    assert np.isfinite([float(w.sum()) for w in after.values()]).all()


def test_a_group_for_another_teacher_or_dataset_is_refused(models: tuple[str, str], tmp_path: Path):
    for changes in ({"teacher": "other"}, {"dataset": "other"}):
        with pytest.raises(ConfigError, match=r"row 'row 0' has dataset=.*other"):
            train(config(models, tmp_path), ROWS, grouping(models[1], **changes))
    assert not (tmp_path / "run").exists()


def test_models_that_cannot_be_shown_tools_are_refused_before_they_are_loaded(tmp_path: Path, models: tuple[str, str]):
    plain = tiny_models.make_model(tmp_path / "plain", seed=1)
    with pytest.raises(TemplateError, match="does not show tools"):
        train(config((plain, plain), tmp_path), ROWS, grouping(plain))


def test_no_rows_and_sizes_that_make_no_sense_are_refused(models: tuple[str, str], tmp_path: Path):
    with pytest.raises(DataError, match="no rows"):
        train(config(models, tmp_path), [], grouping(models[1]))
    with pytest.raises((ConfigError, ValueError), match="groups_per_batch=0"):
        config(models, tmp_path, groups_per_batch=0)


class Asking:
    """A `MessageEnv` that asks once more, whatever it is told."""

    tools = ()

    async def initial_messages(self) -> list[Message]:
        return [{"role": "user", "content": "double 2"}]

    def __init__(self) -> None:
        self.asked = 0

    async def step(self, turn: AssistantTurn) -> MessageStep:
        self.asked += 1
        if self.asked == 2:
            return MessageStep(stop_reason=StopReason.COMPLETED)
        return MessageStep(messages=({"role": "user", "content": "and 3"},))

    async def finish(self, stop_reason: StopReason, cut: AssistantTurn | None) -> Outcome:
        return Outcome()


@dataclass(frozen=True)
class AskingGroup:
    row_id: str
    teacher: str
    renderer: Renderer
    teacher_hints: tuple[TeacherHint, ...]
    dataset: str = "doubling"
    teacher_messages: None = None
    group_size: int = 4

    async def make_envs(self) -> list[TokenEnv]:
        options = {"max_trajectory_tokens": 300, "max_generation_tokens": 40}
        return [TokenEnv(Asking(), self.renderer, **options) for _ in range(self.group_size)]

    async def cleanup(self) -> None:
        pass


def test_hints_reach_the_teacher_s_view(models: tuple[str, str], tmp_path: Path):
    """The same episodes, judged otherwise from the second turn on."""
    hints = (TeacherHint(({"role": "user", "content": "double it"},)),)
    judged = []
    for name, given in (("plain", ()), ("hinted", hints)):
        options = config(models, tmp_path / name, max_steps=1)
        folder = train(options, ROWS, lambda row, r, given=given: AskingGroup(row.row_id, models[1], r, given))
        lines = (folder / "episodes" / "step_000001.jsonl").read_text().splitlines()
        judged.append([json.loads(line) for line in lines])
    several = 0
    for plain, hinted in zip(*judged, strict=True):
        assert plain["token_ids"] == hinted["token_ids"]
        starts = np.flatnonzero(np.diff(np.array(plain["sampled"], dtype=int), prepend=0) == 1).tolist()
        second = starts[1] if len(starts) > 1 else len(plain["sampled"])
        pairs = list(zip(plain["teacher_logprobs"], hinted["teacher_logprobs"], strict=True))
        assert all(a is None or a == pytest.approx(b, abs=1e-4) for a, b in pairs[:second])
        if len(starts) > 1:
            several += 1
            assert any(a is not None and abs(a - b) > 1e-3 for a, b in pairs[second:])
    assert several


def test_a_hint_that_the_teacher_s_format_refuses_is_named_at_the_start(
    models: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    row = Row("hinted", ROWS[0].messages, teacher_hints=(TeacherHint(({"role": "user", "content": "x"},)),))
    strict = Path(tiny_models.copy_without(models[1], tmp_path / "strict"))
    file = strict / "chat_template.jinja"
    refusal = "{%- for m in messages -%}{%- if m.role == 'user' and not loop.first and loop.previtem.role == 'tool' -%}"
    refusal += "{{- raise_exception('no user after a tool') -}}{%- endif -%}{%- endfor -%}"
    file.write_text(refusal + file.read_text())
    with pytest.raises(TemplateError, match="no user after a tool"):
        train(config((models[0], str(strict)), tmp_path), [*ROWS, row], grouping(str(strict)))
    assert not (tmp_path / "run").exists()


def test_hints_on_the_way_of_a_single_answer_are_refused(models: tuple[str, str]):
    row = Row("hinted", ROWS[0].messages, teacher_hints=(TeacherHint(({"role": "user", "content": "x"},)),))
    with pytest.raises(DataError, match="hinted: has teacher_hints, which come after a turn"):
        setup.refuse_hints([*ROWS, row])
