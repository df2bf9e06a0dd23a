"""Every mistake of the user's: one clear message, the right exit code, and nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from tiny_models import fingerprint, leftovers, run

from models.transformers_scorer import TransformersScorer
from recipes import on_policy_distillation
from recipes.cli import run_cli

Models = dict[str, str]


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of its own, and no network to wait for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def cli(capfd: pytest.CaptureFixture[str], argv: list[str]) -> tuple[int, str]:
    """Exit code and stderr of the recipe, in this process."""
    recipe = on_policy_distillation
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit, tiny_models.no_report():
        run_cli(recipe.main, recipe.Config, presets=recipe.presets, argv=argv)
    assert isinstance(exit.value.code, int)
    return exit.value.code, capfd.readouterr().err


def assert_refused(capfd: pytest.CaptureFixture[str], tmp_path: Path, argv: list[str], *parts: str) -> str:
    before = sorted(tmp_path.rglob("*"))
    code, err = cli(capfd, argv)
    assert code == 2, err
    assert err.count("error:") == 1 and "Traceback" not in err
    for part in parts:
        assert part in err, err
    assert sorted(tmp_path.rglob("*")) == before
    return err


# --- options

OPTIONS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "unknown key": ({"lernin_rate": 1}, ("unknown option lernin_rate", "Did you mean learning_rate?")),
    "unknown nested key": ({"loss_fn_config__is_capp": 1}, ("Did you mean loss_fn_config.is_cap?",)),
    "another word for it": ({"loss_fn": "grpo"}, ("loss_fn=grpo", "importance_sampling, ppo, cispo")),
    "not a number": ({"learning_rate": "fast"}, ("learning_rate=fast", "expected float")),
    "negative learning rate": ({"learning_rate": -1}, ("learning_rate=-1", "positive")),
    "learning rate nan": ({"learning_rate": "nan"}, ("learning_rate=nan",)),
    "no groups": ({"groups_per_batch": 0}, ("groups_per_batch=0", "expected 1 or more")),
    "more substeps than groups": ({"num_substeps": 9}, ("num_substeps=9", "groups")),
    "no attempts": ({"group_size": 0}, ("group_size=0",)),
    "no tokens": ({"max_tokens": 0}, ("max_tokens=0",)),
    "no steps": ({"max_steps": 0}, ("max_steps=0",)),
    "beta of Adam": ({"adam_beta2": 1.5}, ("adam_beta2=1.5", "less than 1")),
    "epsilon": ({"adam_eps": -1}, ("adam_eps=-1",)),
    "endless epsilon": ({"adam_eps": "inf"}, ("adam_eps=inf: expected a finite number",)),
    "endless decay": ({"weight_decay": "inf"}, ("weight_decay=inf: expected a finite number",)),
    "no scaling": ({"lora_rank": 2, "lora_alpha": 0}, ("lora_alpha=0", "positive")),
    "negative seed": ({"seed": -1}, ("seed=-1: expected 0 or more",)),
    "fraction": ({"max_dropped_fraction": 2}, ("max_dropped_fraction=2", "0 to 1")),
    "greedy": ({"temperature": 0}, ("temperature=0", "above 0")),
    "temperature nan": ({"temperature": "nan"}, ("temperature=nan",)),
    "unlike temperatures": ({"temperature": 0.7, "teacher_temperature": 1}, ("0.7", "1.0", "the same temperature")),
    "loss of another objective": ({"objective": "jsd", "loss_fn": "ppo"}, ("objective=jsd has no loss_fn",)),
    "coefficient of another": ({"objective": "jsd", "kl_penalty_coef": 2}, ("objective=jsd has no kl_penalty_coef",)),
    "bounds of another": ({"objective": "jsd", "loss_fn_config__is_cap": 2}, ("has no loss_fn_config",)),
    "beta of another": (
        {"objective": "reverse_kl", "beta": 0.5}, ("objective=reverse_kl has no beta (given: 0.5)", "use objective=jsd")
    ),
    "support of another": ({"objective": "topk_forward_kl", "support": "sampled"}, ("topk_forward_kl has no support",)),
    "tail of another": ({"objective": "topk_forward_kl", "tail": "bucket"}, ("topk_forward_kl has no tail",)),
    "top k of another": (
        {"objective": "reverse_kl", "top_k": 4}, ("has no top_k", "objective=jsd or objective=topk_forward_kl")
    ),
    "top k of the whole": ({"objective": "jsd", "top_k": 4}, ("top_k=4", "support=teacher_topk")),
    "tail of the whole": ({"objective": "jsd", "tail": "renormalise"}, ("support=full leaves no token out",)),
    "support of nothing": ({"objective": "topk_forward_kl", "top_k": 0}, ("top_k=0", "1 or more")),
    "support": ({"objective": "jsd", "support": "topk"}, ("support=topk", "teacher_topk, student_topk, sampled")),
    "loss that is always 0": (
        {"objective": "jsd", "support": "sampled", "tail": "renormalise"}, ("always 0", "tail=bucket")
    ),
    "beta": ({"objective": "jsd", "beta": 2}, ("beta=2", "from 0 to 1")),
    "bounds without clipping": (
        {"objective": "reverse_kl", "loss_fn_config__clip_low_threshold": 0.5}, ("does not clip",)
    ),
    "bounds the wrong way": (
        {"objective": "reverse_kl", "loss_fn": "ppo", "loss_fn_config__clip_low_threshold": 1.5}, ("low <= high",)
    ),
    "discount": ({"objective": "reverse_kl", "kl_discount_factor": 2}, ("kl_discount_factor=2", "0 to 1")),
    "alpha without LoRA": ({"lora_alpha": 3}, ("lora_alpha is for LoRA", "lora_rank")),
    "template kwargs": ({"chat_template_kwargs": "{bad"}, ("chat_template_kwargs={bad", "not JSON")),
    "template kwargs of the teacher": ({"teacher_chat_template_kwargs": "[1]"}, ("expected a JSON object",)),
    "device": ({"device": "abacus"}, ("device=abacus", "expected auto, cpu")),
    "tracker": ({"trackers": "tensorbord"}, ("trackers=tensorbord", "Did you mean tensorboard?")),
    "attention": (
        {"attn_implementation": "flash_attention_9", "dry_run": True}, ("flash_attention_9", "auto, eager")
    ),
    "context": ({"max_tokens": 200}, ("max_tokens=200", "128 tokens")),
}  # fmt: skip


@pytest.mark.parametrize("case", OPTIONS)
def test_options_that_make_no_sense(case: str, capfd: pytest.CaptureFixture[str], tmp_path: Path, models: Models):
    options, parts = OPTIONS[case]
    assert_refused(capfd, tmp_path, tiny_models.argv(tmp_path / "run", models, **options), *parts)


TYPO = "error: unknown option groups_per_bach. Did you mean groups_per_batch?\n--help lists every option\n"


def test_as_a_program(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch
):
    argv = tiny_models.argv(tmp_path / "run", models, groups_per_bach=1)
    monkeypatch.setattr(sys, "argv", ["recipes/on_policy_distillation.py", *argv])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(on_policy_distillation.__file__, run_name="__main__")
    assert (exit.value.code, *capfd.readouterr()) == (2, "", TYPO)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_in_a_process_of_its_own(tmp_path: Path, models: Models):
    command = [sys.executable, "-m", "recipes.on_policy_distillation"]
    argv = tiny_models.argv(tmp_path / "run", models, groups_per_bach=1)
    done = subprocess.run([*command, *argv], cwd=tiny_models.ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", TYPO)
    assert not (tmp_path / "run").exists()


# --- data


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


GOOD = {"messages": [{"role": "user", "content": "12+34="}]}
LONG = {"messages": [{"role": "user", "content": "1+" * 70}]}


def test_an_unknown_dataset_is_named_before_the_models_that_it_did_not_bring(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
):
    for dataset in ("gsm8", "prompts.jsonl", "no/such/folder"):
        err = assert_refused(capfd, tmp_path, [f"dataset={dataset}"], f"dataset={dataset}" if "." in dataset else "")
        assert "model_name" not in err
    assert "did you mean 'gsm8k'?" in assert_refused(capfd, tmp_path, ["dataset=gsm8"])
    assert "no such file or folder" in assert_refused(capfd, tmp_path, ["dataset=gsm8k", "dataset_path=nowhere.jsonl"])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"messages": [', "not JSON"),
        ('{"prompt": "2+2"}', "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "usr", "content": "2"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({**GOOD, "teacher_messages": [{"role": "user"}]}, "teacher_messages[0].content"),
        ("7", "expected an object"),
    ],
)
def test_a_broken_row_is_named_by_file_and_line(
    line: Any, reason: str, capfd: pytest.CaptureFixture[str], tmp_path: Path, models: Models
):
    file = write(tmp_path / "rows.jsonl", GOOD, "", line)
    argv = tiny_models.argv(tmp_path / "run", models, dataset=file)
    assert_refused(capfd, tmp_path, argv, f"{file}:3: ", reason)


def test_hints_on_the_way_where_an_episode_is_one_turn(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, models: Models
):
    file = write(tmp_path / "rows.jsonl", GOOD, {**GOOD, "teacher_hints": [{"messages": GOOD["messages"]}]})
    argv = tiny_models.argv(tmp_path / "run", models, dataset=file, eval_size=0)
    assert_refused(
        capfd, tmp_path, argv, f"rows:2 ({file}:2): has teacher_hints, which come after a turn", "teacher_messages"
    )


def test_a_file_without_rows_or_with_fewer_than_are_held_out(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, models: Models
):
    empty = write(tmp_path / "empty.jsonl", "")
    assert_refused(capfd, tmp_path, tiny_models.argv(tmp_path / "run", models, dataset=empty), "has no rows")
    one = write(tmp_path / "one.jsonl", GOOD)
    assert_refused(
        capfd, tmp_path, tiny_models.argv(tmp_path / "run", models, dataset=one, eval_size=1), "lower eval_size"
    )


@pytest.mark.parametrize("side", ["messages", "teacher_messages", "system_prompt", "teacher_system_prompt"])
def test_a_prompt_longer_than_the_budget(side: str, capfd: pytest.CaptureFixture[str], tmp_path: Path, models: Models):
    rows: list[dict[str, Any]] = [{**GOOD, "id": str(n)} for n in range(5)]
    options: dict[str, Any] = {"eval_size": 0}
    if "system" in side:
        options[side] = "12+" * 40
    else:
        rows[3] = {**rows[3], side: LONG["messages"]}
    file = write(tmp_path / "rows.jsonl", *rows)
    argv = tiny_models.argv(tmp_path / "run", models, dataset=file, **options)
    err = assert_refused(capfd, tmp_path, argv, "its prompt has 1", "the longest allowed is 122", "long_prompts=drop")
    assert (f"error: 0 ({file}:1):" if "system" in side else f"error: 3 ({file}:4):") in err
    limited = [*argv[:-1], argv[-1].split("=")[0] + "=1", "max_prompt_tokens=8"]
    err = assert_refused(capfd, tmp_path, limited, "the longest allowed is 8 (max_prompt_tokens=8)")
    assert "raise max_prompt_tokens" in err and "max_tokens=" not in err.replace("max_prompt_tokens=", "")


def test_long_prompts_can_be_left_out_and_are_counted(
    tmp_path: Path, models: Models, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
):
    rows = [{**GOOD, "id": str(n)} for n in range(4)] + [{**LONG, "id": "long"}]
    file = write(tmp_path / "rows.jsonl", *rows)
    path = run(tmp_path / "run", models, dataset=file, long_prompts="drop", eval_size=0, groups_per_batch=8)
    used = {episode["row_id"] for episode in tiny_models.episodes(path, 1) + tiny_models.episodes(path, 2)}
    assert used == {"0", "1", "2", "3"}
    assert "left out 1 of 5 training rows: prompts over 122 tokens" in caplog.text
    file = write(tmp_path / "long.jsonl", LONG)
    argv = tiny_models.argv(tmp_path / "run2", models, dataset=file, long_prompts="drop", eval_size=0)
    assert_refused(capfd, tmp_path, argv, "every prompt is longer than 122 tokens")


# --- models


def permuted(folder: str, target: Path) -> str:
    """The same model, whose tokenizer gives two ids each other's meaning."""
    shutil.copytree(folder, target)
    file = target / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    file.write_text(json.dumps(tokenizer))
    return str(target)


