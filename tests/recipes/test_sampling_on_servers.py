"""Evaluations, captures and a teacher's own accuracy, sampled on scripted vLLM servers with real models' numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from errors import ConfigError, ProtegeError
from recipes import capture_teacher, evaluate
from recipes.cli import parse_config
from tests.models.scripted_server import ScriptedServer, serving
from tests.recipes import tiny_models
from tests.recipes.tiny_models import REVERSE_KL, captured_engines, run

SMALL = {"dataset": "arithmetic", "eval_size": 8, "max_tokens": 6, "device": "cpu", "sampler_slots": 8}


@pytest.fixture
def server(student: str) -> Iterator[ScriptedServer]:
    """Of the untrained student."""
    with serving(student) as server:
        yield server


@pytest.fixture(scope="module")
def teacher(made: Path) -> str:
    return tiny_models.make_model(made / "served", seed=2, hidden=24)


@pytest.fixture
def of_teacher(teacher: str) -> Iterator[ScriptedServer]:
    """Nobody may replace its weights."""
    with serving(teacher, dev_mode=False) as server:
        yield server


def evaluated(folder: Path, **options: Any) -> dict[str, Any]:
    file = folder / "numbers.json"
    given = {**SMALL, "output_path": file, **options}
    evaluate.main(parse_config(evaluate.Config, [f"{key}={value}" for key, value in given.items()]))
    return json.loads(file.read_text())


def captured(folder: Path, **options: Any) -> list[dict[str, Any]]:
    rows = [{"messages": [{"role": "user", "content": f"1{i}+2"}]} for i in range(3)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = {
        "dataset": folder / "rows.jsonl", "top_k": 4, "max_tokens": 6, "device": "cpu", "completions": "teacher",
        "output_path": folder / "capture.jsonl", **options,
    }  # fmt: skip
    recipe = capture_teacher
    recipe.main(parse_config(recipe.Config, [f"{k}={v}" for k, v in given.items()], presets=recipe.presets))
    return [json.loads(line) for line in (folder / "capture.jsonl").read_text().splitlines()]


# --- a model's evaluation


def test_an_evaluation_is_of_the_model_that_was_named_whatever_the_server_had(
    tmp_path: Path, server: ScriptedServer, teacher: str, student: str
):
    """Greedy answers are the same wherever they are sampled; the server began with other weights."""
    trained = tiny_models.run(
        tmp_path / "run",
        {"model_name": student, "teacher_model": teacher},
        lora_rank=2,
        max_steps=3,
        eval_size=0,
        learning_rate=0.1,
    )
    (tmp_path / "out").mkdir()
    adapter = {"model_name": student, "load_checkpoint_path": tiny_models.final(trained), "samples": 0}
    here = evaluated(tmp_path / "out", **adapter)
    before = evaluated(tmp_path / "out", model_name=student, samples=0)
    there = evaluated(tmp_path / "out", **adapter, **{"sampler.url": server.url})
    assert server.sampled and len(server.loaded) == 1
    for name in ("eval/accuracy", "eval/greedy_length", "eval/greedy_truncated_fraction"):
        assert there[name] == here[name]
    assert there["eval/greedy_length"] != before["eval/greedy_length"], "the test could not tell them apart"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["numbers.json"], "what was handed over is removed"


def test_the_kl_to_a_teacher_is_of_what_the_server_sampled(
    tmp_path: Path, server: ScriptedServer, student: str, teacher: str
):
    models = {"model_name": student, "teacher_model": teacher}
    found = evaluated(tmp_path, **models, eval_size=12, **{"sampler.url": server.url})
    here = evaluated(tmp_path, **models, eval_size=12)
    assert found["eval/exact_reverse_kl"] == pytest.approx(here["eval/exact_reverse_kl"], rel=0.3)
    assert found["eval/exact_reverse_kl"] != here["eval/exact_reverse_kl"], "its draws are its own"


def test_a_server_that_goes_on_with_other_weights_is_no_evaluation(tmp_path: Path, student: str, teacher: str):
    with serving(student, deaf=True) as server, pytest.raises(ProtegeError, match="did not take the weights"):
        evaluated(tmp_path, model_name=teacher, **{"sampler.url": server.url})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("script", "options", "says"),
    [
        ({"dev_mode": False}, {}, "weights cannot be replaced"),
        ({"scale_out": False}, {}, "--enable-scale-out"),
        ({"dtype": "bfloat16"}, {}, "--dtype float32"),
        ({"token": "s3cret"}, {}, "sampler.token_env="),
        (
            {"max_model_len": 20},
            {"max_tokens": 20},
            "max_tokens=20: http.* reads 20 tokens, its --max-model-len.*no room for a prompt. Lower max_tokens",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_weights_are_loaded(
    tmp_path: Path, student: str, script: Any, options: Any, says: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(evaluate.engines, "load_lm", lambda *_: pytest.fail("weights were loaded"))
    with serving(student, **script) as server, pytest.raises(ConfigError, match=says) as caught:
        evaluated(tmp_path, model_name=student, **{"sampler.url": server.url, **options})
    assert "s3cret" not in str(caught.value)


def test_a_token_opens_a_server_and_is_written_nowhere(
    tmp_path: Path, student: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("SERVERS_TOKEN", "s3cret")
    with serving(student, token="s3cret") as server:
        options = {"sampler.url": server.url, "sampler.token_env": "SERVERS_TOKEN"}
        evaluated(tmp_path, model_name=student, samples=0, **{**options, "eval_size": 2})
        models = {"model_name": student, "teacher_model": student}
        path = run(tmp_path / "run", models, max_steps=1, eval_size=0, groups_per_batch=1, **options)
    assert {headers.get("Authorization") for _, headers, _ in server.requests} == {"Bearer s3cret"}
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert path / "config.json" in written and not [file for file in written if b"s3cret" in file.read_bytes()]
    assert "s3cret" not in "".join(capfd.readouterr())


# --- a teacher's answers


def test_a_capture_samples_from_a_server_and_scores_here(tmp_path: Path, of_teacher: ScriptedServer, teacher: str):
    _, *rows = captured(tmp_path, teacher_model=teacher, **{"sampler.url": of_teacher.url})
    assert len(rows) == len(of_teacher.sampled) == 3 and of_teacher.loaded == []
    assert not of_teacher.completions, "scored here"


def test_a_capture_of_a_teacher_that_is_only_on_a_server(tmp_path: Path, of_teacher: ScriptedServer, teacher: str):
    with captured_engines() as engines:
        _, *rows = captured(
            tmp_path, model_name=teacher, **{"teacher.url": of_teacher.url, "sampler.url": of_teacher.url}
        )
    assert engines == [] and len(rows) == len(of_teacher.sampled) == 3
    (tmp_path / "local").mkdir()
    _, *here = captured(tmp_path / "local", teacher_model=teacher, **{"sampler.url": of_teacher.url})
    for ours, theirs in zip(here, rows, strict=True):
        assert (ours["input_ids"], ours["topk_ids"]) == (theirs["input_ids"], theirs["topk_ids"])


def test_answers_of_another_model_are_no_capture_of_the_teacher(tmp_path: Path, server: ScriptedServer, teacher: str):
    with pytest.raises(ConfigError, match="serves another model, or other weights"):
        captured(tmp_path, teacher_model=teacher, **{"sampler.url": server.url})
    rows = (tmp_path / "capture.jsonl").read_text().splitlines()
    assert len(rows) <= 1, "nothing but the header"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"completions": "given", "sampler.url": "http://127.0.0.1:9"}, "completions=given are not sampled"),
        ({"teacher.url": "http://127.0.0.1:9"}, "sampler.url, a vLLM server that serves it"),
        ({"teacher.url": "http://127.0.0.1:9", "sampler": "vllm"}, "sampler.url, a vLLM server that serves it"),
        ({"sampler.url": "http://127.0.0.1:9"}, "127.0.0.1:9.* cannot be reached"),
    ],
)
def test_captures_that_make_no_sense(tmp_path: Path, teacher: str, options: dict[str, Any], says: str):
    where = {"model_name": teacher} if "teacher.url" in options else {"teacher_model": teacher}
    given = {**where, "completions": "teacher", "output_path": tmp_path / "x.jsonl", "max_rows": 3, **options}
    with pytest.raises(ConfigError, match=says):
        recipe = capture_teacher
        recipe.main(parse_config(recipe.Config, [f"{k}={v}" for k, v in given.items()], presets=recipe.presets))


# --- what a teacher reaches


def test_a_teachers_own_accuracy_is_sampled_where_it_is_served(
    tmp_path: Path, of_teacher: ScriptedServer, student: str, teacher: str
):
    options = {"eval_teacher": True, "eval_size": 8, "max_steps": 1, **REVERSE_KL}
    there = run(tmp_path / "there", {"model_name": student}, **options, **{"teacher.url": of_teacher.url})
    here = run(tmp_path / "here", {"model_name": student, "teacher_model": teacher}, **options)
    ours, theirs = (
        next(row for row in tiny_models.evaluation_rows(path) if "eval/teacher_accuracy" in row)
        for path in (here, there)
    )
    for name in ("eval/teacher_accuracy", "eval/teacher_greedy_length"):
        assert theirs[name] == ours[name]
    assert of_teacher.sampled and of_teacher.loaded == []


def test_a_teachers_server_that_only_scores_cannot_be_evaluated(tmp_path: Path, student: str, teacher: str):
    with (
        serving(teacher, scale_out=False) as server,
        captured_engines() as engines,
        pytest.raises(ConfigError, match=r"teacher.url=.*--enable-scale-out.*Or leave eval_teacher out"),
    ):
        options = {"teacher.url": server.url, "eval_teacher": True, **REVERSE_KL}
        run(tmp_path / "run", {"model_name": student}, **options)
    assert not engines and not (tmp_path / "run").exists()
