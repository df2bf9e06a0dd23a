"""Whole runs whose student is sampled on real vLLM servers, which are killed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import tiny_models
from vllm_runs import (
    OPTIONS,
    check_it_learnt_like,
    evaluated,
    in_this_process,
    models,
    small,
    steps_done,
    until,
    vllm_server,
)

from errors import ConfigError
from recipes import capture_teacher
from recipes.cli import parse_config

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm
__all__ = ["in_this_process", "models", "small"]  # fixtures


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