def without(*patterns: str) -> Callable[[str, Path], str]:
    return lambda folder, target: tiny_models.copy_without(folder, target, *patterns)


def emptied(name: str, text: str = "") -> Callable[[str, Path], str]:
    def damage(folder: str, target: Path) -> str:
        shutil.copytree(folder, target)
        (target / name).write_text(text)
        return str(target)

    return damage


def broken_template(folder: str, target: Path) -> str:
    return emptied("chat_template.jinja", "{{ messages[0]['content'] }}")(folder, target)


DAMAGE: dict[str, tuple[Callable[[str, Path], str], tuple[str, ...]]] = {
    "no tokenizer": (without("tokenizer*"), ("has no tokenizer", "save_pretrained")),
    "no weights": (without("*.safetensors"), ("has no weights", "*.safetensors")),
    "no config": (without("config.json"), ("has no config.json",)),
    "torn weights": (emptied("model.safetensors", "torn"), ("cannot load the weights",)),
    "torn tokenizer": (emptied("tokenizer.json", "{"), ("cannot load the tokenizer",)),
    "torn config": (emptied("config.json", "{"), ("config",)),
    "template that drops turns": (broken_template, ("its chat template", "Way out")),
}


@pytest.mark.parametrize("side", ["model_name", "teacher_model"])
@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_model_folder(
    case: str, side: str, capfd: pytest.CaptureFixture[str], tmp_path: Path, models: Models
):
    damage, parts = DAMAGE[case]
    folder = damage(models[side], tmp_path / "damaged")
    argv = tiny_models.argv(tmp_path / "run", {**models, side: folder})
    assert_refused(capfd, tmp_path, argv, folder, *parts)


