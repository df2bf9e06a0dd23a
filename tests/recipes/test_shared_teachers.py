"""Adapters as teachers share one base, and nothing of the student's changes for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import tiny_models
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import episodes, final, training_rows, weights
from transformers import AutoModelForCausalLM

from models.adapters import adapter_bytes
from models.sources import ModelSource
from recipes import engines, teacher_checks
from recipes import on_policy_multi_teacher as recipe
from recipes.cli import parse_config


def make_adapter(folder: Path, base: str, *, seed: int, targets: Any = ("q_proj", "down_proj"), **options: Any) -> str:
    """A saved adapter that changes its base."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(r=3, target_modules=list(targets), init_lora_weights=False, **options)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)  # type: ignore[arg-type]
        model.save_pretrained(folder, save_embedding_layers=False)
    return str(folder)


@pytest.fixture(scope="module")
def first(made: Path, student: str) -> str:
    return make_adapter(made / "first", student, seed=1)


@pytest.fixture(scope="module")
def second(made: Path, student: str) -> str:
    return make_adapter(made / "second-adapter", student, seed=2, targets=("v_proj", "gate_proj"))


def run(path: Path, student: str, *teachers: tuple[str, str | None], **options: Any) -> Path:
    """One dataset for every teacher."""
    given: dict[str, Any] = {
        "model_name": student, "log_path": path, "max_tokens": 6, "max_steps": 2, "learning_rate": 1e-2,
        "eval_every": 0, "save_every": 0, "device": "cpu", "sampler_slots": 8, "objective": "jsd", **options,
    }  # fmt: skip
    for i, (model, checkpoint) in enumerate(teachers):
        data = {"dataset": "arithmetic", "name": f"data{i}", "max_rows": 8, "groups_per_batch": 2, "eval_size": 0}
        data |= {"teacher_model": model} | ({"teacher_checkpoint": checkpoint} if checkpoint else {})
        given |= {f"datasets.{i}.{key}": value for key, value in data.items()}
    with tiny_models.no_report():
        argv = [f"{key}={value}" for key, value in given.items()]
        recipe.main(parse_config(recipe.Config, argv, presets=recipe.presets))
    return path


def read(base: str, adapter: str | None, ids: list[int], sampled: list[bool]) -> list[float]:
    """Logprobs of the sampled tokens by PEFT's own forward."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return [float(logprobs[i - 1, token]) for i, token in enumerate(ids) if sampled[i]]


def test_a_lora_student_and_its_lora_teachers_are_one_model(tmp_path: Path, student: str, first: str, second: str):
    teachers = (student, first), (student, second), (student, None)
    with tiny_models.captured_engines() as engines:
        path = run(tmp_path / "run", student, *teachers, lora_rank=2)
    (parts,) = engines
    assert {id(lm.model) for lm in parts.teacher_lms.values()} == {id(parts.learner.lm.model)}
    for row in episodes(path, 1):
        adapter = {first: first, second: second, student: None}[row["teacher"]]
        expected = read(student, adapter, row["token_ids"], row["sampled"])
        assert [x for x in row["teacher_logprobs"] if x is not None] == pytest.approx(expected, abs=1e-4)
    trained = {name for name, p in parts.learner.lm.model.named_parameters() if p.requires_grad}
    assert trained and all(".default." in name for name in trained)
    assert len(trained) == len(parts.learner.parameters)
    assert not any(p.grad is not None for name, p in parts.learner.lm.model.named_parameters() if name not in trained)
    saved = final(path)
    assert not [folder for folder in saved.iterdir() if folder.is_dir() and folder.name != "trainer_state"]
    assert len(weights(saved)) == len(trained)
    for i, adapter in enumerate((first, second)):  # nothing has changed what the teachers are
        was = weights(Path(adapter))
        now = {
            name.replace(f".teacher{i}.", "."): p
            for name, p in parts.learner.lm.model.named_parameters()
            if f".teacher{i}." in name
        }
        assert now.keys() == was.keys() and all(torch.equal(now[name], was[name]) for name in was)


def test_training_is_the_same_with_a_base_of_the_teacher_s_own(tmp_path: Path, student: str, first: str):
    """But for the rounding of W x + B A x against (W + B A) x."""
    shared = run(tmp_path / "shared", student, (student, first), lora_rank=2)
    with (
        mock.patch.object(teacher_checks, "adapter_bytes", return_value=None),
        tiny_models.captured_engines() as engines,
    ):
        apart = run(tmp_path / "apart", student, (student, first), lora_rank=2)
    assert engines[0].teacher_lms[first].model is not engines[0].learner.lm.model
    assert [e["token_ids"] for e in episodes(shared, 1)] == [e["token_ids"] for e in episodes(apart, 1)]
    assert [e["sampler_logprobs"] for e in episodes(shared, 1)] == [e["sampler_logprobs"] for e in episodes(apart, 1)]
    one, other = weights(final(shared)), weights(final(apart))
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=2e-4, rtol=0)  # of steps of 1e-2
    for a, b in zip(training_rows(shared), training_rows(apart), strict=True):
        assert a["kl"] == pytest.approx(b["kl"], abs=1e-4)


def test_a_teacher_beside_the_student_leaves_its_training_bit_for_bit(
    tmp_path: Path, student: str, teacher: str, first: str
):
    """One more adapter on the student's base, that has read something, and judges nothing."""
    plain = run(tmp_path / "plain", student, (teacher, None), lora_rank=2)
    build = engines.build_engines

    def with_one_more(*arguments: Any) -> Any:
        parts = build(*arguments)
        base = parts.learner.lm
        engines.attach_adapter(base.model, first, "teacher7")
        beside = base.with_adapter("teacher7")
        beside.logits(beside.hidden([torch.arange(1, 9)]))
        return parts

    with mock.patch.object(engines, "build_engines", with_one_more):
        more = run(tmp_path / "more", student, (teacher, None), lora_rank=2)
    one, other = tiny_models.fingerprint(plain), tiny_models.fingerprint(more)
    assert one == other


