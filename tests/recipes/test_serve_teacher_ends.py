"""How `recipes.serve_teacher` ends: real signals to real processes, at every moment of their lives."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from models.teacher_service.messages import Reading, RequestFields, ScoreRequest, encode_request
from models.teacher_service.wire import MEDIA_TYPE
from models.transformers_scorer import TransformersScorer
from recipes import serve_teacher
from recipes.cli import run_cli

pytest.importorskip("uvicorn", reason="needs the packages of the extra `serve`, which `dev` brings")

from models.teacher_service.bounded_server import CUT_SHORT, BoundedServer

_FORKS = multiprocessing.get_context("forkserver")  # of a process that has imported what the first test here needs
TERM, INT = signal.SIGTERM, signal.SIGINT
ENDS_IN_S = 60  # far more than it takes, far less than what is computed where this is tested
EXIT_CODES = {TERM: 0, INT: 130}


def child(argv: list[str], output: str, hook: str, work_s: float) -> None:
    """`python -m recipes.serve_teacher argv…`, both streams to a file; `hook` names what is slow, or sends a signal."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.pop("PROTEGE_TEACHER_TOKEN", None)

    def slowly(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def slow(*arguments: Any, **options: Any) -> Any:
            print(f"in {name}", flush=True)
            time.sleep(work_s)
            return function(*arguments, **options)

        setattr(owner, name, slow)

    def signalled(owner: Any, name: str, number: int) -> None:
        function = getattr(owner, name)

        def killed(*arguments: Any, **options: Any) -> Any:
            os.kill(os.getpid(), number)
            return function(*arguments, **options)

        setattr(owner, name, killed)

    where, _, number = hook.partition(":")
    if where == "load":
        slowly(serve_teacher, "load_model")
    elif where == "batch":
        slowly(TransformersScorer, "_score")
    elif where:
        signalled(serve_teacher if where == "served_models" else BoundedServer, where, int(number))
    run_cli(serve_teacher.main, serve_teacher.Config, argv=argv)


@dataclass
class Process:
    process: BaseProcess
    output: Path

    def wait_for(self, pattern: str) -> str:
        deadline = time.monotonic() + ENDS_IN_S
        while time.monotonic() < deadline:
            if self.output.exists() and (found := re.search(pattern, self.output.read_text())):
                return found[found.re.groups]
            assert self.process.exitcode is None, self.output.read_text()
            time.sleep(0.01)
        raise TimeoutError(self.output.read_text())

    @property
    def url(self) -> str:
        return self.wait_for(r"serving on (http://\S+), without a token")

    def send(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def exit_code(self) -> int | None:
        self.process.join(ENDS_IN_S)
        return self.process.exitcode


@contextlib.contextmanager
def started(
    tmp_path: Path, teacher: str, *, hook: str = "", work_s: float = 0.0, grace_s: float = 0.5
) -> Iterator[Process]:
    output = tmp_path / "output"
    argv = [f"model_name={teacher}", "name=t", "port=0", "device=cpu", f"grace_s={grace_s}"]
    process = _FORKS.Process(target=child, args=(argv, str(output), hook, work_s))
    process.start()
    try:
        yield Process(process, output)
    finally:
        process.kill()
        process.join()


class Asking(threading.Thread):
    """A client with one request; `result` is its status, or how it was cut off."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.url = url
        self.result: int | str = ""
        self.start()

    def run(self) -> None:
        with httpx2.Client(trust_env=False, timeout=ENDS_IN_S) as client:
            (model,) = client.get(f"{self.url}/info").json()["models"]
            fields = RequestFields(model="t", weights=model["weights"], need="sampled", temperature=1.0)
            body = encode_request(ScoreRequest(fields, [Reading(np.arange(1, 9), np.arange(1, 8))]))
            try:
                self.result = client.post(
                    f"{self.url}/score", content=body, headers={"content-type": MEDIA_TYPE}
                ).status_code
            except httpx2.TransportError as error:
                self.result = type(error).__name__

    def answer(self) -> int | str:
        self.join(ENDS_IN_S)
        return self.result


@pytest.mark.parametrize("number", [TERM, INT])
@pytest.mark.parametrize("moment", ["serve", "startup", "main_loop"])
def test_a_signal_while_it_starts_to_serve_is_not_lost(tmp_path: Path, teacher: str, moment: str, number: int):
    """`serve` is called after it said that it serves, and before uvicorn has done anything."""
    with started(tmp_path, teacher, hook=f"{moment}:{int(number)}") as service:
        assert service.exit_code() == EXIT_CODES[number]
        assert "serving on" in service.output.read_text() and "Traceback" not in service.output.read_text()


@pytest.mark.parametrize("number", [TERM, INT])
def test_what_is_being_scored_is_answered_and_what_comes_later_is_not(tmp_path: Path, teacher: str, number: int):
    with started(tmp_path, teacher, hook="batch", work_s=1.0, grace_s=ENDS_IN_S) as service:
        asking = Asking(service.url)
        service.wait_for("in _score")
        service.send(number)
        assert asking.answer() == 200
        assert service.exit_code() == EXIT_CODES[number]
        assert "Traceback" not in service.output.read_text()
        with pytest.raises(httpx2.TransportError):
            httpx2.get(f"{service.url}/health", trust_env=False)


@pytest.mark.parametrize("number", [TERM, INT])
@pytest.mark.parametrize("work", ["load", "batch"])
def test_work_that_takes_longer_than_the_grace_is_cut(tmp_path: Path, teacher: str, work: str, number: int):
    with started(tmp_path, teacher, hook=work, work_s=10 * ENDS_IN_S) as service:
        asking = Asking(service.url)
        service.wait_for("in (load_model|_score)")
        service.send(number)
        assert service.exit_code() == EXIT_CODES[number]
        assert CUT_SHORT.decode() in service.output.read_text()
        assert "Error" in str(asking.answer()), "its client is told by the connection's end, and asks again"


def test_a_second_signal_ends_it_at_once(tmp_path: Path, teacher: str):
    with started(tmp_path, teacher, hook="batch", work_s=10 * ENDS_IN_S, grace_s=10 * ENDS_IN_S) as service:
        asking = Asking(service.url)
        service.wait_for("in _score")
        service.send(TERM)
        service.process.join(0.3)
        assert service.process.exitcode is None, "it waits for what is being scored"
        service.send(INT)
        assert service.exit_code() == 130
        assert "Error" in str(asking.answer())


@pytest.mark.parametrize(("number", "code"), [(TERM, -TERM), (INT, 130)])
def test_a_signal_before_it_serves_ends_it_as_any_process(tmp_path: Path, teacher: str, number: int, code: int):
    with started(tmp_path, teacher, hook=f"served_models:{int(number)}") as service:
        assert service.exit_code() == code
        assert "serving on" not in service.output.read_text() and "Traceback" not in service.output.read_text()
