"""What a step measured: sums that divide once at the end, seconds by stage, and peak memory.

Ratios are kept as sum and weight and divided when read, so that a mean over micro-batches, ranks or
datasets of unlike size is the mean over their tokens and never a mean of means.
"""

from __future__ import annotations

import math
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class SumMetrics:
    """Accumulates ratios (sum of values / sum of weights), maxima and counts by name.

    `dataset` and `teacher` add the same value a second and third time under `dataset/<name>/…` and
    `teacher/<name>/…`; the unscoped name is the total.
    """

    def __init__(self) -> None:
        self._ratios: dict[str, tuple[float, float]] = {}  # sum of values, sum of weights
        self._maxima: dict[str, float] = {}
        self._counts: dict[str, float] = {}

    def add(
        self,
        name: str,
        value_sum: float,
        weight: float = 1.0,
        *,
        dataset: str | None = None,
        teacher: str | None = None,
    ) -> None:
        """Add a sum of values over `weight` items (tokens, episodes); never a mean."""
        if not weight >= 0:
            raise ValueError(f"{name}: a weight is a number of items, not {weight}")
        for key in _scopes(name, dataset, teacher):
            self._only_in(key, self._ratios)
            total, items = self._ratios.get(key, (0.0, 0.0))
            self._ratios[key] = (total + float(value_sum), items + float(weight))

    def add_max(self, name: str, value: float, *, dataset: str | None = None, teacher: str | None = None) -> None:
        for key in _scopes(name, dataset, teacher):
            self._only_in(key, self._maxima)
            self._maxima[key] = _largest(self._maxima.get(key, -math.inf), float(value))

    def add_count(self, name: str, count: float = 1, *, dataset: str | None = None, teacher: str | None = None) -> None:
        for key in _scopes(name, dataset, teacher):
            self._only_in(key, self._counts)
            self._counts[key] = self._counts.get(key, 0) + float(count)

    def merge(self, other: SumMetrics) -> None:
        """Add everything that `other` holds, as if it had been added here."""
        for key, (total, items) in other._ratios.items():
            self._only_in(key, self._ratios)
            mine = self._ratios.get(key, (0.0, 0.0))
            self._ratios[key] = (mine[0] + total, mine[1] + items)
        for key, value in other._maxima.items():
            self._only_in(key, self._maxima)
            self._maxima[key] = _largest(self._maxima.get(key, -math.inf), value)
        for key, value in other._counts.items():
            self._only_in(key, self._counts)
            self._counts[key] = self._counts.get(key, 0) + value

    def as_dict(self) -> dict[str, float]:
        """Every metric by name. A ratio over nothing is left out: it has no value, least of all 0."""
        ratios = {key: total / items for key, (total, items) in self._ratios.items() if items > 0}
        return {**ratios, **self._maxima, **self._counts}

    def _only_in(self, key: str, kind: dict[str, Any]) -> None:
        if any(key in other for other in (self._ratios, self._maxima, self._counts) if other is not kind):
            raise ValueError(f"metric {key} is already kept as another kind (ratio, maximum or count)")


def _scopes(name: str, dataset: str | None, teacher: str | None) -> Iterator[str]:
    yield name
    if dataset is not None:
        yield f"dataset/{dataset}/{name}"
    if teacher is not None:
        yield f"teacher/{teacher}/{name}"


def _largest(a: float, b: float) -> float:
    """The larger, or NaN if either is: `max` would drop a NaN or not, depending on the order."""
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


class StageTimer:
    """Wall seconds by stage. Safe across tasks and threads.

    A stage that several tasks are in at once counts once, so a stage never exceeds the wall. Stages
    may overlap each other (scoring goes on while others sample), so their sum may exceed it.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._seconds: dict[str, float] = {}
        self._inside: dict[str, int] = {}  # how many are in a stage now
        self._covered = 0.0  # seconds during which at least one stage was on
        self._lap_start = self._last = clock()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        with self._lock:
            self._advance()
            self._inside[name] = self._inside.get(name, 0) + 1
            self._seconds.setdefault(name, 0.0)
        try:
            yield
        finally:
            with self._lock:
                self._advance()
                self._inside[name] -= 1

    def lap(self) -> dict[str, float]:
        """Seconds since the last lap: `time/<stage>`, `time/other` (in no stage) and `time/total`.

        A stage that is on goes on: its time until now belongs to this lap, the rest to the next."""
        with self._lock:
            self._advance()
            total = self._last - self._lap_start
            row = {f"time/{name}": seconds for name, seconds in self._seconds.items()}
            row |= {"time/other": max(total - self._covered, 0.0), "time/total": total}
            self._seconds = {name: 0.0 for name, count in self._inside.items() if count}
            self._covered = 0.0
            self._lap_start = self._last
            return row

    def _advance(self) -> None:
        """Credit the time since the last change to the stages that were on."""
        now = self._clock()
        on = [name for name, count in self._inside.items() if count]
        for name in on:
            self._seconds[name] += now - self._last
        if on:
            self._covered += now - self._last
        self._last = now


def peak_memory_mb(device: Any = "cpu") -> float:
    """Highest memory so far in MiB: allocated by torch on a CUDA device, else of the whole process."""
    if str(device).startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():
        # why: Linux hands ru_maxrss down through fork and exec, so a small process started by a large
        # one would report its parent's peak
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024  # kB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 1024)  # bytes on macOS, KiB elsewhere
