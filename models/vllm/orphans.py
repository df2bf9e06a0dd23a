"""vLLM's engine core does not notice that its parent was killed. A process that waits for the parent's end does.

python -m models.vllm.orphans PARENT CHILD:STARTED …
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil


def end_with_this_process(children: Sequence[psutil.Process]) -> subprocess.Popen[bytes]:
    """Kill `children` once this process has ended, however it ends. Returns the process that waits for it."""
    alive = []
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            alive.append(f"{child.pid}:{child.create_time()}")
    return subprocess.Popen(
        [sys.executable, __file__, str(psutil.Process().pid), *alive],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=Path(__file__).anchor,  # so as not to hold a folder that is to be removed
        start_new_session=True,  # Ctrl-C is not for it
    )


def main(parent: str, *children: str) -> None:
    watched = []
    for child in children:
        pid, _, started = child.partition(":")
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(int(pid))
            if str(process.create_time()) == started:  # else the number belongs to somebody else by now
                watched.append(process)
    with contextlib.suppress(psutil.NoSuchProcess):
        run = psutil.Process(int(parent))
        while watched and _runs(run):
            _, watched = psutil.wait_procs(watched, timeout=1)
    for process in watched:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


if __name__ == "__main__":
    main(*sys.argv[1:])
