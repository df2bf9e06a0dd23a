"""The whole recipe on tiny untrained models: what it learns, records and saves, and that it can be stopped anywhere."""

from __future__ import annotations

import json
import random
import site
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from tiny_models import EVALUATED, episodes, evaluation_rows, final, fingerprint, leftovers, run, training_rows, weights
from transformers import AutoModelForCausalLM

from models import attention
from recipes.embedded import char_tokenizer

Models = dict[str, str]


def plain_logprobs(folder: str, ids: list[int]) -> torch.Tensor:
    """Log-probability of every next token by transformers' own forward. [T, v]"""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].log_softmax(-1)


def of_tokens(logprobs: torch.Tensor, ids: list[int], sampled: list[bool]) -> list[float]:
    return [float(logprobs[i - 1, token]) for i, token in enumerate(ids) if sampled[i]]


# --- what can be trained, and how


VARIANTS: dict[str, dict[str, Any]] = {
    "jsd": {},
    "forward_kl": {"beta": 0},
    "teacher_topk": {"support": "teacher_topk", "beta": 0.5},  # 64 tokens: more than there are
    "student_topk": {"support": "student_topk", "top_k": 3, "tail": "renormalise"},
    "sampled_support": {"support": "sampled", "lora_rank": 2},
    "topk_forward_kl": {"objective": "topk_forward_kl", "top_k": 3, "temperature": 0.8},
    "importance_sampling": {"objective": "reverse_kl", "loss_reduction": "sequence_mean"},
    "ppo_discounted": {"objective": "reverse_kl", "loss_fn": "ppo", "kl_discount_factor": 0.9, "group_size": 2},
    "cispo_substeps": {"objective": "reverse_kl", "loss_fn": "cispo", "num_substeps": 2},
    "clipped": {"objective": "reverse_kl", "loss_fn_config__advantage_clip": 0.5, "kl_penalty_coef": 2.0},
    "lora": {"objective": "reverse_kl", "lora_rank": 2, "temperature": 0.8},
    "lora_checkpointing": {"lora_rank": 2, "activation_checkpointing": True, "group_size": 2},
    "sdpa": {"attn_implementation": "sdpa", "micro_batch_tokens": 16},
    "sdpa_checkpointing": {"attn_implementation": "sdpa", "activation_checkpointing": True},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_way_to_train_moves_the_student_and_leaves_the_teacher(name: str, tmp_path: Path, models: Models):
    with tiny_models.captured_engines() as engines:
        path = run(tmp_path / "run", models, **VARIANTS[name])
    rows = training_rows(path)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["grad_norm"] > 0 and np.isfinite(row["loss"]) for row in rows)
    attempts = 4 * VARIANTS[name].get("group_size", 1)
    assert [row["trained_episodes"] for row in rows] == [attempts, attempts]
    assert len({episode["row_id"] for episode in episodes(path, 1)}) == 4

    saved, start = weights(final(path)), load_file(Path(models["model_name"], "model.safetensors"))
    if "lora_rank" in VARIANTS[name]:
        assert saved and all("lora_" in key for key in saved)
        assert any(value.any() for key, value in saved.items() if "lora_B" in key)  # they start at 0
    else:
        assert saved.keys() == start.keys()
        assert all(not torch.equal(saved[key], start[key]) for key in start)
    (parts,) = engines
    (teacher,) = parts.teacher_lms.values()
    was = load_file(Path(models["teacher_model"], "model.safetensors"))
    assert all(torch.equal(value, was[key]) for key, value in teacher.model.state_dict().items())
    assert not any(p.requires_grad for p in teacher.model.parameters())


