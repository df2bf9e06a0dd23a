"""Seconds, and memory at its highest, of a block of code. Needs torch and nothing of ours: peers can use it too."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

MIB = 2**20


@contextmanager
def measured(device: torch.device) -> Iterator[dict[str, float]]:
    """Growth of memory at its highest, seconds, and processor seconds, which neighbours on the machine disturb less."""
    found: dict[str, float] = {}
    start, busy = time.perf_counter(), time.process_time()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        found["mib"] = (torch.cuda.max_memory_allocated(device) - before) / MIB
    else:
        before, highest, done = resident(), [0], threading.Event()

        def watch() -> None:
            while not done.wait(0.001):
                highest[0] = max(highest[0], resident())

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield found
        finally:
            done.set()
            thread.join()
        found["mib"] = (highest[0] - before) / MIB
    found["s"], found["cpu_s"] = time.perf_counter() - start, time.process_time() - busy


def resident() -> int:
    """Bytes of this process in memory. Linux only."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
