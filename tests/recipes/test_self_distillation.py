"""The student as its own teacher: its base, or the moving average of its weights."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from tiny_models import episodes, final, fingerprint, run, training_rows, weights
from transformers import AutoModelForCausalLM

from errors import ConfigError
from recipes import capture_teacher, evaluate
from recipes import on_policy_distillation as recipe
from recipes.cli import parse_config, run_cli
from recipes.embedded import char_tokenizer

HOW = {"full": {}, "lora": {"lora_rank": 2, "learning_rate": 3e-2}}


@pytest.fixture(scope="module")
def hinted(made: Path) -> str:
    """Rows whose teacher is told the answer."""
    file = made / "hinted.jsonl"
    pairs = [(a, b) for a in range(10, 20) for b in (13, 24)]
    rows = [
        {
            "messages": [{"role": "user", "content": f"{a}+{b}="}],
            "teacher_messages": [{"role": "user", "content": f"{a + b};{a}+{b}="}],
        }
        for a, b in pairs
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def options(student: str, hinted: str, **more: Any) -> dict[str, Any]:
    given = {"model_name": student, "teacher_model": "ema", "dataset": hinted, "max_rows": "None", "eval_size": 0}
    return {**given, "objective": "jsd", "keep_checkpoints": 0, **more}


def averages(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "trainer_state" / "average.safetensors")


def trained(checkpoint: Path, how: str) -> dict[str, torch.Tensor]:
    """A checkpoint's weights, by the names that the average has."""
    found = weights(checkpoint)
    return {name.replace(".weight", ".default.weight"): w for name, w in found.items()} if how == "lora" else found


@pytest.mark.parametrize("how", HOW)
def test_the_teacher_is_the_average_of_every_step(how: str, tmp_path: Path, student: str, hinted: str):
    given = options(student, hinted, max_steps=3, save_every=1, num_substeps=2, teacher_ema_decay=0.8, **HOW[how])
    with tiny_models.captured_engines() as engines:
        path = run(tmp_path / "run", {}, **given)
    (parts,) = engines
    assert (parts.teacher_lms["ema"].model is parts.learner.lm.model) == (how == "lora")
    steps = sorted((path / "checkpoints").iterdir())
    assert len(steps) == 3
    # at the start the average is the student: of LoRA's first factor only the second step tells
    first = trained(steps[0], how)
    start = (
        load_file(Path(student, "model.safetensors"))
        if how == "full"
        else {name: (averages(steps[0])[name] - 0.2 * first[name]) / 0.8 for name in first}
    )
    expected = {name: w.double() for name, w in start.items()}
    for step in steps:
        now = trained(step, how)
        expected = {name: 0.8 * w + 0.2 * now[name].double() for name, w in expected.items()}
        found = averages(step)
        assert found.keys() == expected.keys()
        for name, w in expected.items():
            torch.testing.assert_close(found[name].double(), w, atol=1e-6, rtol=1e-6)
    assert any(not torch.equal(averages(steps[-1])[name], w) for name, w in trained(steps[-1], how).items())