def test_a_teacher_with_another_tokenizer_names_both(capfd: pytest.CaptureFixture[str], tmp_path: Path, models: Models):
    other = permuted(models["teacher_model"], tmp_path / "permuted")
    argv = tiny_models.argv(tmp_path / "run", {**models, "teacher_model": other})
    parts = (models["model_name"], other, "2 of 21 ids", "'1' and '2'", "model family")
    assert_refused(capfd, tmp_path, argv, *parts)


def test_names_that_lead_nowhere(capfd: pytest.CaptureFixture[str], tmp_path: Path, models: Models):
    for options, part in (
        ({"model_name": tmp_path / "nowhere"}, "no such folder"),
        ({"model_name": "embedded:genius"}, "embedded:teacher, embedded:student"),
        ({"teacher_model": "nobody/nothing"}, "nobody/nothing"),
        ({"teacher_checkpoint": tmp_path / "nowhere"}, "no such checkpoint folder"),
        ({"load_checkpoint_path": models["teacher_model"] + "/model.safetensors"}, "no such checkpoint folder"),
    ):
        argv = tiny_models.argv(tmp_path / "run", models, **options)
        assert_refused(capfd, tmp_path, argv, part)


def test_a_checkpoint_of_another_rank_or_shape(capfd: pytest.CaptureFixture[str], tmp_path: Path, models: Models):
    lora = tiny_models.final(run(tmp_path / "lora", models, lora_rank=2, max_steps=1))
    argv = tiny_models.argv(tmp_path / "run", models, load_checkpoint_path=lora, lora_rank=3)
    assert_refused(capfd, tmp_path, argv, "has rank 2", "lora_rank=2")
    argv = tiny_models.argv(tmp_path / "run", models, load_checkpoint_path=models["teacher_model"])
    assert_refused(capfd, tmp_path, argv, "vocab_size")
    wide = {**models, "model_name": models["teacher_model"]}
    assert_refused(capfd, tmp_path, tiny_models.argv(tmp_path / "run", wide, load_checkpoint_path=lora), str(lora))


