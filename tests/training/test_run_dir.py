"""A run's folder survives kills, second processes and its owner's mistakes."""

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from errors import ConfigError
from training.run_dir import open_run_dir, read_config, read_metrics

ROOT = Path(__file__).parents[2]
CONFIG = {"learning_rate": 1e-4, "max_steps": 10, "eval": {"every": 5}}
PRELUDE = "import os, sys, time\nfrom pathlib import Path\nfrom training.run_dir import open_run_dir\n"


def opened(path, config=CONFIG, behavior="ask", **options):
    return open_run_dir(path, config, behavior, **{"interactive": False, **options})


def python(script: str, *argv: object) -> subprocess.Popen:
    command = [sys.executable, "-c", PRELUDE + script, *map(str, argv)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def save(text):
    def write(folder):
        (folder / "model.safetensors").write_text(text)

    return write


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


# Opening


def test_a_new_folder_gets_the_layout_and_the_config(tmp_path):
    with opened(tmp_path / "a" / "run") as run:
        assert not run.resumed
        assert names(run.path) == [".lock", "checkpoints", "config.json", "episodes"]
    assert read_config(run.path) == CONFIG
    assert names(tmp_path) == ["a"]


def test_the_same_config_resumes_without_asking(tmp_path):
    opened(tmp_path).close()
    assert opened(tmp_path, ask=lambda question: pytest.fail("asked"), interactive=True).resumed


def test_tuples_paths_sets_and_nan_compare_equal_to_what_was_saved(tmp_path):
    config = {"betas": (0.9, 0.95), "path": Path("/x"), "keys": frozenset("abcdef"), "x": math.nan}
    opened(tmp_path, config).close()
    assert opened(tmp_path, config).resumed


@pytest.mark.parametrize("behavior", ["ask", "resume"])
def test_another_config_is_refused_with_every_differing_key_and_the_ways_out(tmp_path, behavior):
    opened(tmp_path).close()
    other = {"learning_rate": 1e-3, "max_steps": 10, "eval": {"every": 2}, "seed": 1}
    with pytest.raises(ConfigError) as raised:
        opened(tmp_path, other, behavior)
    for part in (
        str(tmp_path),
        "learning_rate: 0.0001 there, 0.001 now",
        "eval.every: 5 there, 2 now",
        "seed: (not set) there, 1 now",
        "behavior_if_log_dir_exists=delete",
        "another log_path",
    ):
        assert part in str(raised.value)
    assert "max_steps" not in str(raised.value)
    assert read_config(tmp_path) == CONFIG


@pytest.mark.parametrize("behavior", ["ask", "resume"])
def test_options_that_may_differ_resume_and_become_the_config(tmp_path, behavior):
    opened(tmp_path).close()
    other = {**CONFIG, "max_steps": 20, "eval": {"every": 2}}
    assert opened(tmp_path, other, behavior, may_differ=frozenset({"max_steps", "eval"})).resumed
    assert read_config(tmp_path) == other


@pytest.mark.parametrize(("answers", "resumed"), [(["resume"], True), (["huh", " Delete "], False)])
def test_on_a_terminal_the_user_decides_after_seeing_the_difference(tmp_path, answers, resumed):
    with opened(tmp_path) as run:
        run.append_metrics({"step": 1})
    questions = []

    def ask(question):
        questions.append(question)
        return answers[len(questions) - 1]

    run = opened(tmp_path, {**CONFIG, "max_steps": 11}, interactive=True, ask=ask)
    assert "max_steps: 10 there, 11 now" in questions[0] and len(questions) == len(answers)
    assert run.resumed == resumed and len(run.read_metrics()) == resumed


def test_raise_and_a_closed_terminal_stop(tmp_path):
    opened(tmp_path).close()

    def closed(question):
        raise EOFError

    with pytest.raises(ConfigError, match="max_steps"):
        opened(tmp_path, {**CONFIG, "max_steps": 11}, interactive=True, ask=closed)
    with pytest.raises(ConfigError, match="holds a run"):
        opened(tmp_path, behavior="raise")
    assert not opened(tmp_path / "new", behavior="raise").resumed


@pytest.mark.parametrize("behavior", ["ask", "resume", "delete", "raise"])
def test_a_folder_that_is_no_run_is_refused_and_not_touched(tmp_path, behavior):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')  # a model has one too
    (tmp_path / "model.safetensors").write_text("weights")
    with pytest.raises(ConfigError, match=r"not a run's folder.*model\.safetensors"):
        opened(tmp_path, behavior=behavior)
    assert names(tmp_path) == ["config.json", "model.safetensors"]


def test_a_file_or_an_unwritable_place_as_log_path_is_a_config_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        opened(tmp_path / "file")
    with pytest.raises(ConfigError, match="cannot use this folder"):
        opened(tmp_path / "file" / "run")


def test_delete_starts_over_with_nothing_left(tmp_path):
    with opened(tmp_path) as run:
        run.append_metrics({"step": 1})
        run.write_episodes(1, [{"a": 1}])
        run.write_checkpoint(1, save("x"))
        run.report_path.write_text("")
    with opened(tmp_path, {"seed": 7}, "delete") as run:
        assert not run.resumed and run.latest_checkpoint() is None and run.read_metrics() == []
        assert names(tmp_path) == [".lock", "checkpoints", "config.json", "episodes"]
        assert names(run.episodes_path) == []
    assert read_config(tmp_path) == {"seed": 7}


@pytest.mark.parametrize("foreign", ["notes.txt", "checkpoints/best/model", "episodes/mine.jsonl"])
def test_delete_refuses_and_removes_nothing_if_there_is_something_of_the_users(tmp_path, foreign):
    with opened(tmp_path) as run:
        run.write_checkpoint(1, save("x"))
    (tmp_path / foreign).parent.mkdir(exist_ok=True)
    (tmp_path / foreign).write_text("precious")
    with pytest.raises(ConfigError, match=Path(foreign).parts[0]):
        opened(tmp_path, behavior="delete")
    assert (tmp_path / foreign).exists() and (tmp_path / "checkpoints/step_000001").exists()


def test_a_deletion_that_was_killed_is_finished_rather_than_resumed_from(tmp_path):
    with opened(tmp_path) as run:
        for step in (1, 2):
            run.write_checkpoint(step, save("x"))
    script = """
import training.run_dir as module
removed = []
def remove(path):
    if removed: os._exit(9)
    removed.append(path); module.atomic_remove(path)
module.atomic_remove, module.remove = module.remove, remove
open_run_dir(sys.argv[1], {"seed": 1}, "delete")
"""
    assert python(script, tmp_path).wait() == 9
    assert len(names(tmp_path / "checkpoints")) == 1
    with opened(tmp_path, CONFIG) as run:
        assert not run.resumed and run.latest_checkpoint() is None


def test_a_second_process_is_kept_out_until_the_first_has_died_even_by_kill_9(tmp_path):
    child = python(
        "run = open_run_dir(sys.argv[1], {\"a\": 1}, interactive=False)\nprint('open', flush=True); time.sleep(60)",
        tmp_path,
    )
    assert child.stdout and child.stdout.readline() == "open\n"
    for behavior in ("ask", "resume", "delete"):
        with pytest.raises(ConfigError, match=f"another run is using.*process {child.pid}"):
            opened(tmp_path, {"a": 1}, behavior)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert opened(tmp_path, {"a": 1}).resumed


def test_a_refused_open_gives_the_lock_back(tmp_path):
    opened(tmp_path).close()
    with pytest.raises(ConfigError):
        opened(tmp_path, behavior="raise")
    assert opened(tmp_path).resumed


# Metrics


def test_rows_are_readable_json_as_soon_as_they_are_appended(tmp_path):
    run = opened(tmp_path)
    run.append_metrics({"step": 1, "kl": math.nan, "max": math.inf, "loss": np.float32(0.5), "n": np.int64(3)})
    line = run.metrics_path.read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 1,
        "kl": None,
        "max": None,
        "loss": 0.5,
        "n": 3,
    }
    with pytest.raises(ValueError, match="step"):
        run.append_metrics({"kl": 1.0})