def test_it_reads_the_privileged_prompt_with_the_average_s_weights(tmp_path: Path, student: str, hinted: str):
    path = run(tmp_path / "run", {}, **options(student, hinted, max_steps=2, save_every=1, teacher_ema_decay=0.5))
    assert all(row["grad_norm"] > 1e-3 for row in training_rows(path))  # the hint makes the difference
    model: Any = AutoModelForCausalLM.from_pretrained(student, attn_implementation="eager")
    model.load_state_dict(averages(sorted((path / "checkpoints").iterdir())[0]))
    tokenizer: Any = char_tokenizer()
    for row in episodes(path, 2):
        a, b = row["messages"][0]["content"].rstrip("=").split("+")
        hint = [{"role": "user", "content": f"{int(a) + int(b)};{a}+{b}="}]
        prompt = tokenizer.apply_chat_template(hint, add_generation_prompt=True)["input_ids"]
        answer = [i for i, sampled in zip(row["token_ids"], row["sampled"], strict=True) if sampled]
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
        expected = [float(logprobs[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)]
        assert [x for x in row["teacher_logprobs"] if x is not None] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("how", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_decay_0_is_the_student_of_the_last_step(how: str, tmp_path: Path, student: str, models: dict[str, str]):
    """Without a hint it has nothing to say; the average is the student, bit for bit."""
    given = {"model_name": student, "teacher_model": "ema", "teacher_ema_decay": 0, "max_steps": 2, "save_every": 1}
    path = run(tmp_path / "run", {}, weight_decay=1.0, keep_checkpoints=0, **given, **HOW[how])
    assert all(abs(row["exact_kl"]) < 1e-6 for row in training_rows(path))
    for step in (path / "checkpoints").iterdir():
        assert averages(step).keys() == trained(step, how).keys()
        assert all(torch.equal(averages(step)[name], w) for name, w in trained(step, how).items())
    # it has moved, by weight decay alone
    assert not torch.equal(*(next(iter(trained(step, how).values())) for step in (path / "checkpoints").iterdir()))


@pytest.mark.parametrize("how", [pytest.param("full", marks=pytest.mark.slow), "lora"])
def test_a_run_goes_on_with_the_average_that_it_had(how: str, tmp_path: Path, student: str, hinted: str):
    given = options(student, hinted, **HOW[how])
    whole = run(tmp_path / "whole", {}, **given, max_steps=3, save_every=2)
    path = run(tmp_path / "run", {}, **given, max_steps=2)
    run(path, {}, **given, max_steps=3, save_every=2)
    assert fingerprint(path)["average"]
    a, b = fingerprint(path), fingerprint(whole)
    assert all(a[part] == b[part] for part in ("weights", "optimizer", "average", "episodes"))


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_a_killed_run_goes_on_as_if_it_never_was(how: str, tmp_path: Path, student: str, hinted: str):
    given = options(student, hinted, **HOW[how], max_steps=6, save_every=2, num_substeps=2)
    whole = run(tmp_path / "whole", {}, **given)
    path = tmp_path / "run"
    arguments = tiny_models.argv(path, {}, **given)
    for rows in (3, 5):
        process = tiny_models.start(arguments, tmp_path / "output")
        metrics = path / "metrics.jsonl"
        while process.exitcode is None and (not metrics.exists() or metrics.read_bytes().count(b"\n") < rows):
            time.sleep(0.002)
        process.kill()
        process.join()
        assert process.exitcode == -9
    process = tiny_models.start(arguments, tmp_path / "output")
    assert tiny_models.finish(process) == 0, (tmp_path / "output").read_text()
    assert fingerprint(path) == fingerprint(whole)


def test_a_full_student_s_base_is_a_copy_that_stays(tmp_path: Path, student: str, hinted: str):
    with tiny_models.captured_engines() as engines:
        path = run(tmp_path / "run", {}, **options(student, hinted, teacher_model=student))
    (parts,) = engines
    teacher = parts.teacher_lms[student].model
    assert teacher is not parts.learner.lm.model
    start = load_file(Path(student, "model.safetensors"))
    assert all(torch.equal(value, start[key]) for key, value in teacher.state_dict().items())
    assert all(not torch.equal(value, start[key]) for key, value in weights(final(path)).items())


def test_a_dry_run_says_what_the_average_takes(
    tmp_path: Path, student: str, hinted: str, capsys: pytest.CaptureFixture[str]
):
    run(tmp_path / "run", {}, **options(student, hinted, dry_run=True))
    assert "teacher: a copy of the student's weights, " in capsys.readouterr().out
    run(tmp_path / "run", {}, **options(student, hinted, dry_run=True, lora_rank=2))
    assert "teacher: a second adapter on the student's base weights, " in capsys.readouterr().out


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "1": ({"teacher_ema_decay": 1}, "teacher_ema_decay=1.0: expected 0 or more, and less than 1"),
    "below 0": ({"teacher_ema_decay": -0.1}, "teacher_ema_decay=-0.1: expected 0 or more"),
    "another teacher": (
        {"teacher_ema_decay": 0.9, "teacher_model": "x"},
        "teacher_ema_decay=0.9 is for a teacher that is the student's average: set teacher_model=ema",
    ),
    "a checkpoint": ({"teacher_checkpoint": "x"}, "teacher_checkpoint=x: teacher_model=ema is the student's average"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_named(case: str, tmp_path: Path, student: str, hinted: str, capsys: pytest.CaptureFixture[str]):
    more, message = MISTAKES[case]
    with pytest.raises(SystemExit) as exit:
        argv = tiny_models.argv(tmp_path / "run", {}, **options(student, hinted, **more))
        run_cli(recipe.main, recipe.Config, presets=recipe.presets, argv=argv)
    assert exit.value.code == 2 and message in capsys.readouterr().err


def test_nothing_has_an_average_where_nothing_is_trained(student: str):
    for module in (evaluate, capture_teacher):
        with pytest.raises(ConfigError, match="teacher_model=ema is the average of a student in training"):
            parse_config(module.Config, [f"model_name={student}", "teacher_model=ema"], presets=module.presets)
