"""SIGTERM and Ctrl-C reach a run wherever it is: between two micro-batches, or waiting for a teacher that is frozen."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny_models
from service_process import ENDS_IN_S, Process, started
from tiny_models import REVERSE_KL, training_rows

PATIENT = {"teacher.timeout_s": 10 * ENDS_IN_S, "teacher.patience_s": 10 * ENDS_IN_S}
PACKS = {"micro_batch_tokens": 16, "group_size": 2, "eval_size": 8, **REVERSE_KL}


def packs(output: Path) -> list[str]:
    return [line for line in output.read_text().splitlines() if line.startswith("pack ")]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
@pytest.mark.parametrize("phase", ["evaluation", "training"])
def test_no_further_micro_batch_is_begun(tmp_path: Path, models: dict[str, str], phase: str, number: int):
    """In the first of many, the process gets the signal."""
    argv = tiny_models.argv(tmp_path / "run", models, **PACKS)
    interrupt = (f"pack in {phase}:{int(number)}", 0)
    process = tiny_models.start(argv, tmp_path / "output", interrupt=interrupt)
    assert tiny_models.finish(process) == 128 + number
    assert packs(tmp_path / "output") == ["pack 1 of many"], (tmp_path / "output").read_text()
    assert not list((tmp_path / "run" / "checkpoints").glob("*")), "no step was finished"


def connected(process: Any, service: Process) -> None:
    """Wait until the run has a connection to the service."""
    port, deadline = int(service.url.rpartition(":")[2]), time.monotonic() + ENDS_IN_S
    while not any(c.raddr and c.raddr.port == port for c in psutil.Process(process.pid).net_connections()):
        assert process.exitcode is None and time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_waits_at_its_start_for_a_frozen_teacher(
    tmp_path: Path, models: dict[str, str], teacher: str, number: int
):
    """It would end by itself too, after a while: as a mistake, with exit code 2."""
    with started(tmp_path, teacher) as service:
        given = {"teacher.url": service.url, **REVERSE_KL}
        service.send(signal.SIGSTOP)
        run = tiny_models.start(tiny_models.argv(tmp_path / "run", models, **given), tmp_path / "of-run")
        connected(run, service)
        os.kill(run.pid or 0, number)
        assert tiny_models.finish(run) == 128 + number
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_whose_teacher_is_frozen_saves_its_last_step_and_goes_on_later(
    tmp_path: Path, models: dict[str, str], teacher: str, number: int
):
    argv = dict(max_steps=400, eval_size=0, **PATIENT, **REVERSE_KL)
    with started(tmp_path, teacher) as service:
        given = {"teacher.url": service.url, **argv}
        run = tiny_models.start(tiny_models.argv(tmp_path / "run", models, **given), tmp_path / "of-run")
        metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + ENDS_IN_S
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 2):
            assert run.exitcode is None and time.monotonic() < deadline, (tmp_path / "of-run").read_text()
            time.sleep(0.01)
        service.send(signal.SIGSTOP)
        before = -1
        while before != (before := metrics.read_bytes().count(b"\n")):  # until it waits
            time.sleep(0.5)
        os.kill(run.pid or 0, number)
        assert tiny_models.finish(run) == 128 + number
        assert "interrupted" in (tmp_path / "of-run").read_text()
        (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
        assert saved.name == f"step_{before:06d}" == f"step_{training_rows(tmp_path / 'run')[-1]['step']:06d}"
        service.send(signal.SIGCONT)
        given["max_steps"] = before + 1
        again = tiny_models.start(tiny_models.argv(tmp_path / "run", models, **given), tmp_path / "of-again")
        assert tiny_models.finish(again) == 0, (tmp_path / "of-again").read_text()
        assert [row["step"] for row in training_rows(tmp_path / "run")] == list(range(1, before + 2))


def test_ctrl_c_ends_an_evaluation_that_no_loop_watches_over(tmp_path: Path, models: dict[str, str]):
    given = {
        **models,
        "dataset": "arithmetic",
        "eval_size": 200,
        "max_tokens": 12,
        "device": "cpu",
    }  # some packs of 512
    argv = [f"{key}={value}" for key, value in given.items()]
    interrupt = (f"pack in evaluation:{int(signal.SIGINT)}", 0)
    process = tiny_models.start(argv, tmp_path / "output", interrupt=interrupt, recipe="evaluate")
    assert tiny_models.finish(process) == 130
    assert packs(tmp_path / "output") == ["pack 1 of many"], (tmp_path / "output").read_text()