def test_mass_captured_by_the_top_k_is_recorded_by_teacher_and_dataset(tmp_path: Path, models: Models):
    row = training_rows(run(tmp_path / "run", models, objective="topk_forward_kl", top_k=3, max_steps=1))[0]
    (total,) = {value for name, value in row.items() if name.endswith("topk_mass")}
    assert row[f"teacher/{models['teacher_model']}/topk_mass"] == row["dataset/arithmetic/topk_mass"] == total
    masses = []
    for episode in episodes(tmp_path / "run", 1):
        top = plain_logprobs(models["teacher_model"], episode["token_ids"]).topk(3)  # [T, 3]
        shared = top.values.exp() * (top.indices < len(char_tokenizer()))  # the teacher's embedding is padded
        masses += [float(shared[i - 1].sum()) for i, sampled in enumerate(episode["sampled"]) if sampled]
    assert total == pytest.approx(sum(masses) / len(masses), abs=1e-4)
    assert row["no_teacher_mass"] < 0.1


def test_lora_on_the_teacher_itself_shares_weights_that_do_not_change(tmp_path: Path, student: str):
    with tiny_models.captured_engines() as engines:
        options = {"model_name": student, "teacher_model": student, "teacher_system_prompt": "add"}
        path = run(tmp_path / "run", options, lora_rank=2, max_steps=3)
    (parts,) = engines
    (teacher,) = parts.teacher_lms.values()
    assert teacher.model is parts.learner.lm.model
    start = load_file(Path(student, "model.safetensors"))
    shared = {
        key.removeprefix("base_model.model.").replace(".base_layer", ""): value
        for key, value in teacher.model.state_dict().items()
        if "lora_" not in key
    }
    assert shared.keys() == start.keys() and all(torch.equal(shared[key], start[key]) for key in start)
    assert any(value.any() for key, value in weights(final(path)).items() if "lora_B" in key)


def test_a_new_adapter_is_its_base(tmp_path: Path, student: str):
    path = run(tmp_path / "run", {"model_name": student, "teacher_model": student}, lora_rank=2, max_steps=3)
    first, *_, last = training_rows(path)
    assert abs(first["exact_kl"]) < 1e-6  # student and teacher are one model
    assert last["grad_norm"] < 1e-6  # and nothing pulls them apart
    for row in episodes(path, 3)[:2]:
        plain = of_tokens(plain_logprobs(student, row["token_ids"]), row["token_ids"], row["sampled"])
        assert [x for x in row["teacher_logprobs"] if x is not None] == pytest.approx(plain, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({}, 0.5),
        pytest.param({"lora_rank": 8}, 0.7, marks=pytest.mark.slow),
        ({"objective": "reverse_kl", "groups_per_batch": 16}, 0.8),
        pytest.param({"objective": "topk_forward_kl", "top_k": 8}, 0.7, marks=pytest.mark.slow),
        pytest.param({"support": "teacher_topk", "top_k": 8, "beta": 0.5}, 0.7, marks=pytest.mark.slow),
        pytest.param({"support": "student_topk", "top_k": 8}, 0.7, marks=pytest.mark.slow),
    ],
)
def test_the_student_becomes_like_its_teacher(options: dict[str, Any], factor: float, tmp_path: Path, models: Models):
    quick = {"max_steps": 8, "learning_rate": 4e-2, "groups_per_batch": 8, "eval_size": 32}
    path = run(tmp_path / "run", models, **{**quick, **options})
    before, after = evaluation_rows(path)
    assert after["eval/exact_reverse_kl"] < factor * before["eval/exact_reverse_kl"]


def test_temperature_is_that_of_the_sampler_the_learner_and_the_teacher(tmp_path: Path, models: Models):
    path = run(tmp_path / "run", models, objective="reverse_kl", temperature=0.5, teacher_temperature=0.5, max_steps=1)
    (row,) = training_rows(path)
    assert row["ratio/mean"] == pytest.approx(1, abs=1e-4)
    for episode in episodes(path, 1):
        ids, sampled = episode["token_ids"], episode["sampled"]
        for name, folder in (("sampler", models["model_name"]), ("teacher", models["teacher_model"])):
            tempered = (plain_logprobs(folder, ids) / 0.5).log_softmax(-1)
            recorded = [x for x in episode[f"{name}_logprobs"] if x is not None]
            assert recorded == pytest.approx(of_tokens(tempered, ids, sampled), abs=1e-4)


