"""Counters of the service in Prometheus' text format, which is a few lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_COUNTERS = {
    "requests": "Answered requests, by path and status.",
    "read_tokens": "Tokens read, by model.",
    "scored_tokens": "Tokens judged, by model and need.",
    "answer_bytes": "Bytes of answers to score requests.",
    "abandoned": "Requests whose client went away before the answer.",
    "batches": "Calls of a scorer.",
    "busy_seconds": "Time in calls of a scorer.",
}
_GAUGES = {
    "queue_requests": "Requests that wait for the device.",
    "queue_tokens": "Tokens of the requests that wait.",
    "loaded": "1 for a model in memory, else 0.",
}
_PREFIX = "protege_teacher_"


class Metrics:
    def __init__(self) -> None:
        self._counts: Counter[tuple[str, tuple[tuple[str, str], ...]]] = Counter()

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        if name not in _COUNTERS:
            raise KeyError(name)
        self._counts[name, tuple(labels.items())] += amount  # type: ignore[assignment]

    def text(self, gauges: Mapping[str, Mapping[tuple[tuple[str, str], ...], float]]) -> str:
        lines = []
        for name, doc in _COUNTERS.items():
            values = {labels: value for (of, labels), value in self._counts.items() if of == name}
            lines += _family(f"{name}_total", "counter", doc, values)
        for name, values in gauges.items():
            lines += _family(name, "gauge", _GAUGES[name], values)
        return "\n".join(lines) + "\n"


def _family(name: str, kind: str, doc: str, values: Mapping[tuple[tuple[str, str], ...], float]) -> list[str]:
    lines = [f"# HELP {_PREFIX}{name} {doc}", f"# TYPE {_PREFIX}{name} {kind}"]
    for labels, value in values.items():
        inside = ",".join(f'{label}="{text}"' for label, text in labels)
        lines.append(f"{_PREFIX}{name}{{{inside}}} {value:g}" if inside else f"{_PREFIX}{name} {value:g}")
    return lines
