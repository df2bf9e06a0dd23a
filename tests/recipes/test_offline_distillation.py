"""A capture, and training from it: the same numbers as with the teacher there, and nothing lost by a kill."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tiny_models
import torch
from tiny_models import final, no_report, training_rows, weights
from transformers import AutoModelForCausalLM

from envs.rendering import make_renderer
from models import attention
from models.causal_lm import CausalLM
from models.loading import load_model
from models.sources import ModelSource
from models.transformers_scorer import TransformersScorer
from recipes import capture_teacher, engines, offline_distillation
from recipes.cli import parse_config, run_cli
from recipes.embedded import char_tokenizer
from training.capture_files import read_capture, read_header
from training.collect import Teacher

Models = dict[str, str]
ANSWERS = [
    {"id": f"r{n}", "messages": [{"role": "user", "content": f"{n}+1="}], "completion": f"{n + 1}"} for n in range(40)
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def capture(folder: Path, models: Models, rows: list[dict[str, Any]] | None = None, **options: Any) -> Path:
    data = write(folder / "answers.jsonl", ANSWERS if rows is None else rows)
    source = {} if "episodes_path" in options else {"dataset": data}
    given = {
        **models, **source, "top_k": 4, "device": "cpu", "output_path": folder / "capture.jsonl", **options
    }  # fmt: skip
    recipe = capture_teacher
    recipe.main(parse_config(recipe.Config, [f"{k}={v}" for k, v in given.items()], presets=recipe.presets))
    return Path(given["output_path"])


def offline_argv(log_path: Path, models: Models, file: Path, **options: Any) -> list[str]:
    given = {
        "model_name": models["model_name"], "capture_path": file, "log_path": log_path, "device": "cpu",
        "groups_per_batch": 8, "learning_rate": 1e-2, "max_steps": 3, "save_every": 0, **options,
    }  # fmt: skip
    return [f"{k}={v}" for k, v in given.items()]


def train(log_path: Path, models: Models, file: Path, **options: Any) -> Path:
    recipe = offline_distillation
    with no_report():
        recipe.main(parse_config(recipe.Config, offline_argv(log_path, models, file, **options)))
    return log_path


def examples(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()[1:]]


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory, models: Models) -> Path:
    return capture(tmp_path_factory.mktemp("capture"), models)


# --- what is captured


def test_every_trained_position_has_the_teachers_top_k_of_its_whole_distribution(captured: Path, models: Models):
    header = json.loads(captured.read_text().splitlines()[0])
    assert (header["teacher"], header["top_k"], header["examples"]) == (models["teacher_model"], 4, 40)
    teacher = AutoModelForCausalLM.from_pretrained(models["teacher_model"], attn_implementation="eager")
    rows = examples(captured)
    assert sorted(row["id"] for row in rows) == sorted(row["id"] for row in ANSWERS)
    renderer = make_renderer(char_tokenizer(), chat_template_kwargs={}, system_prompt=None, name="chars")
    for row in rows[:5]:
        ids = row["input_ids"]
        (source,) = (r for r in ANSWERS if r["id"] == row["id"])
        prompt = renderer.prompt(source["messages"])
        assert ids[: len(prompt)] == prompt and renderer.decode(ids[len(prompt) :]) == source["completion"]
        assert row["trained"] == [[len(prompt), len(ids)]]  # the end of the turn too
        with torch.no_grad():
            logprobs = teacher(torch.tensor([ids])).logits[0].log_softmax(-1)  # [T, v]
        for i, (chosen, values, own) in enumerate(
            zip(row["topk_ids"], row["topk_logprobs"], row["logprobs"], strict=True)
        ):
            if i < len(prompt):
                assert (chosen, values, own) == ([], [], None)
                continue
            expected = logprobs[i - 1].topk(4)  # what predicts token i
            assert chosen == expected.indices.tolist()
            assert values == pytest.approx(expected.values.tolist(), abs=1e-4)
            assert own == pytest.approx(float(logprobs[i - 1, ids[i]]), abs=1e-4)


def test_a_privileged_teacher_reads_its_own_prompt(tmp_path: Path, models: Models):
    rows = [{**row, "teacher_messages": [{"role": "user", "content": "5+5=10 7+"}]} for row in ANSWERS[:2]]
    row = examples(capture(tmp_path, models, rows))[0]
    renderer = make_renderer(char_tokenizer(), chat_template_kwargs={}, system_prompt=None, name="chars")
    (start, end), ids = row["trained"][0], row["input_ids"]
    read = [*renderer.prompt(rows[0]["teacher_messages"]), *ids[start:end]]
    teacher = AutoModelForCausalLM.from_pretrained(models["teacher_model"], attn_implementation="eager")
    with torch.no_grad():
        logprobs = teacher(torch.tensor([read])).logits[0].log_softmax(-1)
    expected = logprobs[start - end - 1 : -1].topk(4)
    assert row["topk_ids"][start:end] == expected.indices.tolist()


def test_the_teachers_own_answers(tmp_path: Path, models: Models):
    rows = [{"id": row["id"], "messages": row["messages"]} for row in ANSWERS[:6]]
    file = capture(tmp_path, models, rows, completions="teacher", max_tokens=5)
    found = examples(file)
    lengths = [end - start for row in found for start, end in row["trained"]]
    assert max(lengths) <= 5 and len({tuple(row["input_ids"]) for row in found}) == 6
    again = capture(tmp_path, models, rows, completions="teacher", max_tokens=5, output_path=tmp_path / "again.jsonl")
    assert again.read_bytes() == file.read_bytes()


def test_a_vocabulary_smaller_than_top_k_is_kept_whole(tmp_path: Path, models: Models):
    file = capture(tmp_path, models, ANSWERS[:4], top_k=500)
    row = examples(file)[0]
    assert len(row["topk_ids"][-1]) == len(char_tokenizer()) + 3  # the teacher's embedding is padded
    (step,) = training_rows(train(tmp_path / "run", models, file, max_steps=1, top_k=400))
    assert step["no_teacher_mass"] == 0 and step["topk_mass"] < 1  # without what only the teacher has


def test_saved_episodes_say_again_what_the_teacher_said_live(tmp_path: Path, models: Models):
    live = tiny_models.run(tmp_path / "live", models, objective="reverse_kl", group_size=2)
    file = capture(tmp_path, models, completions="saved", episodes_path=live)
    found = examples(file)
    assert len(found) == 2 * 4 * 2  # steps, groups, attempts
    for step, number in ((1, 3), (2, 8)):
        saved = tiny_models.episodes(live, step)[number - 1]
        (row,) = (row for row in found if row["id"] == f"step_{step:06d}:{number}")
        assert row["input_ids"] == saved["token_ids"]
        mine, theirs = (
            [x for x in logprobs if x is not None] for logprobs in (row["logprobs"], saved["teacher_logprobs"])
        )
        assert mine == pytest.approx(theirs, abs=1e-4)
    first, *_, last = training_rows(train(tmp_path / "run", models, file, max_steps=10))
    assert last["loss"] < first["loss"]


# --- a capture that was stopped


@pytest.mark.parametrize("kept", [0, 30, "header", "batch", "torn", "all"])
def test_the_same_command_goes_on_after_a_kill_and_gives_the_same_file(
    kept: int | str, tmp_path: Path, models: Models, captured: Path
):
    whole = captured.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    cut = {"header": ends[0], "batch": ends[32], "torn": ends[20] + 57, "all": len(whole)}.get(str(kept), kept)
    shutil.copy(captured.with_name("answers.jsonl"), tmp_path / "answers.jsonl")
    file = tmp_path / "capture.jsonl"
    file.write_bytes(whole[: int(cut)])
    with mock.patch.object(engines, "load_teacher", wraps=engines.load_teacher) as loaded:
        assert capture(tmp_path, models).read_bytes() == whole
    assert loaded.called == (kept != "all")


# --- the binary form


def test_the_binary_form_holds_the_same_in_less_and_trains_the_same(tmp_path: Path, models: Models, captured: Path):
    binary = capture(tmp_path, models, output_path=tmp_path / "capture.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["answers.jsonl", "capture.safetensors"]
    mine, theirs = read_capture(binary), read_capture(captured)
    assert read_header(binary) == mine.header
    assert [(e.row_id, e.spans) for e in mine.examples] == [(e.row_id, e.spans) for e in theirs.examples]
    for a, b in zip(mine.examples, theirs.examples, strict=True):
        for name in ("input_ids", "logprobs", "topk_ids", "topk_logprobs"):
            assert getattr(a, name).dtype == getattr(b, name).dtype
            assert (getattr(a, name) == getattr(b, name)).all()
    runs = [train(tmp_path / file.suffix, models, file) for file in (binary, captured)]
    one, other = (weights(final(run)) for run in runs)
    assert all(torch.equal(one[key], other[key]) for key in other)


def test_the_binary_form_goes_on_after_a_kill_and_is_not_made_twice(tmp_path: Path, models: Models, captured: Path):
    whole = captured.read_bytes()
    shutil.copy(captured.with_name("answers.jsonl"), tmp_path / "answers.jsonl")
    file = tmp_path / "capture.safetensors"
    (tmp_path / "capture.safetensors.partial.jsonl").write_bytes(whole[: len(whole) // 2])
    with mock.patch.object(engines, "load_teacher", wraps=engines.load_teacher) as loaded:
        capture(tmp_path, models, output_path=file)
        capture(tmp_path, models, output_path=file)
    assert loaded.call_count == 1
    assert [e.row_id for e in read_capture(file).examples] == [e.row_id for e in read_capture(captured).examples]


def test_a_broken_or_other_binary_capture(capfd: pytest.CaptureFixture[str], tmp_path: Path, models: Models):
    file = capture(tmp_path, models, output_path=tmp_path / "capture.safetensors")
    given = {**models, "dataset": tmp_path / "answers.jsonl", "device": "cpu", "output_path": file, "top_k": 3}
    refused(capture_teacher, [f"{k}={v}" for k, v in given.items()], capfd, "top_k is 4, now it would be 3")
    whole = file.read_bytes()
    for content in (whole[:-20], b"", b"my notes", Path(models["model_name"], "model.safetensors").read_bytes()):
        file.write_bytes(content)
        argv = offline_argv(tmp_path / "run", models, file)
        refused(offline_distillation, argv, capfd, str(file), "not a whole capture")


# --- training from it


@pytest.mark.parametrize("options", [{}, {"objective": "jsd", "beta": 0.5, "top_k": 3}], ids=str)
def test_offline_training_is_live_training_on_the_same_rows_bit_by_bit(
    options: dict[str, Any], tmp_path: Path, models: Models
):
    file = capture(tmp_path, models, micro_batch_tokens=1)  # one sequence a pass, there and here
    offline = train(tmp_path / "offline", models, file, **options)
    lm = CausalLM.verified(
        load_model(
            ModelSource(models["teacher_model"]),
            dtype=torch.float32,
            device=torch.device("cpu"),
            attn_implementation=attention.NAME,
        )
    )
    scorer = TransformersScorer(models["teacher_model"], lm, token_budget=1)

    def live_teachers(capture: Any, checked: Any) -> dict[str, Teacher]:
        (name, teacher), *_ = from_file(capture, checked).items()
        return {name: Teacher(scorer, teacher.views)}

    from_file = offline_distillation.teachers
    with (
        mock.patch.object(offline_distillation, "teachers", live_teachers),
        mock.patch.object(scorer, "score", wraps=scorer.score) as asked,
    ):
        live = train(tmp_path / "live", models, file, **options)
    assert asked.called
    mine, theirs = weights(final(offline)), weights(final(live))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    timeless = ("loss", "kl", "topk_mass", "grad_norm")
    assert [[row[k] for k in timeless] for row in training_rows(offline)] == [
        [row[k] for k in timeless] for row in training_rows(live)
    ]


WAYS: list[dict[str, Any]] = [
    {},
    {"lora_rank": 2},
    {"objective": "jsd"},
    {"objective": "jsd", "support": "sampled"},
    {"objective": "jsd", "tail": "renormalise", "beta": 0},
]


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_the_student_learns_without_its_teacher(options: dict[str, Any], tmp_path: Path, models: Models):
    teacher = tiny_models.make_model(tmp_path / "teacher", seed=2, hidden=24)
    file = capture(tmp_path, {**models, "teacher_model": teacher})
    shutil.rmtree(teacher)
    first, *_, last = training_rows(train(tmp_path / "run", models, file, max_steps=10, **options))
    assert last["loss"] < 0.98 * first["loss"]
    assert first[f"teacher/{teacher}/kl"] == first["kl"]
    assert not any("ratio" in name or "mismatch" in name for name in first)  # nobody knows who wrote the answers


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path: Path, models: Models, captured: Path):
    whole = train(tmp_path / "whole", models, captured, max_steps=6)  # of 40 rows: the second time from step 6 on
    train(tmp_path / "run", models, captured, max_steps=3)
    resumed = train(tmp_path / "run", models, captured, max_steps=6)
    mine, theirs = weights(final(resumed)), weights(final(whole))
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_a_loss_temperature_undoes_that_of_the_capture(tmp_path: Path, models: Models):
    """Where only the ratios of the teacher's top k count, two captures at unlike temperatures train alike."""
    options = {"objective": "kd", "tail": "renormalise", "alpha": 0.7, "loss_temperature": 1.5}
    runs = []
    for temperature in (1.0, 2.0):
        (folder := tmp_path / str(temperature)).mkdir()
        file = capture(folder, models, temperature=temperature)
        runs.append(train(folder / "run", models, file, **options))
    ours, theirs = (weights(final(path)) for path in runs)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-5)
    rows, others = (training_rows(path) for path in runs)
    for row, other in zip(rows, others, strict=True):
        assert row["nll"] == pytest.approx(other["nll"], rel=1e-3) and row["kl"] != pytest.approx(other["kl"], rel=1e-2)
        soft = 1.5**2 * row["forward_kl"]
        assert row["loss"] == pytest.approx(0.3 * row["nll"] + 0.7 * soft, rel=1e-4)


