"""Given answers in an on-policy run: how many, which, how they are measured, and that sampling rests without them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tiny_models
import torch
from tiny_models import episodes, final, fingerprint, training_rows, weights

from models.transformers_sampler import TransformersSampler
from recipes import capture_teacher, offline_distillation, on_policy_distillation, replay
from recipes.cli import parse_config, run_cli

Models = dict[str, str]
TOPK: dict[str, Any] = {"objective": "topk_forward_kl", "top_k": 4, "eval_size": 0}


def given(episode: dict[str, Any]) -> bool:
    return all(x is None for x in episode["sampler_logprobs"])


def test_at_0_nothing_is_sampled_and_it_is_training_from_a_capture_bit_by_bit(tmp_path: Path, models: Models):
    rows = {"dataset": "arithmetic", "max_rows": 12}  # whose answers take up to 24 tokens
    with mock.patch.object(TransformersSampler, "sample", side_effect=AssertionError("woken")):
        live = tiny_models.run(tmp_path / "live", models, lmbda=0.0, max_tokens=24, **TOPK, **rows)
    file = tmp_path / "said.capture.jsonl"
    options = {**models, **rows, "top_k": 4, "output_path": file, "device": "cpu"}
    capture_teacher.main(parse_config(capture_teacher.Config, [f"{k}={v}" for k, v in options.items()]))
    options = {
        "model_name": models["model_name"], "capture_path": file, "log_path": tmp_path / "offline", "device": "cpu",
        **{k: tiny_models.SMALL[k] for k in ("groups_per_batch", "max_steps", "learning_rate", "save_every")},
    }  # fmt: skip
    with tiny_models.no_report():
        offline_distillation.main(parse_config(offline_distillation.Config, [f"{k}={v}" for k, v in options.items()]))
    ours, theirs = weights(final(live)), weights(final(tmp_path / "offline"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    for row in training_rows(live):
        assert row["on_policy_fraction"] == 0 and row["given/kl"] == row["kl"]
        assert "on_policy/kl" not in row and "ratio/mean" not in row


def test_between_0_and_1_groups_are_of_both_kinds_and_a_stopped_run_draws_the_same(tmp_path: Path, models: Models):
    options = {**TOPK, "lmbda": 0.5, "groups_per_batch": 6, "group_size": 2, "eval_every": 0}
    whole = tiny_models.run(tmp_path / "whole", models, max_steps=3, **options)
    kinds = []
    for step, row in enumerate(training_rows(whole), 1):
        found = episodes(whole, step)
        by_row = {e["row_id"]: [given(f) for f in found if f["row_id"] == e["row_id"]] for e in found}
        assert all(of in ([True], [False, False]) for of in by_row.values())  # an answer once, attempts twice
        kinds.append([True in of for of in by_row.values()])
        assert row["on_policy_fraction"] == pytest.approx(1 - sum(kinds[-1]) / 6)
        tokens = {kind: sum(sum(e["sampled"]) for e in found if given(e) == kind) for kind in (True, False)}
        total = tokens[True] * row.get("given/kl", 0) + tokens[False] * row.get("on_policy/kl", 0)
        assert row["kl"] == pytest.approx(total / sum(tokens.values()))
        assert row["ratio/mean"] == pytest.approx(1, abs=1e-3)  # of what was sampled alone
    assert len({tuple(k) for k in kinds}) > 1 and {True, False} <= {k for of in kinds for k in of}
    stopped = tiny_models.run(tmp_path / "stopped", models, max_steps=1, **options)
    tiny_models.run(tmp_path / "stopped", models, max_steps=3, **options)
    assert fingerprint(stopped)["weights"] == fingerprint(whole)["weights"]
    assert fingerprint(stopped)["episodes"] == fingerprint(whole)["episodes"]
    with tiny_models.no_report():
        arguments = {**models, "saved": whole, "log_path": tmp_path / "again", "device": "cpu", "learning_rate": 1e-2}
        arguments |= {"objective": "topk_forward_kl", "top_k": 4}
        replay.main(parse_config(replay.Config, [f"{k}={v}" for k, v in arguments.items()]))
    assert [given(e) for e in episodes(tmp_path / "again", 1)] == [given(e) for e in episodes(whole, 1)]


def test_classic_distillation_of_given_answers_with_a_whole_distribution(tmp_path: Path, models: Models):
    options = {"objective": "kd", "alpha": 0.25, "loss_temperature": 2.0, "eval_size": 0, "max_tokens": 24}
    path = tiny_models.run(tmp_path / "run", models, lmbda=0.0, **options)
    for row in training_rows(path):
        assert row["loss"] == pytest.approx(0.75 * row["nll"] + 0.25 * 4 * row["forward_kl"], rel=1e-4)


def test_a_given_answer_is_cut_where_an_attempt_would_be(tmp_path: Path, models: Models):
    file = tmp_path / "long.jsonl"
    row = {"messages": [{"role": "user", "content": "1+2="}], "completion": "3" * 30}
    file.write_text(json.dumps(row) + "\n")
    path = tiny_models.run(
        tmp_path / "run", models, **TOPK, dataset=file, lmbda=0.0, groups_per_batch=1, max_tokens=7, max_steps=1
    )
    (episode,) = episodes(path, 1)
    assert sum(episode["sampled"]) == 7 and episode["stop_reason"] == "max_tokens"


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"objective": "reverse_kl", "lmbda": 0.5}, ("lmbda=0.5", "objective=jsd or objective=topk_forward_kl")),
        ({"objective": "kd"}, ("objective=kd", "set lmbda=0")),
        ({"objective": "kd", "lmbda": 0.0, "beta": 0.5}, ("objective=kd has no beta",)),
        ({"objective": "reverse_kl", "loss_temperature": 2.0}, ("has no loss_temperature", "objective=jsd")),
        ({"objective": "jsd", "lmbda": 1.5}, ("lmbda=1.5: expected a probability",)),
        ({"objective": "jsd", "lmbda": 0.5}, ("rows.jsonl:2): has no completion", "set lmbda=1")),
    ],
)
def test_what_cannot_be_is_named_before_anything_is_loaded(
    options: dict[str, Any], parts: tuple[str, ...], tmp_path: Path, models: Models, capfd: pytest.CaptureFixture[str]
):
    asking = {"messages": [{"role": "user", "content": "1+2="}]}
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ({**asking, "completion": "3"}, asking)))
    recipe = on_policy_distillation
    arguments = tiny_models.argv(tmp_path / "run", models, dataset=file, eval_size=0, **options)
    with pytest.raises(SystemExit) as exit:
        run_cli(recipe.main, recipe.Config, presets=recipe.presets, argv=arguments)
    err = capfd.readouterr().err
    assert exit.value.code == 2 and all(part in err for part in parts), err
    assert not (tmp_path / "run").exists()


def test_the_given_answers_alone_while_the_teacher_only_measures(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, models: Models
):
    rows: dict[str, Any] = {"dataset": "arithmetic", "max_rows": 12, "max_tokens": 24, "eval_size": 4}
    with mock.patch.object(TransformersSampler, "sample", side_effect=AssertionError("woken")):
        path = tiny_models.run(
            tmp_path / "sft", models, objective="sft", lmbda=0.0, max_steps=6, **{**rows, "eval_size": 0}
        )
    first, *_, last = training_rows(path)
    assert last["nll"] < first["nll"] and first["loss"] == pytest.approx(first["nll"]) and "kl" not in first
    measured = tiny_models.run(tmp_path / "measured", models, objective="sft", lmbda=0.0, max_steps=1, **rows)
    assert all(row["eval/exact_reverse_kl"] > 0 for row in tiny_models.evaluation_rows(measured))
    with pytest.raises(SystemExit):
        argv = tiny_models.argv(tmp_path / "no", models, objective="sft")
        run_cli(on_policy_distillation.main, on_policy_distillation.Config, argv=argv)
    assert "objective=sft learns from given answers" in capfd.readouterr().err
