"""A teacher with another tokenizer, compared by spans of text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from tiny_models import EVALUATED, episodes, evaluation_rows, run, training_rows
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from recipes import evaluate, on_policy_distillation
from recipes.cli import parse_config, run_cli

TEMPLATE = """{%- for m in messages -%}{{- '<|' + m.role + '|>' + m.content + 'END' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"""
PAIRS = [(str(a), str(b)) for a in range(10) for b in range(10)]  # as one token each


def tokenizer(end: str, merges: list[tuple[str, str]], alphabet: Any) -> Any:
    vocab = {piece: i for i, piece in enumerate([*alphabet, *("".join(merge) for merge in merges)])}
    backend = Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    controls = ["<|user|>", "<|assistant|>", "<|system|>", end]
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in controls])
    made: Any = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end)
    made.chat_template = TEMPLATE.replace("END", end)
    return made


@pytest.fixture(scope="module")
def pair(made: Path) -> dict[str, str]:
    few = [*"0123456789=+;", "Ã", "©"]  # so that an untrained student says text; of "é" the two halves
    every = sorted(pre_tokenizers.ByteLevel.alphabet())
    student = tiny_models.make_model(made / "digits", seed=1, tokenizer=tokenizer("<|end|>", [], few))
    teacher = tiny_models.make_model(made / "pairs", seed=2, hidden=24, tokenizer=tokenizer("<|stop|>", PAIRS, every))
    return {"model_name": student, "teacher_model": teacher}


BYTES = {"objective": "reverse_kl", "teacher_alignment": "bytes"}


def test_a_run_is_judged_by_what_the_text_is_worth_to_the_teacher(tmp_path: Path, pair: dict[str, str]):
    path = run(tmp_path / "run", pair, **BYTES, **EVALUATED, groups_per_batch=8, group_size=2)
    teacher: Any = AutoModelForCausalLM.from_pretrained(pair["teacher_model"], attn_implementation="eager")
    theirs: Any = AutoTokenizer.from_pretrained(pair["teacher_model"])
    whole = 0
    for row in episodes(path, 1):
        sampled = [i for i, mask in enumerate(row["sampled"]) if mask]
        scores = [row["teacher_logprobs"][i] for i in sampled]
        text = "".join(row["tokens"][i] for i in sampled)
        if None in scores or "<|" in text.removesuffix("<|end|>"):
            continue  # half a letter, or a control token in the midst of text
        whole += 1
        answer = theirs.encode(text.removesuffix("<|end|>"), add_special_tokens=False)
        answer += [theirs.eos_token_id] * text.endswith("<|end|>")
        prompt = theirs.apply_chat_template(row["messages"], add_generation_prompt=True, return_dict=False)
        with torch.no_grad():
            logprobs = teacher(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
        expected = sum(float(logprobs[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))
        assert sum(scores) == pytest.approx(expected, abs=1e-3)
    assert whole >= 3
    for row in training_rows(path):
        assert row["grad_norm"] > 0 and np.isfinite(row["kl"]) and 0 <= row["unscored"] < 0.7
        # of episodes without any span
        assert row["dropped_fraction"] == row.get("dropped/unaligned", 0.0)
    before, after = evaluation_rows(path)
    assert "eval/reverse_kl" in before and "eval/exact_reverse_kl" not in after


@pytest.mark.slow
def test_the_student_becomes_like_its_teacher(tmp_path: Path, pair: dict[str, str]):
    options = {"max_steps": 60, "groups_per_batch": 32, "eval_size": 64, "learning_rate": 5e-3}
    before, after = evaluation_rows(run(tmp_path / "run", pair, **BYTES, **options))
    assert after["eval/reverse_kl"] < 0.8 * before["eval/reverse_kl"]


def test_an_evaluation_compares_spans_too(tmp_path: Path, pair: dict[str, str], capsys: pytest.CaptureFixture[str]):
    argv = [f"{key}={value}" for key, value in {**pair, "eval_size": 8, "max_tokens": 6, "device": "cpu"}.items()]
    evaluate.main(parse_config(evaluate.Config, [*argv, "teacher_alignment=bytes"], presets=evaluate.presets))
    out = capsys.readouterr().out
    assert "reverse_kl " in out and "exact_reverse_kl" not in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "reverse_kl"}, "objective=reverse_kl teacher_alignment=bytes"),
        ({"objective": "jsd", "teacher_alignment": "bytes"}, "teacher_alignment=bytes: a teacher of another tokenizer"),
        ({"objective": "topk_forward_kl", "teacher_alignment": "bytes"}, "Use objective=reverse_kl"),
        ({"objective": "jsd", "support": "sampled", "teacher_alignment": "bytes"}, "Use objective=reverse_kl"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_what_can(
    options: dict[str, Any], message: str, tmp_path: Path, pair: dict[str, str], capsys: pytest.CaptureFixture[str]
):
    recipe = on_policy_distillation
    with pytest.raises(SystemExit) as exit:
        argv = tiny_models.argv(tmp_path / "run", pair, **options)
        run_cli(recipe.main, recipe.Config, presets=recipe.presets, argv=argv)
    assert exit.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_how_finely_the_text_is_compared(
    tmp_path: Path, pair: dict[str, str], capsys: pytest.CaptureFixture[str]
):
    run(tmp_path / "run", pair, **BYTES, dry_run=True)
    out = capsys.readouterr().out
    assert "end of turn: '<|end|>' is read as '<|stop|>'" in out and "it has another tokenizer: a probe of " in out
