"""vLLM's engine core does not notice that its parent was killed. A process that watches both does.

    python -m models.vllm.orphans PARENT:STARTED MARK GRACE_S

Whatever was started with the mark in its environment, and whatever that started, is ended once the parent has ended, or
when the watching process is told to stop. The mark is looked for again and again, because vLLM's processes write their
titles over their environments, as soon as they have imported what they need.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path

import psutil

VARIABLE = "PROTEGE_ENGINE"
EAGER_S, LAZY_S = 0.2, 2.0  # between two looks
KILL_S = 30.0  # what a kill has not ended by then hangs in the kernel
SETTLED_S = 60.0  # without a new process: the engine has started


class Brood:
    """The processes of one engine: they end with this process, however it ends, or by `end`."""

    def __init__(self, grace_s: float = 5.0) -> None:
        self._grace_s = grace_s  # for processes that are ending by themselves
        self._mark = secrets.token_hex(8)
        self._guard: subprocess.Popen[bytes] | None = None

    @contextlib.contextmanager
    def hatching(self) -> Iterator[None]:
        """What is started meanwhile belongs to it."""
        me = psutil.Process()
        self._guard = subprocess.Popen(
            [sys.executable, __file__, f"{me.pid}:{me.create_time()}", self._mark, str(self._grace_s)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=Path(__file__).anchor,  # so as not to hold a folder that is to be removed
            start_new_session=True,  # Ctrl-C is not for it
        )
        assert self._guard.stdout is not None
        with self._guard.stdout as said:
            said.readline()  # it watches: on a busy machine an engine may have hidden its mark before
        resource_tracker.ensure_running()  # the whole process's, and not this brood's
        os.environ[VARIABLE] = self._mark
        try:
            yield
        finally:
            os.environ.pop(VARIABLE, None)

    def end(self) -> None:
        """Blocks for as long as the processes take to end, and no longer than `grace_s` and half a minute."""
        if self._guard is not None:
            self._guard.terminate()
            self._guard.wait()
            self._guard = None


class Watch:
    """What is known of a brood from outside."""

    def __init__(self, parent: psutil.Process | None, mark: str) -> None:
        self._parent, self._mark = parent, mark
        self._found: dict[int, psutil.Process] = {}  # by pid; psutil tells a process from another of the same number
        self.last_new = time.monotonic()

    def parent_runs(self) -> bool:
        return self._parent is not None and runs(self._parent)

    def look(self) -> None:
        """Among the parent's descendants, for new ones."""
        with contextlib.suppress(psutil.Error):
            if self._parent is not None:
                self._add(self._parent.children(recursive=True))

    def look_everywhere(self) -> None:
        """Whose child it is says nothing once the parent has ended."""
        self._add(list(psutil.process_iter()))

    def _add(self, processes: list[psutil.Process]) -> None:
        for process in processes:
            if process.pid not in self._found and process.pid != os.getpid() and self._is_marked(process):
                self._found[process.pid] = process
                self.last_new = time.monotonic()

    def _is_marked(self, process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error, OSError):
            return process.environ().get(VARIABLE) == self._mark
        return False

    def alive(self) -> list[psutil.Process]:
        """Of those that were found, and of what they have started since."""
        for process in list(self._found.values()):
            with contextlib.suppress(psutil.Error):
                self._found |= {child.pid: child for child in process.children(recursive=True)}
        return [process for process in self._found.values() if runs(process)]

    def end(self, grace_s: float) -> None:
        """Twice nothing is nothing: a process may be just about to start another."""
        self.look()
        deadline = time.monotonic() + grace_s
        while self.alive() and time.monotonic() < deadline:
            time.sleep(0.05)
        quiet, given_up = 0, time.monotonic() + KILL_S
        while quiet < 2 and time.monotonic() < given_up:
            self.look_everywhere()
            left = self.alive()
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            quiet = 0 if left else quiet + 1
            time.sleep(0.05)


def runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def main(parent: str, mark: str, grace_s: str) -> None:
    told = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: told.set())
    pid, _, started = parent.partition(":")
    run = None
    with contextlib.suppress(psutil.NoSuchProcess):
        run = psutil.Process(int(pid))
        run = run if str(run.create_time()) == started else None  # else the number belongs to somebody else by now
    watch = Watch(run, mark)
    print("watching", flush=True)
    while watch.parent_runs() and not told.is_set():
        watch.look()
        told.wait(EAGER_S if time.monotonic() - watch.last_new < SETTLED_S else LAZY_S)
    watch.end(float(grace_s) if told.is_set() else 0.0)


if __name__ == "__main__":
    main(*sys.argv[1:])