def test_a_full_student_s_lora_teachers_share_a_base_of_their_own(
    tmp_path: Path, student: str, first: str, second: str, capsys: pytest.CaptureFixture[str]
):
    with tiny_models.captured_engines() as engines:
        path = run(tmp_path / "run", student, (student, first), (student, second), (student, None))
    (parts,) = engines
    assert len({id(lm.model) for lm in parts.teacher_lms.values()}) == 1
    assert parts.teacher_lms[first].model is not parts.learner.lm.model
    assert not any(p.requires_grad for p in parts.teacher_lms[first].model.parameters())
    for row in episodes(path, 2):
        adapter = {first: first, second: second, student: None}[row["teacher"]]
        expected = read(student, adapter, row["token_ids"], row["sampled"])
        assert [x for x in row["teacher_logprobs"] if x is not None] == pytest.approx(expected, abs=1e-4)
    run(tmp_path / "dry", student, (student, first), (student, second), (student, None), dry_run=True)
    out = capsys.readouterr().out
    for part in ("base of 3 teachers: ", f"teacher {first}: an adapter on that base, ", ": shares that base"):
        assert part in out, out


MORE_THAN_THE_TRUNK: list[dict[str, Any]] = [
    {"targets": ("lm_head", "q_proj")},
    {"targets": ("q_proj",), "modules_to_save": ["embed_tokens"]},
    {"targets": ("q_proj", "embed_tokens")},
    {"targets": ("q_proj",), "use_dora": True},
]


def test_an_adapter_of_more_than_the_trunk_is_merged_into_a_copy(tmp_path: Path, student: str, first: str):
    adapters = [make_adapter(tmp_path / f"{i}", student, seed=5, **o) for i, o in enumerate(MORE_THAN_THE_TRUNK)]
    assert [adapter_bytes(ModelSource(student, adapter)) for adapter in adapters] == [None] * 4
    shapes = [tensor.numel() for tensor in weights(Path(first)).values()]
    assert adapter_bytes(ModelSource(student, first)) == 4 * sum(shapes)
    with tiny_models.captured_engines() as engines:
        path = run(tmp_path / "run", student, (student, adapters[0]), lora_rank=2, max_steps=1)
    (parts,) = engines
    assert not isinstance(parts.teacher_lms[adapters[0]].model, PeftModel)
    row = episodes(path, 1)[0]
    expected = read(student, adapters[0], row["token_ids"], row["sampled"])
    assert [x for x in row["teacher_logprobs"] if x is not None] == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_a_run_goes_on_from_a_checkpoint_that_holds_the_student_s_adapter_alone(
    tmp_path: Path, student: str, first: str, second: str
):
    teachers = (student, first), (student, second)
    whole = run(tmp_path / "whole", student, *teachers, lora_rank=2, max_steps=4, save_every=2)
    path = run(tmp_path / "run", student, *teachers, lora_rank=2, max_steps=2)
    run(path, student, *teachers, lora_rank=2, max_steps=4, save_every=2)
    a, b = tiny_models.fingerprint(whole), tiny_models.fingerprint(path)
    assert a["weights"] == b["weights"] and a["optimizer"] == b["optimizer"]
    assert np.isfinite([row["kl"] for row in training_rows(path)]).all()