# --- what is recorded


def test_episodes_hold_every_token_with_its_mask_and_both_logprobs(tmp_path: Path, models: Models):
    path = run(tmp_path / "run", models, objective="reverse_kl", group_size=2, max_steps=1)
    rows = episodes(path, 1)
    assert len(rows) == 8
    tokenizer: Any = char_tokenizer()
    for row in rows:
        ids, sampled = row["token_ids"], row["sampled"]
        prompt = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True)["input_ids"]
        assert ids[: len(prompt)] == prompt
        assert sampled == [False] * len(prompt) + [True] * (len(ids) - len(prompt))
        assert "".join(row["tokens"]) == tokenizer.decode(ids)
        assert (row["stop_reason"] == "completed") == (ids[-1] == tokenizer.eos_token_id)
        assert (row["dataset"], row["teacher"]) == ("arithmetic", models["teacher_model"])
        for name, folder in (("sampler", models["model_name"]), ("teacher", models["teacher_model"])):
            logprobs = row[f"{name}_logprobs"]
            assert [value is not None for value in logprobs] == sampled
            plain = of_tokens(plain_logprobs(folder, ids), ids, sampled)
            assert [x for x in logprobs if x is not None] == pytest.approx(plain, abs=1e-4)
    by_row = {row["row_id"]: [] for row in rows}
    for row in rows:
        by_row[row["row_id"]].append(row["token_ids"])
    assert len(by_row) == 4 and any(first != second for first, second in by_row.values())


def test_a_step_records_what_it_measured_per_dataset_and_teacher(tmp_path: Path, models: Models):
    path = run(tmp_path / "run", models, objective="reverse_kl", group_size=2, max_steps=1, report=True)
    (row,) = training_rows(path)
    logged = episodes(path, 1)
    pairs = [
        (s, t)
        for e in logged
        for s, t in zip(e["sampler_logprobs"], e["teacher_logprobs"], strict=True)
        if s is not None
    ]
    # Nothing has been updated yet: the learner's logprobs are the sampler's.
    assert row["kl"] == pytest.approx(np.mean([s - t for s, t in pairs]), abs=1e-5)
    assert row["teacher_logprob"] == pytest.approx(np.mean([t for _, t in pairs]), abs=1e-5)
    assert row["trained_tokens"] == len(pairs)
    assert row["truncated_fraction"] == np.mean([e["stop_reason"] == "max_tokens" for e in logged])
    assert row["completion_tokens_mean"] == pytest.approx(len(pairs) / len(logged))
    assert row["ratio/mean"] == pytest.approx(1, abs=1e-4) and row["ratio/max"] == pytest.approx(1, abs=1e-3)
    assert row["ratio/truncated_fraction"] == 0 and abs(row["mismatch_kl"]) < 1e-6
    assert row["dropped_fraction"] == 0
    for name in ("kl", "loss", "ratio/mean", "mismatch_kl", "truncated_fraction", "dropped_fraction"):
        assert row[f"dataset/arithmetic/{name}"] == row[f"teacher/{models['teacher_model']}/{name}"] == row[name]
    stages = [row[f"time/{stage}"] for stage in ("sampling", "scoring", "training")]
    assert all(0 < seconds < row["time/total"] for seconds in stages)
    assert row["tokens_per_s"] == pytest.approx(row["trained_tokens"] / row["time/total"])
    assert 100 < row["peak_memory_mb"] < 1e5
    assert row["learning_rate"] == 1e-2
    assert "<svg" in (path / "report.html").read_text()