# --- the run's folder


def test_what_may_be_done_with_a_folder_that_holds_a_run(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, models: Models
):
    path = run(tmp_path / "run", models)
    before = fingerprint(path)

    def given(**options: Any) -> list[str]:
        return tiny_models.argv(path, models, **options)

    changed = {"seed": 7, "loss_fn_config__is_cap": 5.0, "learning_rate": 0.02}
    for behavior in ("ask", "resume"):  # no terminal to ask on
        err = assert_refused(capfd, tmp_path, given(behavior_if_log_dir_exists=behavior, **changed), str(path))
        assert "seed: 0 there, 7 now" in err and "learning_rate: 0.01 there, 0.02 now" in err
        assert "is_cap" not in err and "behavior_if_log_dir_exists=delete" in err
    raised = assert_refused(capfd, tmp_path, given(behavior_if_log_dir_exists="raise"), "holds a run")
    assert "behavior_if_log_dir_exists=raise" in raised
    assert cli(capfd, given(behavior_if_log_dir_exists="resume"))[0] == 0
    assert fingerprint(path) == before
    assert cli(capfd, given(behavior_if_log_dir_exists="delete", seed=7, max_steps=1))[0] == 0
    assert [row["step"] for row in tiny_models.training_rows(path)] == [1]
    assert not (path / "episodes" / "step_000002.jsonl").exists()


