"""Captures of unusual rows, of teachers with more tokens than the student, and files that somebody changed."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from test_offline_distillation import ANSWERS, Models, capture, examples, offline_argv, train, write
from tiny_models import final, weights

from envs.datasets import Row
from envs.rendering import make_renderer
from envs.types import Sampled
from errors import DataError
from recipes import capture_teacher, offline_distillation, on_policy_distillation
from recipes.cli import parse_config, run_cli
from recipes.embedded import char_tokenizer
from recipes.teacher_answers import without_foreign_tokens
from training.capture_files import read_capture


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory, models: Models) -> Path:
    return capture(tmp_path_factory.mktemp("capture"), models)


def refused(recipe: Any, given: list[str], capfd: pytest.CaptureFixture[str], *parts: str) -> None:
    with pytest.raises(SystemExit) as exit:
        run_cli(recipe.main, recipe.Config, argv=given)
    err = capfd.readouterr().err
    assert exit.value.code == 2 and err.count("error:") == 1, err
    assert all(part in err for part in parts), err


def test_rows_of_equal_ids_keep_what_their_own_teacher_said(tmp_path: Path, models: Models):
    """Same prompt and answer, and the teacher is told something else."""
    hints = ["1+1=2, and ", "9+9=18, and ", ""]
    rows = [
        {**ANSWERS[3], "id": f"same{i}", "teacher_messages": [{"role": "user", "content": f"{hint}3+1="}]}
        for i, hint in enumerate(hints)
    ]
    options: dict[str, Any] = {"groups_per_batch": 3, "learning_rate": 1e-2, "max_steps": 2, "top_k": 4}
    file = capture(tmp_path, models, rows)
    said = {tuple(row["logprobs"]) for row in examples(file)}
    assert len(said) == 3
    offline = train(tmp_path / "offline", models, file, **options)
    live = {
        **models, "dataset": tmp_path / "answers.jsonl", "objective": "topk_forward_kl", "lmbda": 0, "eval_size": 0,
        "save_every": 0, "log_path": tmp_path / "live", "device": "cpu", "max_tokens": 8, **options,
    }  # fmt: skip
    with tiny_models.no_report():
        recipe = on_policy_distillation
        recipe.main(parse_config(recipe.Config, [f"{k}={v}" for k, v in live.items()], presets=recipe.presets))
    ours, theirs = weights(final(offline)), weights(final(tmp_path / "live"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_another_precision_is_another_capture(capfd: pytest.CaptureFixture[str], tmp_path: Path, models: Models):
    file = capture(tmp_path, models)
    half = b"".join(file.read_bytes().splitlines(keepends=True)[:20])
    file.write_bytes(half)
    given = {**models, "dataset": tmp_path / "answers.jsonl", "top_k": 4, "device": "cpu", "output_path": file}
    given["dtype"] = "bfloat16"
    refused(
        capture_teacher, [f"{k}={v}" for k, v in given.items()], capfd,
        "holds another capture: its dtype is 'float32', now it would be 'bfloat16'",
    )  # fmt: skip
    assert file.read_bytes() == half


@pytest.mark.parametrize("name", ["capture.parquet", "capture", "capture.json"])
def test_a_name_that_stands_for_no_form(name: str, capfd: pytest.CaptureFixture[str], tmp_path: Path, models: Models):
    given = {**models, "dataset": write(tmp_path / "a.jsonl", ANSWERS[:2]), "output_path": tmp_path / name}
    refused(capture_teacher, [f"{k}={v}" for k, v in given.items()], capfd, "ends in .jsonl or .safetensors")
    assert not (tmp_path / name).exists()


def test_episodes_of_a_student_with_other_ids(capfd: pytest.CaptureFixture[str], tmp_path: Path, models: Models):
    live = tiny_models.run(tmp_path / "live", models, objective="reverse_kl", eval_size=0, max_steps=1)
    (file,) = (live / "episodes").glob("step_*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        row["tokens"] = [{"+": "=", "=": "+"}.get(text, text) for text in row["tokens"]]
    write(file, rows)
    given = {
        **models, "completions": "saved", "episodes_path": live, "output_path": tmp_path / "c.jsonl", "device": "cpu"
    }  # fmt: skip
    refused(capture_teacher, [f"{k}={v}" for k, v in given.items()], capfd, "to the student that wrote it")
    assert not (tmp_path / "c.jsonl").exists()


def test_a_teacher_s_answer_ends_before_a_token_that_the_student_does_not_have():
    tokenizer = char_tokenizer()
    tokenizer.add_tokens(["<think>"])
    more, teacher = tokenizer.convert_tokens_to_ids("<think>"), make_renderer(tokenizer, name="t")
    row, foreign = Row("r", ()), frozenset({more})
    whole = Sampled([4, 5, 6], [-1.0, -2.0, -3.0], stopped=True)
    assert without_foreign_tokens(row, whole, foreign, teacher) is whole
    cut = without_foreign_tokens(row, Sampled([4, 5, more, 6], [-1.0, -2.0, -3.0, -4.0], True), foreign, teacher)
    assert cut == Sampled([4, 5], [-1.0, -2.0], stopped=False)
    with pytest.raises(DataError, match="r: the teacher's answer begins with '<think>', a token that the student"):
        without_foreign_tokens(row, Sampled([more, 4], [-1.0, -2.0], True), foreign, teacher)


# --- files that somebody changed


def with_example(text: str, **changes: Any) -> str:
    header, first, *rest = text.splitlines()
    return "\n".join([header, json.dumps({**json.loads(first), **changes}), *rest]) + "\n"


def with_header(text: str, **changes: Any) -> str:
    header, *rest = text.splitlines()
    return "\n".join([json.dumps({**json.loads(header), **changes}), *rest]) + "\n"


def first(text: str) -> dict[str, Any]:
    return json.loads(text.splitlines()[1])


def shifted(text: str, name: str, value: Any) -> str:
    """The last position's entry changed."""
    return with_example(text, **{name: [*first(text)[name][:-1], value]})