def test_evaluations_happen_at_both_ends_and_between(tmp_path: Path, models: Models):
    given = {"max_steps": 5, "eval_every": 2, "eval_teacher": True, "save_every": 2, "keep_checkpoints": 2, **EVALUATED}
    path = run(tmp_path / "run", models, **given)
    teacher, *rows = evaluation_rows(path)
    assert "eval/teacher_accuracy" in teacher and "eval/accuracy" not in teacher
    assert [row["step"] for row in rows] == [0, 2, 4, 5]
    assert all(row["time/evaluation"] > 0 for row in rows)
    for row in rows:
        for name in ("accuracy", "sampled_accuracy", "reverse_kl", "exact_reverse_kl"):
            assert row[f"eval/{name}_se"] >= 0 and f"eval/{name}" in row
        assert 1 <= row["eval/length"] <= 6 and 0 <= row["eval/truncated_fraction"] <= 1
    assert [folder.name for folder in sorted((path / "checkpoints").iterdir())] == ["step_000004", "step_000005"]


def test_one_held_out_row_or_none(tmp_path: Path, models: Models, capsys: pytest.CaptureFixture[str]):
    path = run(tmp_path / "one", models, eval_size=1)  # its standard errors are undefined
    assert evaluation_rows(path)[0]["eval/accuracy_se"] is None
    assert "accuracy, greedy: 0.0000 -> 0.0000\n" in capsys.readouterr().out
    assert not evaluation_rows(run(tmp_path / "none", models, eval_size=0))


# --- what is saved

_PLAIN_LOAD = """
import importlib.util, json, sys
sys.path.insert(0, sys.argv[1])
assert importlib.util.find_spec("training") is None and importlib.util.find_spec("models") is None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
full, lora, ids = sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
out = []
for folder in (full, lora):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        out.append(model(torch.tensor([ids])).logits[0].log_softmax(-1).tolist())
    assert tokenizer.decode(ids[:1]) == "<|user|>" and tokenizer.chat_template
print(json.dumps(out))
"""


@pytest.mark.parametrize("apart", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_final_checkpoints_load_without_our_code(apart: bool, tmp_path: Path, models: Models):
    """By transformers alone: here, where nothing in them may name ours, and in a process that has no way to it."""
    ids = [4, 9, 14, 17, 11, 16, 18, 2, 5, 7]
    trained = []
    for name, rank in (("full", 0), ("lora", 4)):
        with tiny_models.captured_engines() as engines:
            run(tmp_path / name, models, lora_rank=rank)
        lm = engines[0].learner.lm
        with torch.no_grad():
            trained.append(lm.logits(lm.hidden([torch.tensor(ids)])).log_softmax(-1))
    folders = [str(final(tmp_path / name)) for name in ("full", "lora")]
    assert not any(
        f'"{attention.NAME}"' in file.read_text() for folder in folders for file in Path(folder).glob("*.json")
    )
    loaded = loaded_apart(tmp_path, folders, ids) if apart else [plain_logprobs(folder, ids) for folder in folders]
    start = plain_logprobs(models["model_name"], ids)
    for ours, theirs in zip(trained, loaded, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)
        assert (theirs - start).abs().max() > 1e-2


def loaded_apart(cwd: Path, folders: list[str], ids: list[int]) -> list[torch.Tensor]:
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _PLAIN_LOAD, site.getsitepackages()[0], *folders, json.dumps(ids)],
        cwd=cwd, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [torch.tensor(logprobs) for logprobs in json.loads(done.stdout)]


def test_a_new_run_may_start_from_the_checkpoint_of_another(tmp_path: Path, models: Models):
    full = run(tmp_path / "full", models, **EVALUATED)
    lora = run(tmp_path / "lora", models, lora_rank=2, **EVALUATED)
    for name, first, options in (
        ("full on full", full, dict[str, Any]()),
        ("full on merged", lora, {}),
        ("lora on lora", lora, {"lora_rank": 2}),
        ("lora on full", full, {"lora_rank": 2}),
    ):
        path = run(
            tmp_path / name, models, **{"load_checkpoint_path": final(first), "max_steps": 1, **EVALUATED, **options}
        )
        was, now = evaluation_rows(first)[-1], evaluation_rows(path)[0]
        assert now["step"] == 0
        assert now["eval/exact_reverse_kl"] == pytest.approx(was["eval/exact_reverse_kl"], abs=1e-5), name