def test_a_folder_that_is_no_run_is_never_touched(capfd: pytest.CaptureFixture[str], tmp_path: Path, models: Models):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    for behavior in ("ask", "delete"):
        argv = tiny_models.argv(folder, models, behavior_if_log_dir_exists=behavior)
        assert_refused(capfd, tmp_path, argv, "is not a run's folder", "thesis.tex")
    argv = tiny_models.argv(Path(models["model_name"]), models, behavior_if_log_dir_exists="delete")
    assert_refused(capfd, tmp_path, argv, "is not a run's folder")
    assert Path(models["model_name"], "model.safetensors").exists()


def test_a_teacher_that_cannot_score_leaves_no_folder(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch
):
    """Not the user's mistake, so exit code 1; but an empty run would refuse the corrected command."""
    monkeypatch.setattr(TransformersScorer, "head", lambda self, hidden: torch.full((len(hidden), 25), torch.nan))
    code, err = cli(capfd, tiny_models.argv(tmp_path / "run", models))
    assert code == 1 and "error: teacher " in err and "Traceback" not in err
    assert not (tmp_path / "run").exists()


# --- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_keeps_the_last_checkpoint_and_the_run_goes_on_when_there_is_room(
    capfd: pytest.CaptureFixture[str], small_disk: Path, tmp_path: Path, models: Models
):
    options: dict[str, Any] = {"max_steps": 8, "save_every": 1, "keep_checkpoints": 0, "eval_size": 0}
    argv = tiny_models.argv(small_disk / "run", models, **options)
    code, err = cli(capfd, argv)
    assert code == 1 and len(re.findall("^error: ", err, re.MULTILINE)) == 1 and "Traceback" not in err
    assert "The disk is full" in err and "the same command goes on" in err
    assert leftovers(small_disk) == []
    kept = sorted((small_disk / "run" / "checkpoints").iterdir())
    assert kept and all((folder / "trainer_state" / "complete.json").exists() for folder in kept)
    subprocess.run(["mount", "-o", "remount,size=10m", str(small_disk)], check=True)
    assert cli(capfd, argv)[0] == 0
    assert fingerprint(small_disk / "run") == fingerprint(run(tmp_path / "straight", models, **options))


def test_a_checkpoint_that_cannot_be_written_is_one_message(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch
):
    path = run(tmp_path / "run", models, max_steps=1)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    code, err = cli(capfd, tiny_models.argv(path, models, max_steps=2))
    assert code == 1 and len(re.findall("^error: ", err, re.MULTILINE)) == 1 and "Traceback" not in err
    assert "The disk is full" in err and f"last complete checkpoint is {path}/checkpoints/step_000001" in err
    assert leftovers(path) == [] and [p.name for p in (path / "checkpoints").iterdir()] == ["step_000001"]


def test_a_row_that_names_another_teacher(capfd: pytest.CaptureFixture[str], tmp_path: Path, models: Models):
    file = write(tmp_path / "rows.jsonl", GOOD, {**GOOD, "id": "b", "teacher": "nobody"})
    argv = tiny_models.argv(tmp_path / "run", models, dataset=file, eval_size=0)
    assert_refused(capfd, tmp_path, argv, f"b ({file}:2): its teacher is 'nobody'", "Remove the key")
