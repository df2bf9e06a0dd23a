"""Whole runs whose student is sampled on a real vLLM: in their own process, and on servers that are killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import httpx2
import psutil
import pytest
import tiny_models
from tiny_models import evaluation_rows, training_rows

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
import vllm_server

from errors import ConfigError, ProtegeError
from models.vllm.in_process import InProcessEngine
from recipes import capture_teacher, evaluate
from recipes.cli import parse_config

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

OPTIONS: dict[str, Any] = {
    "objective": "jsd", "max_steps": 8, "max_tokens": 6, "eval_size": 16, "groups_per_batch": 16, "learning_rate": 3e-2,
}  # fmt: skip
SLACK = 1e-4  # nats of KL that rounding may make between sampler and learner


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """With heads that vLLM's attention on CPUs takes."""
    folder = tmp_path_factory.mktemp("vllm")
    return {
        "model_name": tiny_models.make_model(folder / "student", seed=1, hidden=64),
        "teacher_model": tiny_models.make_model(folder / "teacher", seed=2, hidden=64),
    }


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in vllm_server.SMALL_CPU.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def in_this_process(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that the others are compared with: sampled by transformers."""
    return tiny_models.run(tmp_path_factory.mktemp("transformers") / "run", models, **OPTIONS)


def kls(run: Path) -> list[float]:
    return [row["kl"] for row in training_rows(run)]


def check_it_learnt_like(run: Path, reference: Path) -> None:
    """The same fall of the KL but for the draws, and at every step a sampler that is the learner."""
    rows = training_rows(run)
    assert [row["step"] for row in rows] == list(range(1, OPTIONS["max_steps"] + 1))
    assert all(row["mismatch_kl"] < SLACK and row["sampler_gap/max"] < 0.01 for row in rows)
    before, after = (row["eval/exact_reverse_kl"] for row in evaluation_rows(run))
    _, expected = (row["eval/exact_reverse_kl"] for row in evaluation_rows(reference))
    assert after < 0.85 * before
    assert after == pytest.approx(expected, rel=0.2)
    assert not tiny_models.leftovers(run)


def test_in_process_a_run_learns_as_on_transformers(tmp_path: Path, models: dict[str, str], in_this_process: Path):
    before = psutil.Process().children(recursive=True)
    run = tiny_models.run(
        tmp_path / "run", models, **OPTIONS, sampler="vllm", sampler__enforce_eager=True, sampler__max_model_len=128
    )
    check_it_learnt_like(run, in_this_process)
    left = [p for p in psutil.Process().children(recursive=True) if p not in before and _runs(p)]
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
    until(lambda: not [p for p in seen if _runs(p)])


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
    until(lambda: not [p for p in started if _runs(p)])


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
    assert tiny_models.finish(process) == 1, (tmp_path / "output").read_text()
    said = (tmp_path / "output").read_text().splitlines()
    assert "no engine is left" in said[-1] and "while it took new weights" in said[-1]
    assert not [line for line in said if line.startswith("Traceback")]
    assert len(training_rows(tmp_path / "run")) == 2
    assert not tiny_models.leftovers(tmp_path / "run")


def test_a_signal_to_the_run_and_its_engine_while_it_takes_weights(tmp_path: Path, models: dict[str, str]):
    process = start_run(tmp_path, models, whose_group_has_a_signal)
    assert tiny_models.finish(process) == 143, (tmp_path / "output").read_text()
    assert tiny_models.final(tmp_path / "run").name == "step_000002"
    assert not tiny_models.leftovers(tmp_path / "run")


def test_an_engine_that_does_not_start_leaves_nothing(tmp_path: Path, models: dict[str, str]):
    """Its own process finds the weights broken, after that was started."""
    before = set(psutil.Process().children(recursive=True))
    start_engine = InProcessEngine.start

    async def broken(self: InProcessEngine, model: Path) -> None:
        (model / "model.safetensors").write_bytes(b"no tensors")
        await start_engine(self, model)

    with mock.patch.object(InProcessEngine, "start", broken), pytest.raises(ProtegeError, match="vLLM did not start"):
        tiny_models.run(tmp_path / "run", models, sampler="vllm", sampler__enforce_eager=True)
    left = [p for p in psutil.Process().children(recursive=True) if p not in before and _runs(p)]
    assert not [p for p in left if "resource_tracker" not in " ".join(p.cmdline())], left
    assert not tiny_models.leftovers(tmp_path) and not (tmp_path / "run").exists()


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def servers(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[vllm_server.Server]]:
    folder = tmp_path_factory.mktemp("servers")
    started = [start(models, folder / name) for name in ("a", "b")]
    try:
        yield [server.wait() for server in started]
    finally:
        for server in started:
            server.kill()


def start(models: dict[str, str], log: Path, port: int | None = None) -> vllm_server.Server:
    return vllm_server.start(
        models["model_name"],
        log,
        flags=vllm_server.SAMPLER_FLAGS,
        env=vllm_server.UPDATABLE,
        max_model_len=128,
        port=port,
    )


def until(condition: Callable[[], bool], timeout_s: float = 240.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not get there"
        time.sleep(0.05)


def steps_done(run: Path) -> int:
    return len(training_rows(run)) if (run / "metrics.jsonl").exists() else 0


EVALUATION = {"dataset": "arithmetic", "eval_size": 16, "samples": 0, "max_tokens": 6, "device": "cpu"}
GREEDY = ("eval/accuracy", "eval/greedy_length", "eval/greedy_truncated_fraction")


def evaluated(folder: Path, **options: Any) -> list[float]:
    given = {**EVALUATION, **options, "output_path": folder / "numbers.json"}
    recipe = evaluate
    recipe.main(parse_config(recipe.Config, [f"{key}={value}" for key, value in given.items()]))
    found = json.loads((folder / "numbers.json").read_text())
    return [found[name] for name in GREEDY]


def test_an_evaluation_in_this_process_is_of_the_adapter_that_was_named(tmp_path: Path, models: dict[str, str]):
    trained = tiny_models.run(tmp_path / "run", models, lora_rank=2, max_steps=8, learning_rate=0.1)
    adapter = {"model_name": models["model_name"], "load_checkpoint_path": tiny_models.final(trained)}
    engine = {"sampler": "vllm", "sampler.enforce_eager": True, "sampler.max_model_len": 128}
    assert evaluated(tmp_path, **adapter, **engine) == evaluated(tmp_path, **adapter)
    assert evaluated(tmp_path, model_name=models["model_name"]) != evaluated(tmp_path, **adapter)


def test_an_evaluation_and_a_capture_on_servers(
    tmp_path: Path, models: dict[str, str], servers: list[vllm_server.Server]
):
    """One server is handed what is evaluated, which the other then samples as what it was started with."""
    first, second = (server.url for server in servers)
    httpx2.post(first + "/pause", params={"mode": "keep"}).raise_for_status()  # as a run that was killed leaves it
    there = evaluated(tmp_path, model_name=models["teacher_model"], **{"sampler.url": first})
    assert there == evaluated(tmp_path, model_name=models["teacher_model"])
    recipe, options = capture_teacher, {
        "dataset": "arithmetic", "max_rows": 8, "max_tokens": 6, "device": "cpu", "top_k": 4, "completions": "teacher",
    }  # fmt: skip

    def capture(name: str, **more: Any) -> None:
        more["output_path"] = tmp_path / name
        recipe.main(parse_config(recipe.Config, [f"{key}={value}" for key, value in {**options, **more}.items()]))

    with pytest.raises(ConfigError, match="serves another model, or other weights"):
        capture("another.jsonl", teacher_model=models["model_name"], **{"sampler.url": first})
    capture("capture.jsonl", model_name=models["model_name"], **{"sampler.url": second, "teacher.url": second})
    assert len((tmp_path / "capture.jsonl").read_text().splitlines()) == 1 + 8


def test_servers_are_killed_one_by_one(
    tmp_path: Path, models: dict[str, str], servers: list[vllm_server.Server], in_this_process: Path
):
    """One of two: the run goes on. The other: it ends with one error, and the same command goes on later."""
    both = ",".join(server.url for server in servers)
    command = tiny_models.argv(tmp_path / "run", models, **OPTIONS, save_every=1, sampler__url=both)
    process = tiny_models.start([*command, "sampler.patience_s=2"], tmp_path / "output")
    until(lambda: steps_done(tmp_path / "run") >= 1)
    servers[0].kill()
    at = steps_done(tmp_path / "run")
    until(lambda: steps_done(tmp_path / "run") > at or process.exitcode is not None)
    assert process.exitcode in (None, 0), (tmp_path / "output").read_text()
    servers[1].kill()
    code = tiny_models.finish(process, 400)
    output = (tmp_path / "output").read_text()
    if steps_done(tmp_path / "run") < OPTIONS["max_steps"]:  # else it was done before the second kill
        assert code == 1, output
        assert output.count("no engine is left") == 1 and "Traceback" not in output, output

    port = int(servers[1].url.rpartition(":")[2])
    again = start(models, tmp_path / "again.log", port)
    try:
        again.wait()
        alone = tiny_models.argv(tmp_path / "run", models, **OPTIONS, save_every=1, sampler__url=again.url)
        resumed = tiny_models.start([*alone, "behavior_if_log_dir_exists=resume"], tmp_path / "output2")
        assert tiny_models.finish(resumed, 400) == 0, (tmp_path / "output2").read_text()
    finally:
        again.kill()
    check_it_learnt_like(tmp_path / "run", in_this_process)


def test_a_dead_server_is_named_before_anything_is_loaded(tmp_path: Path, models: dict[str, str]):
    command = tiny_models.argv(tmp_path / "run", models, sampler__url="http://127.0.0.1:9")
    process = tiny_models.start(command, tmp_path / "output")
    assert tiny_models.finish(process, 400) == 2
    assert "http://127.0.0.1:9 cannot be reached" in (tmp_path / "output").read_text()
    assert not os.path.exists(tmp_path / "run")