def test_the_temperature_is_that_of_the_capture(tmp_path: Path, models: Models):
    file = capture(tmp_path, models, temperature=2.0)
    with tiny_models.captured_engines() as engines:
        train(tmp_path / "run", models, file, max_steps=1)
    assert engines[0].learner.temperature == 2.0


# --- refused before any weights are loaded


def refused(recipe: Any, argv: list[str], capfd: pytest.CaptureFixture[str], *parts: str) -> None:
    with pytest.raises(SystemExit) as stop, mock.patch.object(engines, "load_lm") as loaded:
        run_cli(recipe.main, recipe.Config, presets=getattr(recipe, "presets", None), argv=argv)
    err = capfd.readouterr().err
    assert stop.value.code == 2 and not loaded.called, err
    assert err.startswith("error: ") and err.count("\n") == 1
    for part in parts:
        assert part in err


OPTIONS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "more than there is": ({"top_k": 5}, ("top_k=5", "top 4")),
    "whole distribution": ({"objective": "jsd", "support": "full"}, ("support=full", "support=teacher_topk")),
    "student's choice": ({"objective": "jsd", "support": "student_topk"}, ("whole distribution",)),
    "policy gradient": ({"objective": "reverse_kl"}, ("objective=reverse_kl", "topk_forward_kl, jsd")),
    "beta of another": ({"beta": 0.5}, ("has no beta", "objective=jsd")),
    "k of one token": ({"objective": "jsd", "support": "sampled", "top_k": 2}, ("top_k=2",)),
    "temperature of a bucket": (
        {"objective": "jsd", "loss_temperature": 2},
        ("loss_temperature=2.0", "tail=renormalise with teacher_topk"),
    ),
    "alpha of another": ({"alpha": 0.3}, ("has no alpha", "objective=kd")),
    "kd of one token": ({"objective": "kd", "support": "sampled"}, ("support=sampled",)),
    "sampling": ({"max_tokens": 7}, ("max_tokens", "nothing is sampled")),
    "evaluation": ({"eval_every": 7}, ("eval_every", "recipes.evaluate")),
    "no examples": ({"groups_per_batch": 0}, ("groups_per_batch=0",)),
    "no file": ({"capture_path": "nowhere.jsonl"}, ("nowhere.jsonl", "cannot be read")),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_that_a_capture_does_not_allow(
    case: str, capfd: pytest.CaptureFixture[str], tmp_path: Path, models: Models, captured: Path
):
    options, parts = OPTIONS[case]
    refused(offline_distillation, offline_argv(tmp_path / "run", models, captured, **options), capfd, *parts)
    assert not (tmp_path / "run").exists()


