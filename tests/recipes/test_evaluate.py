"""`python -m recipes.evaluate`: the numbers that a training run would report, for any one model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models

from recipes import evaluate
from recipes.cli import parse_config, run_cli

Models = dict[str, str]
SMALL = {"dataset": "arithmetic", "eval_size": 8, "max_tokens": 6, "device": "cpu", "sampler_slots": 8}


def argv(**options: Any) -> list[str]:
    return [f"{key}={value}" for key, value in {**SMALL, **options}.items()]


def numbers(tmp_path: Path, **options: Any) -> dict[str, Any]:
    file = tmp_path / "numbers.json"
    evaluate.main(parse_config(evaluate.Config, argv(output_path=file, **options)))
    return json.loads(file.read_text())


def refused(capfd: pytest.CaptureFixture[str], given: list[str]) -> str:
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit:
        run_cli(evaluate.main, evaluate.Config, argv=given)
    err = capfd.readouterr().err
    assert exit.value.code == 2 and err.count("error:") == 1 and "Traceback" not in err, err
    return err


def test_one_model_alone(tmp_path: Path, student: str, capsys: pytest.CaptureFixture[str]):
    found = numbers(tmp_path, model_name=student)
    assert {"eval/accuracy", "eval/accuracy_se", "eval/sampled_accuracy", "eval/truncated_fraction"} <= found.keys()
    assert not any("kl" in name for name in found if name.startswith("eval/"))
    assert found["model_name"] == student and found["eval_size"] == 8
    out = capsys.readouterr().out
    for name in ("accuracy", "length"):
        line = next(line for line in out.splitlines() if line.startswith(f"{name} "))
        assert f"{found[f'eval/{name}']:.4f}" in line and ("±" in line) == (name == "accuracy")
    assert numbers(tmp_path, model_name=student) == found  # a seed gives the same numbers again
    assert numbers(tmp_path, model_name=student, seed=1)["eval/length"] != found["eval/length"]


def test_greedy_only(tmp_path: Path, student: str):
    found = numbers(tmp_path, model_name=student, samples=0)
    assert "eval/accuracy" in found and "eval/sampled_accuracy" not in found


def test_of_one_row_there_is_no_error_and_any_json_reader_takes_the_numbers(tmp_path: Path, student: str):
    assert numbers(tmp_path, model_name=student, eval_size=1)["eval/accuracy_se"] is None  # and no bare NaN


def test_the_kl_to_a_teacher_of_a_checkpoint_and_of_an_adapter(tmp_path: Path, models: Models):
    identical = numbers(tmp_path, model_name=models["teacher_model"], teacher_model=models["teacher_model"])
    assert abs(identical["eval/exact_reverse_kl"]) < 1e-6 and abs(identical["eval/reverse_kl"]) < 1e-6
    start = numbers(tmp_path, **models)["eval/exact_reverse_kl"]
    for rank in (0, 2):
        quick = {"max_steps": 3, "learning_rate": 4e-2}
        path = tiny_models.run(tmp_path / f"rank{rank}", models, lora_rank=rank, **quick)
        checkpoint = tiny_models.final(path)
        given = {"load_checkpoint_path": checkpoint} if rank else {"model_name": checkpoint}
        found = numbers(tmp_path, **{**models, **given})
        assert found["eval/exact_reverse_kl"] < 0.9 * start
        as_teacher = {"model_name": models["model_name"], "teacher_model": models["model_name"]}
        back = numbers(tmp_path, **as_teacher, teacher_checkpoint=checkpoint, load_checkpoint_path=checkpoint)
        assert abs(back["eval/exact_reverse_kl"]) < 1e-6


def test_a_teacher_that_is_told_more_is_another_teacher(tmp_path: Path, models: Models):
    both = {"model_name": models["teacher_model"], "teacher_model": models["teacher_model"]}
    assert numbers(tmp_path, **both, teacher_system_prompt="1+1=2")["eval/exact_reverse_kl"] > 1e-3


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"eval_size": 0}, "eval_size=0"),
        ({"temperature": 0}, "temperature=0"),
        ({"sample": 1}, "Did you mean samples?"),
        ({"dataset": "gsm8"}, "did you mean 'gsm8k'?"),
        ({"teacher_checkpoint": "x"}, "teacher_checkpoint needs teacher_model"),
        ({"teacher_system_prompt": "x"}, "teacher_system_prompt needs teacher_model"),
        ({"teacher_chat_template_kwargs": "{}"}, "teacher_chat_template_kwargs needs teacher_model"),
        ({"teacher_model": "x", "samples": 0}, "samples=0"),
        ({"samples": -1}, "samples=-1: expected 0 or more"),
        ({"output_path": "/no/such/folder/x.json"}, "its folder does not exist"),
        ({"output_path": "/proc"}, "is a folder"),
        ({"output_path": "/proc/x.json"}, "output_path=/proc/x.json: cannot be written"),
        ({"max_tokens": 500}, "max_tokens=500"),
    ],
)
def test_mistakes(options: dict[str, Any], part: str, student: str, capfd: pytest.CaptureFixture[str]):
    assert part in refused(capfd, argv(model_name=student, **options))


def test_a_model_is_required(capfd: pytest.CaptureFixture[str]):
    assert "missing: model_name" in refused(capfd, ["dataset=arithmetic"])
