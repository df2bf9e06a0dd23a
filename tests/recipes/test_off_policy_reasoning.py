"""Learning from given answers: what is trained on, what is measured, and what is refused."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from tiny_models import episodes, evaluation_rows, final, fingerprint, training_rows, weights
from transformers import AutoModelForCausalLM

from envs.given import GivenEpisode
from envs.types import StopReason, Turn
from recipes import off_policy_reasoning as recipe
from recipes.cli import parse_config, run_cli
from recipes.embedded import char_tokenizer

BASE: dict[str, Any] = {
    "dataset": "arithmetic", "max_rows": 12, "eval_size": 3, "batch_size": 4, "max_steps": 2, "max_tokens": 6,
    "max_length": 64, "learning_rate": 1e-2, "eval_every": 0, "save_every": 0, "device": "cpu", "sampler_slots": 4,
    "micro_batch_tokens": 64,
}  # fmt: skip


def argv(path: Path, student: str, **options: Any) -> list[str]:
    given = {**BASE, "model_name": student, "log_path": path, **options}
    return [f"{key}={value}" for key, value in given.items()]


def run(path: Path, student: str, **options: Any) -> Path:
    with tiny_models.no_report():
        recipe.main(parse_config(recipe.Config, argv(path, student, **options), presets=recipe.presets))
    return path


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def asking(text: str, **keys: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **keys}


def plain_loss(folder: str, rows: list[dict[str, Any]]) -> float:
    """transformers' own cross-entropy of the trained tokens of these episodes, per token."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    losses: list[float] = []
    for row in rows:
        with torch.no_grad():
            logprobs = model(torch.tensor([row["token_ids"]])).logits[0].log_softmax(-1)
        losses += [-float(logprobs[i - 1, t]) for i, t in enumerate(row["token_ids"]) if row["sampled"][i]]
    return float(np.mean(losses))


def test_an_answer_is_written_in_the_student_s_format_and_its_end_is_trained_on(tmp_path: Path, student: str):
    rows = [asking(f"{n}+{n}=", completion=f"{2 * n}") for n in range(10, 18)]
    path = run(tmp_path / "run", student, dataset=write(tmp_path / "answers.jsonl", *rows), max_steps=1, eval_size=0)
    found = episodes(path, 1)
    assert len(found) == 4
    tokenizer: Any = char_tokenizer()
    for row in found:
        answer = {"role": "assistant", "content": str(2 * int(row["messages"][0]["content"].partition("+")[0]))}
        prompt = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True)["input_ids"]
        assert row["token_ids"] == tokenizer.apply_chat_template([*row["messages"], answer])["input_ids"]
        assert row["sampled"] == [i >= len(prompt) for i in range(len(row["token_ids"]))]
        assert row["token_ids"][-1] == tokenizer.eos_token_id
        assert row["sampler_logprobs"] == [None] * len(row["token_ids"])  # nobody sampled it
    (step,) = training_rows(path)
    assert step["loss"] == step["nll"] == pytest.approx(plain_loss(student, found), abs=1e-4)
    assert step["trained_tokens"] == 4 * 3 and "kl" not in step and "ratio/mean" not in step


@pytest.mark.parametrize("rank", [0, 2])
def test_the_student_learns_and_what_it_learnt_is_measured(rank: int, tmp_path: Path, student: str):
    path = run(tmp_path / "run", student, max_steps=12, lora_rank=rank, eval_every=6)
    before, _, after = evaluation_rows(path)
    assert after["eval/nll"] < before["eval/nll"] - 0.2
    assert after["eval/nll_se"] > 0 and 0 <= after["eval/accuracy"] <= 1 and "eval/length" not in after
    assert any(value.any() for value in weights(final(path)).values())
    assert [row["step"] for row in training_rows(path)] == list(range(1, 13))


def test_a_long_answer_is_cut_off_and_counted(tmp_path: Path, student: str):
    rows = [asking("1+2=", completion="3" * n) for n in (2, 30)]
    path = run(
        tmp_path / "run", student, dataset=write(tmp_path / "a.jsonl", *rows), max_length=20, batch_size=2,
        max_steps=1, eval_size=0,
    )  # fmt: skip
    found = {row["row_id"]: row for row in episodes(path, 1)}
    assert found["a:1"]["stop_reason"] == "completed" and found["a:2"]["stop_reason"] == "max_tokens"
    assert len(found["a:2"]["token_ids"]) == 20 and found["a:2"]["tokens"][-1] == "3"
    assert training_rows(path)[0]["truncated_fraction"] == 0.5