def edited(text: str, **changes: Any) -> str:
    lines = text.splitlines()
    return "\n".join([lines[0], json.dumps({**json.loads(lines[1]), **changes}), *lines[2:], ""])


FILES: dict[str, tuple[Any, str]] = {
    "cut off": (lambda text: text[:-20], ":41: the last line is cut off. Run the command that captured it once more"),
    "too few": (lambda text: "\n".join(text.splitlines()[:30]) + "\n", "holds 29 of 40 examples"),
    "too many": (lambda text: text + text.splitlines()[1] + "\n", "holds 41 examples, and its header says 40"),
    "no header": (lambda text: "\n".join(text.splitlines()[1:]) + "\n", "not the header of a capture"),
    "empty": (lambda text: "", "not the header of a capture"),
    "a dataset": (lambda text: '{"messages": []}\n', "not the header of a capture"),
    "twice": (lambda text: text.replace('"r7"', '"r8"'), "1 examples are there twice"),
    "garbage": (lambda text: text.replace('{"id": "r7"', "{"), "not an example of a capture"),
    "fewer ids": (lambda text: edited(text, topk_ids=[[1]] * 99), ":2: a broken example"),
    "untrained": (lambda text: edited(text, trained=[]), ":2: a broken example"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_not_a_whole_capture(
    case: str, capfd: pytest.CaptureFixture[str], tmp_path: Path, models: Models, captured: Path
):
    change, part = FILES[case]
    file = tmp_path / "broken.jsonl"
    file.write_text(change(captured.read_text()))
    refused(offline_distillation, offline_argv(tmp_path / "run", models, file), capfd, str(file), part)


def test_a_student_with_another_tokenizer(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, models: Models, captured: Path
):
    tokenizer = char_tokenizer()
    tokenizer.add_tokens(["more"])
    other = tiny_models.make_model(tmp_path / "other", seed=3, tokenizer=tokenizer)
    argv = offline_argv(tmp_path / "run", {"model_name": other}, captured)
    refused(offline_distillation, argv, capfd, other, "another tokenizer", f"model_name={other}")


def test_another_chat_format_is_named(tmp_path: Path, models: Models, captured: Path, caplog: pytest.LogCaptureFixture):
    train(tmp_path / "run", models, captured, max_steps=1)
    assert "chat format" not in caplog.text
    train(tmp_path / "other", models, captured, max_steps=1, system_prompt="add")
    assert "another chat format" in caplog.text


def test_another_capture_under_the_same_name_is_another_run(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, models: Models
):
    file = capture(tmp_path, models)
    train(tmp_path / "run", models, file, max_steps=1)
    file.unlink()
    capture(tmp_path, models, temperature=2.0)
    argv = offline_argv(tmp_path / "run", models, file, max_steps=2)
    with pytest.raises(SystemExit):
        run_cli(offline_distillation.main, offline_distillation.Config, argv=argv)
    assert "capture.temperature: 1.0 there, 2.0 now" in capfd.readouterr().err


CAPTURES: dict[str, tuple[dict[str, Any], list[dict[str, Any]], tuple[str, ...]]] = {
    "no answer": ({}, [{"id": "x", "messages": ANSWERS[0]["messages"]}], ("l:1): has no completion", "=teacher")),
    "too long": ({}, [{**ANSWERS[0], "completion": "1+" * 80}], ("r0 (", "answers.jsonl:1): 1", "context is 128")),
    "another teacher": ({}, [{**ANSWERS[0], "teacher": "big"}], ("r0 (", "answers.jsonl:1): its teacher is 'big'",)),
    "longest of given answers": ({"max_tokens": 3}, ANSWERS, ("max_tokens is of completions=teacher",)),
    "saved where": ({"completions": "saved"}, ANSWERS, ("episodes_path", "go together")),
    "nothing saved": (
        {"dataset": "arithmetic", "completions": "saved", "episodes_path": "."}, ANSWERS, (".: no episodes there",)
    ),
    "saved rows": ({"completions": "saved", "episodes_path": "."}, ANSWERS, ("leave dataset and dataset_path out",)),
    "no tokens": ({"top_k": 0}, ANSWERS, ("top_k=0",)),
    "nowhere": ({"output_path": "no/such/folder.jsonl"}, ANSWERS, ("its folder does not exist",)),
}  # fmt: skip


@pytest.mark.parametrize("case", CAPTURES)
def test_captures_that_cannot_be(case: str, capfd: pytest.CaptureFixture[str], tmp_path: Path, models: Models):
    options, rows, parts = CAPTURES[case]
    data = write(tmp_path / "answers.jsonl", rows)
    given = {**models, "dataset": data, "device": "cpu", "output_path": tmp_path / "capture.jsonl", **options}
    refused(capture_teacher, [f"{k}={v}" for k, v in given.items()], capfd, *parts)
    assert not (tmp_path / "capture.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"top_k": 5}, "top_k is 4, now it would be 5"),
        ({"max_rows": 30}, "examples is 40"),
        ({"system_prompt": "1"}, "in another chat format (model_name, system_prompt, "),
        ({"teacher_system_prompt": "1"}, "of other rows, or made of them in another way"),
    ],
)
def test_a_file_that_holds_another_capture(
    options: dict[str, Any], part: str, capfd: pytest.CaptureFixture[str], models: Models, captured: Path
):
    before = captured.read_bytes()
    data = captured.with_name("answers.jsonl")
    given = {**models, "dataset": data, "device": "cpu", "output_path": captured, "top_k": 4, **options}
    refused(capture_teacher, [f"{k}={v}" for k, v in given.items()], capfd, "holds another capture", part)
    assert captured.read_bytes() == before


def test_a_file_that_is_no_capture_is_left_alone(capfd: pytest.CaptureFixture[str], tmp_path: Path, models: Models):
    for content in ("my notes", "my notes\n"):
        file = tmp_path / "notes.txt"
        file.write_text(content)
        given = {**models, "dataset": write(tmp_path / "answers.jsonl", ANSWERS), "device": "cpu", "output_path": file}
        refused(capture_teacher, [f"{k}={v}" for k, v in given.items()], capfd, str(file))
        assert file.read_text() == content
