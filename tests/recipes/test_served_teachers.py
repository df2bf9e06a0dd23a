"""Teachers on a plain vLLM server, in whole runs: the same numbers as in-process, and every way to be refused."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from errors import ConfigError, NoSignalError, TokenizerMismatchError, UserError
from models.server_pool import ServerPool
from recipes import capture_teacher, evaluate, on_policy_multi_teacher, replay
from recipes import served as served_options
from recipes.cli import parse_config
from tests.models.scripted_teacher import ScriptedTeacher
from tests.models.tiny import plain_logits
from tests.recipes import tiny_models
from tests.recipes.tiny_models import EVALUATED, REVERSE_KL, captured_engines, no_report, run, training_rows, weights

Models = dict[str, str]
TOP_K = {"objective": "topk_forward_kl", "top_k": 5}
ROUNDING = 1e-4  # packed here, one sequence at a time there


def serving(folder: str, **options: Any) -> ScriptedTeacher:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    given = {"tokenizer": tokenizer, "root": folder, "max_model_len": 100, **options}
    return ScriptedTeacher(partial(plain_logits, model), model.config.vocab_size, **given)


@pytest.fixture(scope="module")
def teacher(made: Path) -> str:
    return tiny_models.make_model(made / "served", seed=2, hidden=24)  # no padding: sampled and exact KL then agree


@pytest.fixture(scope="module")
def models(student: str, teacher: str) -> Models:
    return {"model_name": student, "teacher_model": teacher}


@pytest.fixture
def server(teacher: str) -> Iterator[ScriptedTeacher]:
    with serving(teacher) as server:
        yield server


def served(path: Path, student: str, server: ScriptedTeacher, **options: Any) -> Path:
    given = {"teacher.url": server.url, "teacher.patience_s": 0.3, **options}
    return run(path, {"model_name": student}, **given)


def final_weights(path: Path) -> dict[str, torch.Tensor]:
    return weights(tiny_models.final(path))


def assert_same_run(first: Path, second: Path) -> None:
    for name, tensor in final_weights(first).items():
        torch.testing.assert_close(final_weights(second)[name], tensor, atol=1e-3, rtol=0)
    for ours, theirs in zip(training_rows(first), training_rows(second), strict=True):
        assert ours["kl"] == pytest.approx(theirs["kl"], abs=ROUNDING)


@pytest.mark.parametrize("objective", [REVERSE_KL, TOP_K])
def test_a_run_is_the_one_with_the_teacher_in_this_process(
    tmp_path: Path, models: Models, server: ScriptedTeacher, objective: dict[str, Any]
):
    objective = {**objective, **EVALUATED}
    local = run(tmp_path / "local", models, **objective)
    with captured_engines() as engines:
        remote = served(tmp_path / "remote", models["model_name"], server, **objective)
    assert engines[0].teacher_lms == {}, "no weights of the teacher are loaded here"
    assert_same_run(local, remote)
    assert {row[f"teacher/{server.url}/kl"] == row["kl"] for row in training_rows(remote)} == {True}
    (before, _), (after, _) = (tiny_models.evaluation_rows(path) for path in (local, remote))
    assert after["eval/reverse_kl"] == pytest.approx(before["eval/reverse_kl"], abs=ROUNDING)
    assert "eval/exact_reverse_kl" in before and "eval/exact_reverse_kl" not in after


def test_the_sampled_kl_is_called_so(tmp_path: Path, student: str, server: ScriptedTeacher, capsys):
    served(tmp_path / "run", student, server, max_steps=1, **EVALUATED, **REVERSE_KL)
    out = capsys.readouterr().out
    assert "sampled reverse KL per token:" in out and "exact" not in out


def test_a_teacher_named_for_its_tokenizer_needs_no_weights(tmp_path: Path, student: str, server: ScriptedTeacher):
    tokenizer = AutoTokenizer.from_pretrained(student)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    given = {"teacher_model": tmp_path / "tokenizer", **REVERSE_KL}
    path = served(tmp_path / "run", student, server, **given)
    assert f"teacher/{tmp_path / 'tokenizer'}/kl" in training_rows(path)[0]


def test_the_token_comes_from_a_variable_and_is_written_nowhere(
    tmp_path: Path, student: str, server: ScriptedTeacher, monkeypatch: pytest.MonkeyPatch
):
    server.token = "s3cret"
    (tmp_path / "token").write_text("s3cret\n")
    monkeypatch.setenv("TEACHER_TOKEN", "s3cret")
    for i, how in enumerate(({"teacher.token_env": "TEACHER_TOKEN"}, {"teacher.token_file": tmp_path / "token"})):
        path = served(tmp_path / f"run{i}", student, server, max_steps=1, **REVERSE_KL, **how)
        assert not any(b"s3cret" in file.read_bytes() for file in path.rglob("*") if file.is_file())


def every(answer: dict[str, Any], logprob: float | None) -> None:
    for row in answer["choices"][0]["prompt_logprobs"][1:]:
        for entry in row.values():
            entry["logprob"] = logprob


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = {
    "whole distributions": (
        {}, {"objective": "jsd"}, ConfigError,
        "plain vLLM server.*objective=reverse_kl, objective=topk_forward_kl.*support=teacher_topk.*serve_teacher",
    ),
    "student's top k": (
        {}, {"objective": "jsd", "support": "student_topk", "top_k": 4}, ConfigError, "whole distributions"
    ),
    "temperature": ({}, {"temperature": 0.7, **REVERSE_KL}, ConfigError, "not 0.7: set temperature=1"),
    "k": ({"max_logprobs": 4}, TOP_K, ConfigError, "--max-logprobs 5, or lower top_k=5"),
    "context": (
        {"max_model_len": 40}, {"max_tokens": 39, **REVERSE_KL}, UserError,
        "max_tokens=39: .*server scores sequences of 39 tokens .*--max-model-len",
    ),
    "model": ({}, {"teacher.served_model": "other", **REVERSE_KL}, ConfigError, "=other: .* serves teacher"),
    "token": ({"token": "s3cret"}, REVERSE_KL, ConfigError, "teacher.token_env="),
    "no variable": ({}, {"teacher.token_env": "NOT_SET_HERE", **REVERSE_KL}, ConfigError, "NOT_SET_HERE: .*not set"),
    "checkpoint": ({}, {"teacher_checkpoint": "x", **REVERSE_KL}, ConfigError, "the server has the teacher's weights"),
    "sampling": ({}, {"eval_teacher": True, **REVERSE_KL}, ConfigError, "Or leave eval_teacher out"),
    "no tokenizer": ({"root": "./nowhere"}, REVERSE_KL, UserError, "./nowhere.* teacher_model="),
    "logits": (
        {"always": lambda answer: every(answer, 9.0)}, REVERSE_KL, ConfigError, "--logprobs-mode",
    ),
    "no answer": ({"always": 500}, REVERSE_KL, ConfigError, "scripted 500"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_before_weights_are_loaded(
    tmp_path: Path, student: str, teacher: str, name: str, monkeypatch: pytest.MonkeyPatch
):
    script, options, error, says = REFUSED[name]
    wait = ServerPool.__init__
    quick = lambda pool, how, **_: wait(pool, how, sleep=lambda seconds: _at_once())  # noqa: E731
    monkeypatch.setattr(ServerPool, "__init__", quick)
    with serving(teacher, **script) as server, captured_engines() as engines, pytest.raises(error, match=says):
        served(tmp_path / "run", student, server, **options)
    assert not engines and not (tmp_path / "run").exists()


async def _at_once() -> None:
    pass


def test_a_dead_server_is_refused_before_weights_are_loaded(tmp_path: Path, student: str, teacher: str):
    with serving(teacher) as server:
        pass
    says = f"teacher.url={server.url}.*Start the server"
    with captured_engines() as engines, pytest.raises(ConfigError, match=says):
        served(tmp_path / "run", student, server, **REVERSE_KL)
    assert not engines


def test_an_address_that_takes_connections_and_says_nothing_is_named_soon(
    tmp_path: Path, student: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(served_options, "FIRST_ANSWER_S", 0.3)
    started = time.monotonic()
    with socket.create_server(("127.0.0.1", 0), backlog=100) as frozen:
        url = f"http://127.0.0.1:{frozen.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"teacher.url={url}: nothing was answered for 0.3 s, not even"):
            run(tmp_path / "run", {"model_name": student}, **{"teacher.url": url, **REVERSE_KL})
    assert time.monotonic() - started < 10 and not (tmp_path / "run").exists()


def test_what_answers_at_once_may_score_slowly(
    tmp_path: Path, student: str, server: ScriptedTeacher, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(served_options, "FIRST_ANSWER_S", 0.5)
    server.delay_s = 1.0  # of every text that is scored
    options = {"teacher.url": server.url, "dry_run": True, **REVERSE_KL}
    run(tmp_path / "run", {"model_name": student}, **options)
    assert server.completions


def test_another_tokenizer_than_the_servers_is_refused(tmp_path: Path, models: Models, teacher: str):
    other = AutoTokenizer.from_pretrained(teacher)
    spelled = json.loads(other.backend_tokenizer.to_str())
    vocab = spelled["model"]["vocab"]
    vocab["1"], vocab["2"] = vocab["2"], vocab["1"]
    other._tokenizer = type(other.backend_tokenizer).from_str(json.dumps(spelled))
    says = pytest.raises(TokenizerMismatchError, match="is '1' to the first and '2' to the second")
    with serving(teacher, tokenizer=other) as server, says:
        served(tmp_path / "run", models["model_name"], server, teacher_model=teacher, **REVERSE_KL)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"teacher.url": "ftp://host"}, "expected an address like http://host:8000"),
        ({"teacher.url": "http://me:pw@host"}, "holds a user or a password"),
        ({"teacher.token_env": "X"}, "give its url too"),
        ({"teacher.url": "http://h", "teacher.token_env": "X", "teacher.token_file": "y"}, "give one of them"),
        ({"teacher.url": "http://h", "teacher.timeout_s": 0}, "teacher.timeout_s=0"),
        ({"teacher.url": "http://h", "teacher.token_file": "missing"}, "^teacher.token_file=missing: cannot be read"),
        ({"teacher.url": "http://h", "teacher_model": "ema"}, "no server has it. Leave teacher.url out"),
        ({"dataset": __file__}, "missing: teacher_model"),
    ],
)
def test_options_that_make_no_sense(tmp_path: Path, student: str, options: dict[str, Any], says: str):
    with pytest.raises(ConfigError, match=says) as error:
        run(tmp_path / "run", {"model_name": student}, **options)
    assert "pw" not in str(error.value)


def test_a_dry_run_asks_the_server_and_says_what_it_found(
    tmp_path: Path, student: str, server: ScriptedTeacher, capsys
):
    served(tmp_path / "run", student, server, dry_run=True, **REVERSE_KL)
    out = capsys.readouterr().out
    assert f"served by {server.url} as teacher; scored twice, it differs by 0 nats" in out
    assert "teacher parameters" not in out


def test_killed_in_mid_run_nothing_is_trained_on_what_is_missing_and_the_run_goes_on(
    tmp_path: Path, models: Models, teacher: str
):
    student, options = models["model_name"], {"max_steps": 4, "save_every": 1, "eval_size": 0, **REVERSE_KL}
    with serving(teacher) as server:
        whole = served(tmp_path / "whole", student, server, **options)
        asked = len(server.completions)
    with serving(teacher) as server:
        server.faults.extend([lambda answer: None] * (asked // 2))
        server.always = "close"
        with pytest.raises(NoSignalError, match=r"by teacher, as: .*the run can be resumed"):
            served(tmp_path / "run", student, server, **options)
    done = [row["step"] for row in training_rows(tmp_path / "run")]
    assert done and done[-1] < 4
    with serving(teacher) as moved:  # at another address
        path = served(tmp_path / "run", student, moved, **options)
    assert [row["step"] for row in training_rows(path)] == [1, 2, 3, 4]
    assert_same_run(whole, path)


def test_one_view_that_fails_is_dropped_alone_and_counted(tmp_path: Path, student: str, server: ScriptedTeacher):
    def missing(answer: dict[str, Any]) -> None:
        every(answer, None)

    probes = [lambda answer: None] * 2
    server.faults.extend(
        [*probes, missing, *[lambda answer: None] * 3, missing]
    )  # of the four at once, then of each alone
    path = served(tmp_path / "run", student, server, eval_size=0, max_steps=1, **REVERSE_KL)
    (row,) = training_rows(path)
    assert row["dropped/teacher"] > 0 and row["trained_episodes"] < 4


def test_an_evaluation_measures_the_sampled_kl(tmp_path: Path, models: Models, server: ScriptedTeacher):
    def numbers(**options: Any) -> dict[str, Any]:
        given = {
            "model_name": models["model_name"], "eval_size": 8, "max_tokens": 6, "device": "cpu",
            "output_path": tmp_path / "numbers.json", **options,
        }  # fmt: skip
        evaluate.main(parse_config(evaluate.Config, [f"{k}={v}" for k, v in given.items()]))
        return json.loads((tmp_path / "numbers.json").read_text())

    here, there = numbers(teacher_model=models["teacher_model"]), numbers(**{"teacher.url": server.url})
    assert there["eval/reverse_kl"] == pytest.approx(here["eval/reverse_kl"], abs=ROUNDING)
    assert "eval/exact_reverse_kl" not in there


def test_a_capture_is_the_one_of_the_teacher_in_this_process(tmp_path: Path, models: Models, server: ScriptedTeacher):
    rows = [{"messages": [{"role": "user", "content": f"1{i}+2"}], "completion": f"={i + 12}"} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def capture(name: str, **options: Any) -> list[dict[str, Any]]:
        given = {
            "dataset": tmp_path / "rows.jsonl", "model_name": models["model_name"], "top_k": 4, "device": "cpu",
            "output_path": tmp_path / name, **options,
        }  # fmt: skip
        recipe = capture_teacher
        recipe.main(parse_config(recipe.Config, [f"{k}={v}" for k, v in given.items()], presets=recipe.presets))
        return [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]

    here = capture("here.jsonl", teacher_model=models["teacher_model"])
    there = capture("there.jsonl", **{"teacher.url": server.url})
    for ours, theirs in zip(here[1:], there[1:], strict=True):
        assert ours["topk_ids"] == theirs["topk_ids"]
        for a, b in zip(ours["topk_logprobs"], theirs["topk_logprobs"], strict=True):
            assert a == pytest.approx(b, abs=ROUNDING)
    with pytest.raises(ConfigError, match="completions=teacher samples"):
        capture("x.jsonl", **{"teacher.url": server.url, "completions": "teacher"})


def test_a_replay_has_its_episodes_scored_there(tmp_path: Path, models: Models, server: ScriptedTeacher):
    first = run(tmp_path / "first", models, eval_size=0, **REVERSE_KL)
    given = {
        "model_name": models["model_name"], "teacher.url": server.url, "saved": first, "log_path": tmp_path / "again",
        "learning_rate": 1e-2, "device": "cpu", **REVERSE_KL,
    }  # fmt: skip
    with no_report():
        replay.main(parse_config(replay.Config, [f"{k}={v}" for k, v in given.items()]))
    assert_same_run(first, tmp_path / "again")


@pytest.mark.parametrize("listed", [False, True])
def test_several_teachers_of_which_one_is_served(tmp_path: Path, models: Models, server: ScriptedTeacher, listed: bool):
    where = {"datasets.1.teacher.url": server.url}
    if listed:
        where = {"teachers.0.url": server.url, "teachers.0.route_value": server.url, "route_key": "judge"}
        rows = [{"messages": [{"role": "user", "content": f"1{i}+2"}], "judge": server.url} for i in range(3)]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        where |= {"datasets.1.dataset": tmp_path / "rows.jsonl"}
    given = {
        "model_name": models["model_name"], "log_path": tmp_path / "run", "device": "cpu", "max_steps": 1,
        "max_tokens": 6, "eval_every": 0, "sampler_slots": 8, **REVERSE_KL,
        "datasets.0.dataset": "arithmetic", "datasets.0.name": "here", "datasets.0.teacher_model": models["model_name"],
        "datasets.0.groups_per_batch": 2, "datasets.0.max_rows": 4, "datasets.0.eval_size": 2,
        "datasets.1.dataset": "arithmetic", "datasets.1.name": "there", "datasets.1.max_rows": 3,
        "datasets.1.groups_per_batch": 2, "datasets.1.eval_size": 0, **where,
    }  # fmt: skip
    recipe = on_policy_multi_teacher
    with no_report(), captured_engines() as engines:
        recipe.main(parse_config(recipe.Config, [f"{k}={v}" for k, v in given.items()], presets=recipe.presets))
    (row,) = training_rows(tmp_path / "run")
    assert engines[0].teacher_lms.keys() == {models["model_name"]}
    assert abs(row["dataset/here/kl"]) < 1e-5 < abs(row["dataset/there/kl"]) == abs(row[f"teacher/{server.url}/kl"])
    (start, *_) = tiny_models.evaluation_rows(tmp_path / "run")
    assert "eval/reverse_kl" in start and "eval/exact_reverse_kl" not in start
