"""`python -m recipes.serve_teacher`: its options, and a real process that is killed, restarted and ended."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import numpy as np
import psutil
import pytest
import tiny_models
import torch

from errors import ConfigError, ModelError, TeacherError
from models.causal_lm import CausalLM
from models.loading import load_model
from models.sources import ModelSource
from models.teacher_service.client import RemoteScorer, describe
from models.teacher_service.messages import ServiceInfo
from models.transformers_scorer import TransformersScorer
from models.types import SignalKind, TeacherView
from recipes import serve_teacher
from recipes.cli import parse_config
from recipes.teachers import weights_fingerprint

TOKEN = "correct-horse-battery-staple"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def config(*argv: str) -> serve_teacher.Config:
    return parse_config(serve_teacher.Config, argv)


# --- options


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "give model_name, or models.0.model_name"),
        (["model_name=a", "models.0.model_name=b"], "one way or the other"),
        (["models.0.model_name=a", "name=b"], "models.0.name"),
        (["models.0.model_name=x/a", "models.1.model_name=y/a"], "two models are called 'a'"),
        (["model_name=a", "name=a b"], "no name for a model"),
        (["model_name=a", "name=../a"], "no name for a model"),
        (["model_name=a", "max_top_k=0"], "max_top_k=0"),
        (["model_name=a", "score_tokens=0"], "score_tokens=0"),
        (["model_name=a", "grace_s=-1"], "grace_s=-1"),
        (["model_name=a", "port=99999"], "port=99999: expected at most 65535"),
        (["model_name=a", "port=-1"], "port=-1"),
        (["model_name=a", "token=abc"], "unknown option token"),
        (["model_name=a", "dtype=int8"], "dtype=int8"),
    ],
)
def test_options_that_make_no_sense_are_refused(argv: list[str], says: str):
    with pytest.raises(ConfigError, match=re.escape(says)):
        config(*argv)


@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("Qwen/Qwen3-0.6B", "Qwen3-0.6B"),
        ("./folder/", "folder"),
        ("x/model.gguf", "model"),
        ("embedded:teacher", "teacher"),
    ],
)
def test_a_model_is_called_by_the_last_part_of_its_name(name: str, called: str):
    assert [serve_teacher.name_of(m) for m in config(f"model_name={name}").all_models()] == [called]


def test_what_is_said_of_a_model_needs_no_weights_and_equal_weights_are_shared(teacher: str, student: str):
    models = serve_teacher.served_models(
        config(
            f"models.0.model_name={teacher}", "models.0.name=a", f"models.1.model_name={teacher}/", "models.1.name=b",
            f"models.2.model_name={student}", "device=cpu",
        )
    )  # fmt: skip
    a, b, c = models
    assert a.checkpoint is b.checkpoint is not c.checkpoint
    assert a.info.weights == b.info.weights == weights_fingerprint(ModelSource(teacher)) != c.info.weights
    assert a.info.tokenizer == c.info.tokenizer, "the same tokenizer under two models"
    assert (a.info.hidden_size, a.info.context_length, a.info.dtype) == (24, 128, "float32")
    assert not any(model.checkpoint.in_memory for model in models)


@pytest.mark.anyio
async def test_files_that_changed_since_the_start_are_not_loaded(tmp_path: Path):
    folder = tiny_models.make_model(tmp_path / "m", seed=1)
    (model,) = serve_teacher.served_models(config(f"model_name={folder}", "device=cpu"))
    tiny_models.make_model(tmp_path / "m", seed=2)
    with pytest.raises(ModelError, match="changed"):
        model.checkpoint._load()


def test_a_model_that_is_not_there_is_said_at_once():
    with pytest.raises(ModelError, match="no such folder"):
        serve_teacher.main(config("model_name=./nothing", "port=0"))


# --- a real process


@contextmanager
def process(*argv: str, port: int = 0) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A service in a process of its own, and its address."""
    command = [sys.executable, "-m", "recipes.serve_teacher", *argv, f"port={port}", "device=cpu"]
    environment = {**os.environ, "PROTEGE_TEACHER_TOKEN": TOKEN}
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert started.stdout is not None
        url = None
        for line in started.stdout:
            if found := re.match(r"serving on (\S+), with a token", line):
                url = found[1]
                break
        assert url is not None, "it ended before it listened"
        yield started, url
    finally:
        if started.poll() is None:
            started.kill()
        started.wait(20)


def view(seed: int) -> TeacherView:
    ids = np.random.default_rng(seed).integers(1, 20, size=40)
    return TeacherView(ids, np.arange(10, 40), np.arange(10, 40))


async def described(url: str) -> ServiceInfo:
    info = await describe(url, TOKEN)
    assert info is not None
    return info


@pytest.mark.slow
@pytest.mark.anyio
async def test_a_service_that_is_killed_and_started_again_in_mid_run_is_waited_for(teacher: str, student: str):
    lm = CausalLM(
        load_model(ModelSource(teacher), dtype=torch.float32, device=torch.device("cpu"), attn_implementation="sdpa")
    )
    truth = TransformersScorer("near", lm)
    answers: dict[int, torch.Tensor] = {}
    with process(f"model_name={teacher}") as (first, url):
        scorer = RemoteScorer("far", url, await described(url), "teacher", token=TOKEN, wait_s=300)

        async def run() -> None:
            for i in range(60):
                (signal,) = await scorer.score([view(i)], SignalKind.SAMPLED)
                assert signal.logprobs is not None
                answers[i] = signal.logprobs
                await anyio.sleep(0.02)

        port = int(url.rpartition(":")[2])
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run)
            while len(answers) < 10:
                await anyio.sleep(0.01)
            os.kill(first.pid, signal.SIGKILL)
            first.wait(20)
            with process(f"model_name={teacher}", port=port) as (second, again):
                assert again == url
                while len(answers) < 60:
                    await anyio.sleep(0.05)
                assert psutil.Process(second.pid).children() == []
                os.kill(second.pid, signal.SIGTERM)
                assert second.wait(30) == 0
    for i, logprobs in answers.items():
        (expected,) = await truth.score([view(i)], SignalKind.SAMPLED)
        torch.testing.assert_close(logprobs, expected.logprobs, atol=1e-4, rtol=0)

    with (
        process(f"model_name={student}", "name=teacher", port=port),
        pytest.raises(TeacherError, match="other weights"),
    ):
        await scorer.score([view(0)], SignalKind.SAMPLED)