def test_resuming_drops_rows_after_the_checkpoint_and_a_torn_last_line(tmp_path):
    run = opened(tmp_path)
    for step in range(5):
        run.append_metrics({"step": step, "text": "ä"})
    with open(run.metrics_path, "a") as file:
        file.write('{"step": 5, "kl": 0.')
    run.truncate_metrics(3)
    assert [row["step"] for row in run.read_metrics()] == [0, 1, 2, 3]
    assert run.metrics_path.read_text().endswith("\n")
    run.append_metrics({"step": 4})
    assert [json.loads(line)["step"] for line in run.metrics_path.read_text().splitlines()] == [0, 1, 2, 3, 4]
    run.truncate_metrics(-1)
    assert run.metrics_path.read_text() == ""


def test_a_row_is_never_glued_to_a_torn_one(tmp_path):
    run = opened(tmp_path)
    run.append_metrics({"step": 1})
    with open(run.metrics_path, "a") as file:
        file.write('{"step": 2, "k')
    run.append_metrics({"step": 3})
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 3}]


def test_rewinding_forgets_episodes_too(tmp_path):
    run = opened(tmp_path)
    for step in (1, 2, 3):
        run.append_metrics({"step": step})
        run.write_episodes(step, [])
    run.rewind(2)
    assert [row["step"] for row in run.read_metrics()] == [1, 2]
    assert names(run.episodes_path) == ["step_000001.jsonl", "step_000002.jsonl"]


def test_episodes_hold_arrays_as_lists_and_an_iterator_that_fails_leaves_nothing(tmp_path):
    run = opened(tmp_path)
    row = {"ids": np.array([1, 2], dtype=np.int32), "logprobs": np.array([np.nan, -0.5], dtype=np.float32)}
    half = "half of a pair: \ud83d, and é"  # as a model may write it in a call's JSON, and UTF-8 cannot
    file = run.write_episodes(12, [row, {"text": "</script>\n"}, {"text": half}])
    assert file.name == "step_000012.jsonl"
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"ids": [1, 2], "logprobs": [None, -0.5]},
        {"text": "</script>\n"},
        {"text": half},
    ]
    with pytest.raises(ZeroDivisionError):
        run.write_episodes(13, (1 / 0 for _ in range(1)))
    assert names(run.episodes_path) == ["step_000012.jsonl"]