# --- seeds


@pytest.mark.parametrize(
    "options",
    [
        {"num_substeps": 2, "group_size": 2, **EVALUATED},
        {"objective": "reverse_kl", "lora_rank": 2, "sampler_slots": 3},
    ],
)
def test_a_seed_decides_a_run_bit_by_bit(options: dict[str, Any], tmp_path: Path, models: Models):
    first, same, other = (
        fingerprint(run(tmp_path / name, models, seed=seed, **options))
        for name, seed in (("first", 1), ("same", 1), ("other", 2))
    )
    assert first == same
    assert first["weights"] != other["weights"] and first["episodes"] != other["episodes"]


# --- stopping and going on

LONG: dict[str, Any] = {
    "max_steps": 6, "save_every": 2, "eval_every": 3, "lr_schedule": "cosine", "warmup_steps": 2, "num_substeps": 2,
    "weight_decay": 0.1, "max_rows": 10, "keep_checkpoints": 0, **EVALUATED,
}  # fmt: skip
"""Rows are used up and drawn anew in step 3."""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, models: Models) -> Callable[[int], Path]:
    """The run that every stopped one must equal: by LoRA rank."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return cache(lambda rank: run(folder / f"rank{rank}", models, lora_rank=rank, **LONG))


@pytest.mark.parametrize(
    ("rank", "often"), [(0, 4), pytest.param(0, 6, marks=pytest.mark.slow), pytest.param(2, 6, marks=pytest.mark.slow)]
)
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_never_was(
    rank: int, often: int, tmp_path: Path, models: Models, uninterrupted: Callable[[int], Path]
):
    chance = random.Random(rank)
    argv = tiny_models.argv(tmp_path / "run", models, lora_rank=rank, **LONG)
    metrics = tmp_path / "run" / "metrics.jsonl"
    kills = 0
    for kill in range(often):
        process = tiny_models.start(argv, tmp_path / "output")
        rows, wanted = None, chance.randint(1, 3) if kill else 0  # once before anything, then after some rows more
        while process.exitcode is None:
            written = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
            # Counted from what is left once the run has cut off what came after its checkpoint.
            rows = written if rows is None else min(rows, written)
            if written >= rows + wanted:
                break
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.05))
        kills += process.exitcode is None
        process.kill()
        process.join()
    assert tiny_models.finish(tiny_models.start(argv, tmp_path / "output")) == 0, (tmp_path / "output").read_text()
    assert kills >= 3
    assert fingerprint(tmp_path / "run") == fingerprint(uninterrupted(rank))
    assert leftovers(tmp_path / "run") == []


@pytest.mark.parametrize(
    ("phase", "step", "saved"),
    [
        pytest.param("sampling", 0, None, marks=pytest.mark.slow),
        ("sampling", 3, 3),
        pytest.param("training", 0, None, marks=pytest.mark.slow),
        ("training", 4, 4),
        ("update", 4, 5),
        pytest.param("evaluation", 3, 3, marks=pytest.mark.slow),
        ("evaluation", 6, 6),
    ],
)
def test_ctrl_c_saves_the_last_finished_step_and_the_same_command_goes_on(
    phase: str, step: int, saved: int | None, tmp_path: Path, models: Models, uninterrupted: Callable[[int], Path]
):
    argv = tiny_models.argv(tmp_path / "run", models, **{**LONG, "eval_every": 3 if step < 6 else 4, "save_every": 4})
    assert tiny_models.finish(tiny_models.start(argv, tmp_path / "output", interrupt=(phase, step))) == 130
    output = (tmp_path / "output").read_text()
    assert "interrupted" in output and "Traceback" not in output
    folders = sorted((tmp_path / "run" / "checkpoints").glob("*"))
    assert (folders[-1].name if folders else None) == (None if saved is None else f"step_{saved:06d}")
    assert leftovers(tmp_path / "run") == []

    assert tiny_models.finish(tiny_models.start(argv, tmp_path / "output")) == 0, (tmp_path / "output").read_text()
    ours, theirs = fingerprint(tmp_path / "run"), fingerprint(uninterrupted(0))
    if step == 6:  # an evaluation every 4 steps: the last one is due only because it is the last
        evaluated = [row["step"] for row in ours.pop("metrics") if "eval/accuracy" in row]
        assert evaluated == [0, 4, 6] and theirs.pop("metrics")
    assert ours == theirs


def test_sigterm_is_a_ctrl_c(tmp_path: Path, models: Models):
    argv = tiny_models.argv(tmp_path / "run", models, max_steps=100000)
    process = tiny_models.start(argv, tmp_path / "output")
    deadline = time.monotonic() + 60
    while not (tmp_path / "output").exists() or "step 2/" not in (tmp_path / "output").read_text():
        assert time.monotonic() < deadline and process.exitcode is None
        time.sleep(0.02)
    process.terminate()
    assert tiny_models.finish(process) == 143
    steps = len(training_rows(tmp_path / "run"))
    assert final(tmp_path / "run").name == f"step_{steps:06d}"


def test_a_finished_run_does_nothing_and_prints_its_summary_and_more_steps_go_on(
    tmp_path: Path, models: Models, capsys: pytest.CaptureFixture[str]
):
    path = run(tmp_path / "run", models, **EVALUATED)
    files = ["metrics.jsonl", "checkpoints/step_000002/model.safetensors", "episodes/step_000002.jsonl"]
    before = [((path / name).read_bytes(), (path / name).stat().st_mtime_ns) for name in files[1:]]
    metrics = (path / "metrics.jsonl").read_text()
    summary = capsys.readouterr().out
    run(path, models, **EVALUATED)
    again = capsys.readouterr().out
    assert [((path / name).read_bytes(), (path / name).stat().st_mtime_ns) for name in files[1:]] == before
    assert (path / "metrics.jsonl").read_text() == metrics
    tail = summary[summary.index("held out") :]
    assert again.endswith(tail) and str(path) in tail and str(final(path)) in tail and "report.html" in tail
    assert "exact reverse KL per token: " in tail

    run(path, models, max_steps=4, **EVALUATED)
    straight = run(tmp_path / "straight", models, max_steps=4, **EVALUATED)
    ours, theirs = fingerprint(path), fingerprint(straight)
    extra = [row for row in ours["metrics"] if row not in theirs["metrics"]]
    assert [row["step"] for row in extra] == [2] and "eval/accuracy" in extra[0]  # it was the end once
    ours["metrics"].remove(extra[0])
    assert ours == theirs


# --- other formats


def rows_file(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def question(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_privileged_messages_are_read_by_the_teacher_alone(tmp_path: Path, models: Models):
    rows = [
        {"messages": question(f"{n}+1="), "teacher_messages": question(f"{n}+1={n + 1};{n}+1="), "id": str(n)}
        for n in range(10, 20)
    ]
    path = run(
        tmp_path / "run", models, dataset=rows_file(tmp_path / "rows.jsonl", rows), objective="reverse_kl", max_steps=1
    )
    tokenizer: Any = char_tokenizer()
    for episode in episodes(path, 1):
        n = int(episode["row_id"])
        assert episode["messages"] == question(f"{n}+1=")
        answer = [i for i, sampled in zip(episode["token_ids"], episode["sampled"], strict=True) if sampled]
        hidden = tokenizer.apply_chat_template(question(f"{n}+1={n + 1};{n}+1="), add_generation_prompt=True)
        ids = hidden["input_ids"] + answer
        asked = [False] * len(hidden["input_ids"]) + [True] * len(answer)
        plain = of_tokens(plain_logprobs(models["teacher_model"], ids), ids, asked)
        assert [x for x in episode["teacher_logprobs"] if x is not None] == pytest.approx(plain, abs=1e-4)


def swapped_twin(teacher: str, folder: Path) -> str:
    """The teacher again, in a format that ends turns with another token: its rows of the two ids trade places."""
    end, pad = "<|end|>", "<|pad|>"
    tokenizer: Any = char_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(end, pad)
    tokenizer.eos_token = pad
    ids = tokenizer.convert_tokens_to_ids([end, pad])
    model: Any = AutoModelForCausalLM.from_pretrained(teacher)
    for matrix in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        matrix.data[ids] = matrix.data[ids[::-1]]
    model.config.eos_token_id = model.generation_config.eos_token_id = ids[1]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("objective", ["jsd", "reverse_kl"])
def test_identical_models_have_no_divergence_whatever_ends_their_turns(objective: str, tmp_path: Path, teacher: str):
    for name in (teacher, swapped_twin(teacher, tmp_path / "twin")):
        pair = {"model_name": name, "teacher_model": teacher}
        log_path = tmp_path / f"run-{Path(name).name}"
        path = run(log_path, pair, objective=objective, eval_size=16, groups_per_batch=16, max_steps=1)
        evaluated, trained = evaluation_rows(path)[0], training_rows(path)[0]
        assert abs(evaluated["eval/exact_reverse_kl"]) < 1e-6 and abs(evaluated["eval/reverse_kl"]) < 1e-6
        assert abs(trained["kl"]) < 1e-6 and abs(trained["loss"]) < 1e-6
        reasons = {episode["stop_reason"] for episode in episodes(path, 1)}
        assert reasons == {"completed", "max_tokens"}  # ends of turns were among what was judged


def test_a_base_student_learns_from_a_chat_teacher(tmp_path: Path, teacher: str):
    tokenizer: Any = char_tokenizer()
    tokenizer.chat_template = None
    tokenizer.eos_token = "<|pad|>"
    base = tiny_models.make_model(tmp_path / "base", seed=5, tokenizer=tokenizer)
    pair = {"model_name": base, "teacher_model": teacher}
    path = run(
        tmp_path / "run",
        pair,
        objective="reverse_kl",
        max_steps=8,
        groups_per_batch=8,
        eval_size=32,
        learning_rate=4e-2,
    )
    chat: Any = char_tokenizer()
    end, pad = chat.convert_tokens_to_ids(["<|end|>", "<|pad|>"])
    ended = [e for e in episodes(path, 1) + episodes(path, 2) if e["stop_reason"] == "completed"]
    assert ended
    for episode in ended[:3]:
        assert episode["token_ids"][-1] == pad
        prompt = chat.apply_chat_template(episode["messages"], add_generation_prompt=True)["input_ids"]
        answer = [i for i, sampled in zip(episode["token_ids"], episode["sampled"], strict=True) if sampled]
        ids = prompt + [{end: pad, pad: end}.get(i, i) for i in answer]
        asked = [False] * len(prompt) + [True] * len(answer)
        plain = of_tokens(plain_logprobs(teacher, ids), ids, asked)
        assert [x for x in episode["teacher_logprobs"] if x is not None] == pytest.approx(plain, abs=1e-4)
    before, after = evaluation_rows(path)
    assert after["eval/exact_reverse_kl"] < 0.8 * before["eval/exact_reverse_kl"]


# --- looking before leaping


def test_a_dry_run_prints_everything_and_makes_nothing(
    tmp_path: Path, models: Models, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    with tiny_models.captured_engines() as engines:
        run(tmp_path / "run", models, dry_run=True, lora_rank=3)
    out = capsys.readouterr().out
    assert not engines and list(tmp_path.iterdir()) == []
    for part in ("lora_rank=3", "<|user|>", "teacher " + models["teacher_model"], "'<|end|>' in both", "in all:"):
        assert part in out


def test_the_default_folder_is_found_again(tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    run(Path("None"), models, max_steps=1)
    run(Path("None"), models, max_steps=2)
    assert [row["step"] for row in training_rows(tmp_path / "runs" / "on_policy_distillation-arithmetic-student")] == [
        1,
        2,
    ]
