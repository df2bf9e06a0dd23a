"""Whole runs whose student is sampled on a real vLLM in their own process, which is killed and signalled."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
import tiny_models
from tiny_models import training_rows
from vllm_runs import OPTIONS, check_it_learnt_like, evaluated, in_this_process, models, small, steps_done, until

from errors import ProtegeError
from models.vllm.in_process import InProcessEngine
from models.vllm.orphans import runs

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm
__all__ = ["in_this_process", "models", "small"]  # fixtures


def test_in_process_a_run_learns_as_on_transformers(tmp_path: Path, models: dict[str, str], in_this_process: Path):
    before = psutil.Process().children(recursive=True)
    run = tiny_models.run(
        tmp_path / "run", models, **OPTIONS, sampler="vllm", sampler__enforce_eager=True, sampler__max_model_len=128
    )
    check_it_learnt_like(run, in_this_process)
    left = [p for p in psutil.Process().children(recursive=True) if p not in before and runs(p)]
    assert not [p for p in left if "resource_tracker" not in " ".join(p.cmdline())], left


def in_a_group_of_its_own() -> None:
    os.setsid()


def start_run(folder: Path, models: dict[str, str], first: Callable[[], None]) -> BaseProcess:
    """Without an end, on an engine of its own."""
    options = {**OPTIONS, "max_steps": 1000, "sampler": "vllm", "sampler__enforce_eager": True}
    return tiny_models.start(tiny_models.argv(folder / "run", models, **options), folder / "output", first=first)


@pytest.mark.parametrize("when", ["while it starts", "in a step"])
def test_an_engine_ends_with_a_run_of_an_adapter_that_is_killed(tmp_path: Path, models: dict[str, str], when: str):
    options = {**OPTIONS, "max_steps": 1000, "sampler": "vllm", "sampler__enforce_eager": True, "lora_rank": 4}
    process = tiny_models.start(tiny_models.argv(tmp_path / "run", models, **options), tmp_path / "output")
    assert process.pid is not None
    parent, seen = psutil.Process(process.pid), set()

    def engines() -> set[psutil.Process]:
        return {p for p in parent.children(recursive=True) if "multiprocessing" in " ".join(p.cmdline())}

    try:
        if when == "in a step":
            until(lambda: steps_done(tmp_path / "run") >= 1 or process.exitcode is not None)
            assert process.exitcode is None, (tmp_path / "output").read_text()
            assert training_rows(tmp_path / "run")[0]["sampler_gap/max"] < 0.01, "the adapter was sampled from"
        else:
            until(lambda: bool(engines()) or process.exitcode is not None)
        seen = set(parent.children(recursive=True))
        assert seen
    finally:
        process.kill()
    until(lambda: not [p for p in seen if runs(p)])


def test_a_signal_to_the_run_and_its_engine_loses_no_finished_step(tmp_path: Path, models: dict[str, str]):
    process = start_run(tmp_path, models, in_a_group_of_its_own)
    until(lambda: steps_done(tmp_path / "run") >= 2 or process.exitcode is not None)
    assert process.exitcode is None and process.pid is not None, (tmp_path / "output").read_text()
    started = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGTERM)
    assert tiny_models.finish(process) == 143, (tmp_path / "output").read_text()
    steps = len(training_rows(tmp_path / "run"))
    assert tiny_models.final(tmp_path / "run").name == f"step_{steps:06d}"
    assert not tiny_models.leftovers(tmp_path / "run")
    until(lambda: not [p for p in started if runs(p)])


def in_the_third_update(act: Callable[[], object]) -> None:
    """Of the weights, while the engine reads them: after two steps."""
    call, updates = InProcessEngine._call, []

    async def acting(self: InProcessEngine, method: str, *args: Any, **kwargs: Any) -> Any:
        if "reload_weights" in args:
            updates.append(args)
            if len(updates) == 3:
                asyncio.get_running_loop().call_soon(act)
        return await call(self, method, *args, **kwargs)

    InProcessEngine._call = acting  # type: ignore[method-assign]


def kill_the_engine() -> None:
    for process in psutil.Process().children(recursive=True):
        if "VLLM" in process.name():
            process.kill()


def whose_engine_is_killed() -> None:
    in_the_third_update(kill_the_engine)


def whose_group_has_a_signal() -> None:
    in_a_group_of_its_own()
    in_the_third_update(lambda: os.killpg(0, signal.SIGTERM))


def test_an_engine_that_is_killed_while_it_takes_weights_ends_the_run(tmp_path: Path, models: dict[str, str]):
    process = start_run(tmp_path, models, whose_engine_is_killed)
    until(lambda: steps_done(tmp_path / "run") >= 2 or process.exitcode is not None)
    assert tiny_models.finish(process) == 1, (tmp_path / "output").read_text()
    said = (tmp_path / "output").read_text().splitlines()
    assert "no engine is left" in said[-1] and "while it took new weights" in said[-1]
    assert not [line for line in said if line.startswith("Traceback")]
    assert len(training_rows(tmp_path / "run")) == 2
    assert not tiny_models.leftovers(tmp_path / "run")


def test_a_signal_to_the_run_and_its_engine_while_it_takes_weights(tmp_path: Path, models: dict[str, str]):
    process = start_run(tmp_path, models, whose_group_has_a_signal)
    until(lambda: steps_done(tmp_path / "run") >= 2 or process.exitcode is not None)
    assert tiny_models.finish(process) == 143, (tmp_path / "output").read_text()
    assert tiny_models.final(tmp_path / "run").name == "step_000002"
    assert not tiny_models.leftovers(tmp_path / "run")


def test_an_engine_that_does_not_start_leaves_nothing(tmp_path: Path, models: dict[str, str]):
    """Its own process finds the weights broken, after that was started."""
    before = set(psutil.Process().children(recursive=True))
    start_engine = InProcessEngine.start

    async def broken(self: InProcessEngine, model: Path, label: str) -> None:
        (model / "model.safetensors").write_bytes(b"no tensors")
        await start_engine(self, model, label)

    with mock.patch.object(InProcessEngine, "start", broken), pytest.raises(ProtegeError, match="vLLM did not start"):
        tiny_models.run(tmp_path / "run", models, sampler="vllm", sampler__enforce_eager=True)
    left = [p for p in psutil.Process().children(recursive=True) if p not in before and runs(p)]
    assert not [p for p in left if "resource_tracker" not in " ".join(p.cmdline())], left
    assert not tiny_models.leftovers(tmp_path) and not (tmp_path / "run").exists()


def test_an_evaluation_in_this_process_is_of_the_adapter_that_was_named(tmp_path: Path, models: dict[str, str]):
    trained = tiny_models.run(tmp_path / "run", models, lora_rank=2, max_steps=8, learning_rate=0.1)
    adapter = {"model_name": models["model_name"], "load_checkpoint_path": tiny_models.final(trained)}
    engine = {"sampler": "vllm", "sampler.enforce_eager": True, "sampler.max_model_len": 128}
    assert evaluated(tmp_path, **adapter, **engine) == evaluated(tmp_path, **adapter)
    assert evaluated(tmp_path, model_name=models["model_name"]) != evaluated(tmp_path, **adapter)