BROKEN: dict[str, Any] = {
    "an id as large as none": lambda t: shifted(t, "input_ids", 2**40),
    "a negative id": lambda t: shifted(t, "input_ids", -1),
    "half an id": lambda t: shifted(t, "input_ids", 1.5),
    "a negative likeliest id": lambda t: shifted(t, "topk_ids", [-1, 1, 2, 3]),
    "half a likeliest id": lambda t: shifted(t, "topk_ids", [0.5, 1, 2, 3]),
    "four times the same": lambda t: shifted(t, "topk_ids", [1, 1, 1, 1]),
    "a mass of 4": lambda t: shifted(t, "topk_logprobs", [0.0, 0.0, 0.0, 0.0]),
    "a probability above 1": lambda t: shifted(t, "logprobs", 5.0),
    "more ids than logprobs": lambda t: with_example(t, input_ids=[*first(t)["input_ids"], 1]),
    "overlapping spans": lambda t: with_example(t, trained=[first(t)["trained"][0]] * 2),
    "a negative span": lambda t: with_example(t, trained=[[-2, -1]]),
    "a span of a billion tokens": lambda t: with_example(t, trained=[[1, 10**9]]),
    "a span past the end": lambda t: with_example(t, trained=[[len(first(t)["input_ids"]) - 1, 99]]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_example_is_refused_before_anything_is_loaded(
    case: str, capfd: pytest.CaptureFixture[str], tmp_path: Path, models: Models, captured: Path
):
    file = tmp_path / "broken.jsonl"
    file.write_text(BROKEN[case](captured.read_text()))
    refused(offline_distillation, offline_argv(tmp_path / "run", models, file), capfd, f"{file}:2: a broken example")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": "1"}, {"temperature": 0.0}, {"dataset": ["x"]}, {"teacher": None}, {"examples": "40"},
        {"examples": 0}, {"top_k": 0}, {"more": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_broken_header_is_refused(
    change: dict[str, Any], capfd: pytest.CaptureFixture[str], tmp_path: Path, models: Models, captured: Path
):
    file = tmp_path / "broken.jsonl"
    file.write_text(with_header(captured.read_text(), **change))
    refused(offline_distillation, offline_argv(tmp_path / "run", models, file), capfd, "is not the header of a capture")


def test_an_id_that_the_student_does_not_have(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, models: Models, captured: Path
):
    file = tmp_path / "broken.jsonl"
    file.write_text(shifted(captured.read_text(), "input_ids", 5000))
    refused(offline_distillation, offline_argv(tmp_path / "run", models, file), capfd, "holds id 5000, and the student")


def test_a_capture_does_not_go_on_after_a_stripped_line(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, models: Models
):
    file = capture(tmp_path, models)
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:5], json.dumps({"id": json.loads(lines[5])["id"]})]) + "\n")
    given = {**models, "dataset": tmp_path / "answers.jsonl", "top_k": 4, "device": "cpu", "output_path": file}
    refused(capture_teacher, [f"{k}={v}" for k, v in given.items()], capfd, f"{file}:6: a broken example")


def test_what_a_kill_left_beside_a_complete_binary_file_is_removed(tmp_path: Path, models: Models):
    file = capture(tmp_path, models, output_path=tmp_path / "c.safetensors")
    left = tmp_path / "c.safetensors.partial.jsonl"
    left.write_text("{}\n")
    assert capture(tmp_path, models, output_path=file) == file and not left.exists()
    assert len(read_capture(file).examples) == 40


def test_a_full_disk_is_one_message_and_the_capture_goes_on_when_there_is_room(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch
):
    whole = capture(tmp_path, models).read_bytes()
    room = len(whole) // 2

    def write_what_fits(descriptor: int, data: bytes) -> int:
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = real(descriptor, data[:room])
        room -= written
        return written

    file = tmp_path / "full.jsonl"
    given = {**models, "dataset": tmp_path / "answers.jsonl", "top_k": 4, "device": "cpu", "output_path": file}
    with monkeypatch.context() as disk:
        real = os.write
        disk.setattr(os, "write", write_what_fits)
        with pytest.raises(SystemExit) as exit:
            run_cli(capture_teacher.main, capture_teacher.Config, argv=[f"{k}={v}" for k, v in given.items()])
    err = capfd.readouterr().err
    assert exit.value.code == 1 and err.count("error:") == 1 and "Traceback" not in err, err
    assert f"cannot write {file}" in err and "No space left" in err and "the same command then goes on" in err
    assert len(file.read_bytes()) == len(whole) // 2
    assert capture(tmp_path, models, output_path=file).read_bytes() == whole