def test_openthoughts3_as_it_is_upstream(tmp_path: Path, student: str):
    turns = [{"from": "human", "value": "1+2="}, {"from": "gpt", "value": "<think>1,2</think>3"}]
    records = [{"conversations": turns, "domain": "math"}, {"conversations": turns[:1], "domain": "math"}]
    path = run(
        tmp_path / "run", student, dataset="openthoughts3", dataset_path=write(tmp_path / "part.jsonl", *records),
        batch_size=1, max_steps=1, eval_size=0, lora_rank=0,
    )  # fmt: skip
    (row,) = episodes(path, 1)
    assert row["messages"][0]["content"] == "1+2=" and row["dataset"] == "openthoughts3"
    assert row["tokens"][-2:] == ["3", "<|end|>"]


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_it_never_was(tmp_path: Path, student: str):
    options = {"max_steps": 6, "save_every": 2, "keep_checkpoints": 0, "eval_every": 3}
    whole = run(tmp_path / "whole", student, **options)
    path = tmp_path / "run"
    arguments = argv(path, student, **options)
    process = tiny_models.start(arguments, tmp_path / "output", recipe="off_policy_reasoning")
    metrics = path / "metrics.jsonl"
    while process.exitcode is None and (not metrics.exists() or metrics.read_bytes().count(b"\n") < 4):
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -9
    process = tiny_models.start(arguments, tmp_path / "output", recipe="off_policy_reasoning")
    assert tiny_models.finish(process) == 0, (tmp_path / "output").read_text()
    assert fingerprint(path) == fingerprint(whole)


def test_a_dry_run_shows_what_is_learnt_and_writes_nothing(
    tmp_path: Path, student: str, capsys: pytest.CaptureFixture[str]
):
    run(tmp_path / "run", student, dry_run=True)
    out = capsys.readouterr().out
    assert "tokens of the given answer" in out and "<|user|>" in out and "teachers" not in out
    assert not (tmp_path / "run").exists()


# --- mistakes


def refused(capfd: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str]) -> str:
    before = sorted(tmp_path.rglob("*"))
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit:
        run_cli(recipe.main, recipe.Config, presets=recipe.presets, argv=arguments)
    err = capfd.readouterr().err
    assert exit.value.code == 2 and err.count("error:") == 1, err
    assert sorted(tmp_path.rglob("*")) == before
    return err


def test_rows_that_cannot_be_learnt_from_are_named(capfd: pytest.CaptureFixture[str], tmp_path: Path, student: str):
    answered = asking("1+2=", completion="3")
    file = write(tmp_path / "a.jsonl", answered, asking("1+1="))
    err = refused(capfd, tmp_path, argv(tmp_path / "run", student, dataset=file, eval_size=0))
    assert f"a:2 ({file}:2): has no completion" in err
    file = write(tmp_path / "a.jsonl", answered, asking("1+" * 20, completion="3"))
    err = refused(capfd, tmp_path, argv(tmp_path / "run", student, dataset=file, eval_size=0, max_length=20))
    assert f"a:2 ({file}:2): its prompt has 43 tokens, the longest allowed is 19 (max_length=20). Shorten" in err
    file = write(tmp_path / "a.jsonl", answered, asking("1+" * 80, completion="3"))
    err = refused(capfd, tmp_path, argv(tmp_path / "run", student, dataset=file, eval_size=0, max_length=500))
    assert "the longest allowed is 127 (the models' context is 128 tokens)" in err
    assert err.endswith("Shorten it, or set long_prompts=drop\n") and "max_tokens" not in err


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"dataset": "openthoughts"}, "did you mean 'openthoughts3'?"),
        ({"batch_size": 0}, "batch_size=0: expected 1 or more"),
        ({"max_length": 1}, "max_length=1: expected 2 or more"),
        ({"max_tokens": 500}, "max_tokens=500: the student's context is 128 tokens"),
        ({"teacher_model": "x"}, "unknown option teacher_model"),
        ({"temperature": 2}, "unknown option temperature"),
    ],
)
def test_options_that_make_no_sense(
    options: dict[str, Any], part: str, capfd: pytest.CaptureFixture[str], tmp_path: Path, student: str
):
    assert part in refused(capfd, tmp_path, argv(tmp_path / "run", student, **options))


def test_a_given_episode_has_no_sampler_logprobs():
    with pytest.raises(ValueError, match="no sampler logprobs"):
        GivenEpisode(
            dataset="d", row_id="r", teacher="given", prompt_messages=(), teacher_messages=None,
            token_ids=np.array([1, 2], dtype=np.int32), sampled=np.array([False, True]),
            sampler_logprobs=np.array([np.nan, -0.5], dtype=np.float32), turns=(Turn(1, 2),),
            stop_reason=StopReason.COMPLETED,
        )  # fmt: skip
