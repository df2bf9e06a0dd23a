"""Signals to whole runs in processes of their own: to all of a group, and for the second time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from test_engines_that_die import CopyEngine
from tiny_models import ROOT, training_rows

from models.vllm.engine import Unreachable
from models.vllm.handover import Model
from models.vllm.sampler import VLLMSampler
from recipes import samplers
from training.learner import Learner

OPTIONS: dict[str, Any] = {"objective": "jsd", "max_steps": 100_000, "eval_size": 0, "groups_per_batch": 1}


class EngineOfThisGroup(CopyEngine):
    """Lives as long as a process that was started beside the run, and hears its signals."""

    def __init__(self) -> None:
        super().__init__("engine")
        self._process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])

    def _check(self) -> None:
        if self._process.poll() is not None:
            raise Unreachable("engine is gone")


def on_an_engine_of_this_group() -> None:
    os.setsid()

    def make(config: Any, student: Any, tokenizer: Any, *, servers: Any, folder: Path) -> VLLMSampler:
        engine = EngineOfThisGroup()
        return VLLMSampler([engine], Model(folder, tokenizer, "float32"), temperature=1.0, slots=64)

    samplers.make_sampler = make


def in_an_update_of_a_minute() -> None:
    """The third step's update says that it has begun, and sleeps on the device thread."""
    update, calls = Learner.forward_backward, []

    def slow(self: Learner, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            print("computing", flush=True)
            time.sleep(60)
        return update(self, *arguments)

    Learner.forward_backward = slow  # type: ignore[method-assign]


def until_said(output: Path, text: str, process: Any) -> None:
    deadline = time.monotonic() + 100
    while not output.exists() or text not in output.read_text():
        assert time.monotonic() < deadline and process.exitcode is None, output.read_text()
        time.sleep(0.02)


def test_a_signal_to_the_whole_group_loses_no_finished_step(tmp_path: Path, models: dict[str, str]):
    output = tmp_path / "output"
    process = tiny_models.start(
        tiny_models.argv(tmp_path / "run", models, **OPTIONS), output, first=on_an_engine_of_this_group
    )
    until_said(output, "step 2/", process)
    assert process.pid is not None
    os.killpg(process.pid, signal.SIGTERM)
    assert tiny_models.finish(process) == 143, output.read_text()
    assert "interrupted" in output.read_text() and "Traceback" not in output.read_text()
    steps = len(training_rows(tmp_path / "run"))
    assert tiny_models.final(tmp_path / "run").name == f"step_{steps:06d}"
    assert tiny_models.leftovers(tmp_path / "run") == []


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_waits_for_nothing(tmp_path: Path, models: dict[str, str], second: signal.Signals):
    output = tmp_path / "output"
    command = tiny_models.argv(tmp_path / "run", models, **OPTIONS, save_every=1)
    process = tiny_models.start(command, output, first=in_an_update_of_a_minute)
    until_said(output, "computing", process)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    until_said(output, "stopping", process)
    assert process.exitcode is None, "the first waits for the update"
    os.kill(process.pid, second)
    started = time.monotonic()
    assert tiny_models.finish(process) == 128 + second
    assert time.monotonic() - started < 20, "not for the minute that the update takes"
    assert "interrupted" in output.read_text() and "Traceback" not in output.read_text()
    assert tiny_models.final(tmp_path / "run").name == "step_000002", "the last checkpoint is whole"


LOADING = """
import os, time, chz
from models.device_thread import compute_blocking
from recipes.cli import run_cli
from training import signals
signals.EXIT_S = 1.0
@chz.chz
class Config: ...
def main(config):
    print("what stdout still holds")
    os.write(1, b"loading\\n")
    compute_blocking(time.sleep, 100)  # as a download that no exception reaches
run_cli(main, Config, argv=[])
"""


def test_what_cannot_be_interrupted_at_the_start_is_left_behind():
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    process = subprocess.Popen(
        [sys.executable, "-c", LOADING], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=buffered
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "loading\n"
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == "what stdout still holds\n"
        assert process.wait(10) == 143 and time.monotonic() - started < 20
    finally:
        process.kill()
        process.communicate()
