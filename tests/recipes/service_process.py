"""`python -m recipes.serve_teacher` in a process of its own, forked from one that has imported everything."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from models.transformers_scorer import TransformersScorer
from recipes import serve_teacher
from recipes.cli import run_cli

pytest.importorskip("uvicorn", reason="needs the packages of the extra `serve`, which `dev` brings")

from models.teacher_service.bounded_server import BoundedServer

_FORKS = multiprocessing.get_context("forkserver")  # of a process that has imported what the first test here needs
ENDS_IN_S = 60  # far more than it takes, far less than what is computed where this is tested


def child(argv: list[str], output: str, hook: str, work_s: float) -> None:
    """`python -m recipes.serve_teacher argv…`, both streams to a file; `hook` names what is slow, or sends a signal."""
    gc.freeze()  # what the server imported stays: it is not looked at, and so not copied
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
