"""Training and evaluation on Harbor tasks, with tiny models that write noise and sandboxes that are scripted."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tiny_models

sys.path.insert(0, str(Path(__file__).parents[1] / "envs" / "harbor"))
from scripted_sandbox import ScriptedSandboxes
from transformers import AutoTokenizer

from envs.harbor.dataset import STARTER_FOLDER
from envs.harbor.task import load_task
from envs.types import Episode
from errors import ConfigError, SandboxError, SandboxUnavailableError
from models.teacher_view import ViewMaker
from recipes import evaluate_harbor, harbor_setup
from recipes import on_policy_distillation_harbor_multi_turn as recipe
from recipes.cli import parse_config, run_cli
from recipes.tiny_tool_models import make_models
from tests.models.scripted_server import serving
from training.run_dir import read_metrics

SMALL = {
    "task_names": "edit-json,sum-csv,mend-script", "group_size": 2, "groups_per_batch": 2, "max_turns": 2,
    "max_steps": 2, "max_tokens": 12, "max_trajectory_tokens": 2500, "lora_rank": 0, "learning_rate": 1e-2,
    "system_prompt": "",
    "eval_every": 0, "save_every": 0, "device": "cpu", "sampler_slots": 8,
}  # fmt: skip


@pytest.fixture(scope="session")
def tool_models(made: Path) -> dict[str, str]:
    student, teacher = make_models(made / "tools", context=4096)
    return {"model_name": student, "teacher_model": teacher}


@pytest.fixture
def sandboxes(monkeypatch: pytest.MonkeyPatch) -> ScriptedSandboxes:
    """In place of the engine."""
    scripted = ScriptedSandboxes()
    for module in (recipe, evaluate_harbor):
        monkeypatch.setattr(module, "sandboxes_of", lambda path, options: scripted)
        monkeypatch.setattr(module, "prepare_engine", lambda data, runtime: None)
    return scripted


def run(log_path: Path, models: dict[str, str], **options: Any) -> Path:
    given = {**SMALL, **models, "log_path": log_path, **options}
    with tiny_models.no_report():
        recipe.main(parse_config(recipe.Config, [f"{key}={value}" for key, value in given.items()]))
    return log_path


def refused(module: Any, capfd: pytest.CaptureFixture[str], argv: list[str]) -> str:
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit:
        run_cli(module.main, module.Config, argv=argv)
    err = capfd.readouterr().err
    assert exit.value.code == 2 and err.count("error:") == 1 and "Traceback" not in err, err
    return err


def rows_of(path: Path) -> list[list[str]]:
    files = sorted((path / "episodes").glob("step_*.jsonl"))
    return [[json.loads(line)["row_id"] for line in file.read_text().splitlines()] for file in files]


def test_a_run_trains_on_every_episode_with_zero_reward(
    tmp_path: Path, tool_models: dict[str, str], sandboxes: ScriptedSandboxes
):
    path = run(tmp_path / "run", tool_models)
    rows = tiny_models.training_rows(path)
    assert [row["trained_episodes"] for row in rows] == [4, 4]
    assert all(row["reward"] == 0.0 and row["dropped_fraction"] == 0.0 for row in rows)
    assert len(sandboxes.made) == 8 and all(sandbox.removed for sandbox in sandboxes.made)
    assert not any("tests" in event for sandbox in sandboxes.made for event in sandbox.events)
    for episode in tiny_models.episodes(path, 1):
        assert episode["dataset"] == "starter" and episode["teacher"] == tool_models["teacher_model"]
        sampled = [i for i, mask in enumerate(episode["sampled"]) if mask]
        assert 0 < len(sampled) <= 24 and all(episode["teacher_logprobs"][i] is not None for i in sampled)
        assert '"name": "bash"' in "".join(episode["tokens"])  # the prompt shows the tool


def test_the_solution_is_shown_to_the_teacher_alone(
    tmp_path: Path, tool_models: dict[str, str], sandboxes: ScriptedSandboxes, capsys: pytest.CaptureFixture[str]
):
    views: list[list[int]] = []
    made = ViewMaker.view

    def view(self: ViewMaker, episode: Episode) -> Any:
        views.append(made(self, episode).token_ids.tolist())
        return made(self, episode)

    with mock.patch.object(ViewMaker, "view", view):
        path = run(tmp_path / "run", tool_models, max_steps=1, teacher_sees_solution=True)
    tokenizer = AutoTokenizer.from_pretrained(tool_models["teacher_model"])
    read = [tokenizer.decode(ids) for ids in views]
    episodes = tiny_models.episodes(path, 1)
    assert len(read) == len(episodes) == 4
    for episode in episodes:
        task = load_task(STARTER_FOLDER / episode["row_id"])
        script = (STARTER_FOLDER / episode["row_id"] / "solution" / "solve.sh").read_text().strip()
        said = "".join(token for token, sampled in zip(episode["tokens"], episode["sampled"], strict=True) if sampled)
        assert script not in "".join(episode["tokens"])
        assert any(task.instruction in text and script in text and text.endswith(said) for text in read)
    run(tmp_path / "dry", tool_models, dry_run=True, teacher_sees_solution=True)
    assert "tokens (with the solution)" in capsys.readouterr().out


def test_a_solution_that_is_missing_or_too_long_is_named(
    tmp_path: Path, tool_models: dict[str, str], capfd: pytest.CaptureFixture[str]
):
    options = {**SMALL, **tool_models, "log_path": tmp_path / "run", "teacher_sees_solution": True}
    argv = [f"{key}={value}" for key, value in (options | {"max_trajectory_tokens": 4096}).items()]
    err = refused(recipe, capfd, argv)
    assert "max_trajectory_tokens=4096: with the solution of task" in err and "context is 4096" in err
    task = Path(
        tiny_models.copy_without(str(STARTER_FOLDER / "edit-json"), tmp_path / "tasks" / "edit-json", "solution")
    )
    argv = [f"{key}={value}" for key, value in (options | {"dataset": task.parent, "task_names": "edit-json"}).items()]
    assert f"{task}: teacher_sees_solution=True needs its solution/solve.sh" in refused(recipe, capfd, argv)


def test_held_out_tasks_are_graded_by_their_tests(
    tmp_path: Path, tool_models: dict[str, str], sandboxes: ScriptedSandboxes, capsys: pytest.CaptureFixture[str]
):
    path = run(tmp_path / "run", tool_models, eval_size=1, eval_every=1, max_steps=1, eval_teacher=True)
    evaluations = tiny_models.evaluation_rows(path)
    assert [row["eval/reward"] for row in evaluations if "eval/reward" in row] == [1.0, 1.0]
    assert [row["eval/teacher_reward"] for row in evaluations if "eval/teacher_reward" in row] == [1.0]
    assert all("eval/reverse_kl" in row for row in evaluations if "eval/reward" in row)
    assert "reward: 1.0000 -> 1.0000   (teacher: 1.000)" in capsys.readouterr().out
    held_out = {s.image for s in sandboxes.made if "tests as 0:0" in s.events}
    trained = {s.image for s in sandboxes.made if not s.events or "tests as 0:0" not in s.events}
    assert len(held_out) == 1 and not held_out & trained


def test_dropped_episodes_are_counted_under_their_reason(
    tmp_path: Path, tool_models: dict[str, str], sandboxes: ScriptedSandboxes
):
    sandboxes.options = [{}, SandboxError("no room"), {}, {}]
    (row,) = tiny_models.training_rows(run(tmp_path / "run", tool_models, max_steps=1))
    assert (row["trained_episodes"], row["dropped/sandbox"], row["dropped_fraction"]) == (3, 0.25, 0.25)


def test_a_resumed_run_draws_the_tasks_that_the_uninterrupted_one_draws(
    tmp_path: Path, tool_models: dict[str, str], sandboxes: ScriptedSandboxes
):
    whole = run(tmp_path / "whole", tool_models, max_steps=3)
    parts = run(tmp_path / "parts", tool_models, max_steps=1)
    run(tmp_path / "parts", tool_models, max_steps=3)
    assert rows_of(parts) == rows_of(whole) and len(rows_of(whole)) == 3
    assert tiny_models.fingerprint(parts)["weights"] == tiny_models.fingerprint(whole)["weights"]


def test_a_dry_run_makes_nothing_and_needs_no_engine(
    tmp_path: Path, tool_models: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nobody.sock")
    run(tmp_path / "run", tool_models, dry_run=True, eval_size=1)
    out = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    for part in (
        "starter: 2 training tasks, 1 held out",
        "no container engine answers",
        '"name": "bash"',
        "max_turns=2",
    ):
        assert part in out


@pytest.mark.parametrize("module", [recipe, evaluate_harbor])
def test_without_an_engine_there_is_one_clear_error_and_nothing_is_loaded(
    module: Any, tmp_path: Path, tool_models: dict[str, str], monkeypatch: pytest.MonkeyPatch, capfd: Any
):
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nobody.sock")
    models = (
        tool_models if module is recipe else {"model_name": tool_models["model_name"], "max_trajectory_tokens": 2500}
    )
    given = {**models, "log_path": tmp_path / "run"} | ({"max_trajectory_tokens": 2500} if module is recipe else {})
    err = refused(module, capfd, [f"{key}={value}" for key, value in given.items()])
    assert "no container engine answers" in err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"dataset": "stater"}, "did you mean 'starter'?"),
        ({"task_names": "edit-jsn"}, "did you mean 'edit-json'?"),
        ({"max_trajectory_tokens": 9999}, "the models' context is 4096 tokens"),
        ({"max_trajectory_tokens": 300}, "opens with"),
        ({"eval_size": 3}, "leaves none to train on"),
        ({"eval_size": 1, "eval_samples": 0}, "eval_samples=0"),
        ({"max_turns": 0}, "max_turns=0"),
        ({"group_size": 0}, "group_size=0"),
        ({"pass_env": "NO_SUCH_VARIABLE"}, "NO_SUCH_VARIABLE is not set"),
        ({"network": "on"}, "network=on"),
        ({"substitute_images": "ubuntu:24.04"}, "expected IMAGE=LOCAL_IMAGE"),
        ({"max_turn": 1}, "Did you mean max_turns?"),
        ({"lmbda": 0}, "lmbda=0: tasks have no given answers"),
        ({"objective": "kd"}, "objective=kd learns from given answers, and here are none"),
        ({"objective": "sft"}, "objective=sft learns from given answers, and here are none"),
    ],
)
def test_mistakes(
    options: dict[str, Any], part: str, tool_models: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    given = {**SMALL, **tool_models, "log_path": tmp_path / "run", **options}
    assert part in refused(recipe, capfd, [f"{key}={value}" for key, value in given.items()])
    assert not (tmp_path / "run").exists()


def test_a_model_that_cannot_be_shown_tools_is_refused(
    tool_models: dict[str, str], student: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    for models in ({"model_name": student}, {"teacher_model": student}):
        given = {**SMALL, **tool_models, **models, "log_path": tmp_path / "run"}
        assert "does not show tools" in refused(recipe, capfd, [f"{key}={value}" for key, value in given.items()])


def test_options_have_the_defaults_of_the_cookbook(tool_models: dict[str, str]):
    config = parse_config(recipe.Config, [f"{key}={value}" for key, value in tool_models.items()])
    assert (config.max_turns, config.group_size, config.groups_per_batch, config.lora_rank) == (10, 4, 8, 8)
    assert (config.learning_rate, config.max_tokens, config.max_trajectory_tokens) == (1e-4, 2048, 24576)


# --- evaluation


def evaluated(tmp_path: Path, **options: Any) -> dict[str, Any]:
    small = {"task_names": "edit-json,sum-csv", "max_turns": 2, "max_tokens": 12, "max_trajectory_tokens": 2500}
    given = {**small, "system_prompt": "", "device": "cpu", "log_path": tmp_path / "run", **options}
    evaluate_harbor.main(parse_config(evaluate_harbor.Config, [f"{key}={value}" for key, value in given.items()]))
    (row,) = read_metrics(tmp_path / "run")
    return row


def records(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "run/episodes/step_000000.jsonl").read_text().splitlines()]


def test_a_models_pass_rate_costs_and_transcripts(
    tmp_path: Path, tool_models: dict[str, str], sandboxes: ScriptedSandboxes, capsys: pytest.CaptureFixture[str]
):
    fail = {"tests": lambda sandbox, call: sandbox.rewarded("0")}
    sandboxes.options = [{}, fail, SandboxError("no room"), {}]
    found = evaluated(tmp_path, model_name=tool_models["model_name"], samples=2)
    assert (found["attempts"], found["graded"], found["dropped/sandbox"]) == (4, 3, 1)
    assert found["pass_rate"] == pytest.approx(2 / 3) and found["pass_rate_of_all"] == 0.5
    assert found["pass_rate_se"] > 0 and found["sampled_tokens_mean"] > 0
    assert sum(value for name, value in found.items() if name.startswith("stop/")) == pytest.approx(1)
    assert "dropped (sandbox: no room)" in capsys.readouterr().out
    for record in records(tmp_path):
        if record["dropped"] is None:
            assert [m["role"] for m in record["messages"]][:2] == ["user", "assistant"]
            assert record["stop_reason"] in ("max_tokens", "completed", "max_turns", "parse_error")


def test_the_same_command_makes_what_is_missing_or_was_dropped(
    tmp_path: Path, tool_models: dict[str, str], sandboxes: ScriptedSandboxes, capsys: pytest.CaptureFixture[str]
):
    sandboxes.options = [SandboxError("no room"), {}]
    evaluated(tmp_path, model_name=tool_models["model_name"])
    first = {r["task"]: r for r in records(tmp_path)}
    found = evaluated(tmp_path, model_name=tool_models["model_name"])
    assert "1 of 2 attempts to make" in capsys.readouterr().out
    assert (found["graded"], len(sandboxes.made)) == (2, 2) and not any(name.startswith("dropped") for name in found)
    kept = next(r for r in first.values() if r["dropped"] is None)
    assert kept in records(tmp_path)


def test_an_evaluation_can_be_made_anew(tmp_path: Path, sandboxes: ScriptedSandboxes):
    evaluated(tmp_path, agent="nop")
    evaluated(tmp_path, agent="nop", behavior_if_log_dir_exists="delete")
    assert len(sandboxes.made) == 4 and len(records(tmp_path)) == 2


def test_attempts_are_the_same_with_the_same_seed(
    tmp_path: Path, tool_models: dict[str, str], sandboxes: ScriptedSandboxes
):
    said = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        evaluated(tmp_path / name, model_name=tool_models["model_name"], seed=seed)
        said.append({r["task"]: r["messages"] for r in records(tmp_path / name)})
    assert said[0] == said[1] != said[2]


def test_attempts_are_sampled_on_a_server_that_was_given_the_models_weights(
    tmp_path: Path, tool_models: dict[str, str], sandboxes: ScriptedSandboxes
):
    with serving(tool_models["teacher_model"], max_model_len=4096) as server:
        found = evaluated(tmp_path, model_name=tool_models["model_name"], **{"sampler.url": server.url})
        evaluated(tmp_path, model_name=tool_models["model_name"])  # nothing is missing, wherever it was sampled
    assert found["graded"] == 2 and len(server.sampled) >= 2
    assert [Path(folder).parent.parent for folder in server.loaded] == [tmp_path / "run"]
    assert not tiny_models.leftovers(tmp_path)


def test_solutions_and_nothing_at_all_need_no_model(tmp_path: Path, sandboxes: ScriptedSandboxes):
    found = evaluated(tmp_path / "oracle", agent="oracle")
    assert found["pass_rate"] == 1.0
    assert all("bash /solution/solve.sh" in sandbox.events for sandbox in sandboxes.made)
    sandboxes.made.clear()
    evaluated(tmp_path / "nop", agent="nop")
    assert not any("bash /solution/solve.sh" in sandbox.events for sandbox in sandboxes.made)


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["agent=model"], "model_name is for agent=model, which needs it"),
        (["agent=oracle", "model_name=x"], "model_name is for agent=model"),
        (["agent=oracle", "samples=0"], "samples=0"),
        (["agent=oracle", "sampler=vllm"], "agent=oracle samples from no model"),
        (["agent=orakle"], "agent=orakle"),
    ],
)
def test_mistakes_in_an_evaluation(argv: list[str], part: str, capfd: pytest.CaptureFixture[str]):
    assert part in refused(evaluate_harbor, capfd, argv)


def test_the_engine_is_asked_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nobody.sock")
    config = parse_config(evaluate_harbor.Config, ["agent=oracle"])
    with pytest.raises(SandboxUnavailableError):
        harbor_setup.prepare_engine(config.tasks(eval_size=0, seed=0), None)


def test_a_runtime_that_the_engine_does_not_have_is_named(monkeypatch: pytest.MonkeyPatch):
    class Engine(contextlib.AbstractContextManager):
        def info(self) -> dict:
            return {"Runtimes": {"runc": {}, "crun": {}}}

        def close(self) -> None:
            pass

        def __exit__(self, *exc: object) -> None:
            pass

    monkeypatch.setattr(harbor_setup, "connect", Engine)
    monkeypatch.setattr(harbor_setup, "reap", lambda: [])
    monkeypatch.setattr(harbor_setup, "ensure_base_image", lambda: "")
    data = parse_config(evaluate_harbor.Config, ["agent=oracle"]).tasks(eval_size=0, seed=0)
    with pytest.raises(ConfigError, match="sandbox_runtime=runsc: the engine has crun, runc"):
        harbor_setup.prepare_engine(data, "runsc")
    harbor_setup.prepare_engine(data, "crun")
    harbor_setup.prepare_engine(data, "io.containerd.kata.v2")  # which the engine looks for itself


def test_what_a_student_may_have_said_is_kept_and_found_again(tmp_path: Path):
    path = tmp_path / "attempts.jsonl"
    store = evaluate_harbor.Store(path)
    for k, text in enumerate(["a\u2028b\x85c", "half \ud83d of it"]):
        store.add(evaluate_harbor.Record("t", k, 1.0, 1.0, messages=[{"content": text}]))
    again = evaluate_harbor.Store(path)
    assert [r.messages[0]["content"] for r in again.records.values()] == ["a\u2028b\x85c", "half ? of it"]


def test_passes_beside_services_and_failures_after_their_end_are_listed_apart():
    kept, ended = {"services": 1.0, "services_kept": 1.0}, {"services": 2.0, "services_kept": 0.0}
    rows = [(1.0, kept), (0.0, kept), (1.0, ended), (0.0, ended), (0.0, ended), (1.0, {})]
    numbers = evaluate_harbor.summary(
        [evaluate_harbor.Record("t", k, 1.0, reward, metrics=m) for k, (reward, m) in enumerate(rows)]
    )
    assert (numbers["passes_beside_kept_services"], numbers["failures_after_services_were_ended"]) == (1, 2)
    assert "failures_with_artifacts_left_out" not in numbers


def test_failures_for_which_an_artifact_was_left_out_are_counted():
    rows = [(1.0, 2.0), (0.0, 3.0), (0.0, 0.0), (0.5, 1.0)]
    records = [
        evaluate_harbor.Record("t", k, 1.0, reward, metrics={"artifacts_left_out": left})
        for k, (reward, left) in enumerate(rows)
    ]
    assert evaluate_harbor.summary(records)["failures_with_artifacts_left_out"] == 2
