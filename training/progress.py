"""What a run shows while it trains: a live panel on a terminal, one plain line per step elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

STAGES = {"sampling": "cyan", "scoring": "magenta", "training": "green", "other": "bright_black"}
_BLOCKS = "▁▂▃▄▅▆▇█"


class Progress:
    """Shows metric rows as they come. Use as a context manager.

    Keys read: `step`, `kl`, `loss`, `accuracy`, `tokens_per_s`, `dropped_fraction` and
    `time/{sampling,scoring,training,other}`; any may be missing. A row of another kind (an
    evaluation) leaves the values that it does not name.
    """

    def __init__(
        self,
        total_steps: int,
        title: str,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._title, self._clock = total_steps, title, clock
        # why: the pipe of a log file must stay free of ANSI, whatever FORCE_COLOR says
        self._console = console or Console(force_terminal=sys.stdout.isatty())
        self._row: dict[str, Any] = {}
        self._kls: deque[float] = deque(maxlen=48)
        self._marks: deque[tuple[float, int]] = deque(maxlen=20)  # (when, step), for the pace
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        self._marks.append((self._clock(), 0))
        if self._console.is_interactive:
            self._live = Live(console=self._console, get_renderable=self._panel, refresh_per_second=2)
            self._live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._live is not None:
            self._live.__exit__(*error)
            self._live = None

    def update(self, row: Mapping[str, Any]) -> None:
        """Show a row; off a terminal, print it as a line if it is a training row."""
        self._row.update(row)
        step = int(row.get("step", self._row.get("step", 0)))
        first_mark = len(self._marks) == 1
        if first_mark and step != self._marks[0][1] + 1:
            # why: what passed before an evaluation at the start, or before the first row of a run resumed
            # at step n, says nothing about the pace
            self._marks[0] = (self._clock(), step)
        elif not self._marks or step > self._marks[-1][1]:
            self._marks.append((self._clock(), step))
        if _is_number(row.get("kl")):
            self._kls.append(row["kl"])
        if self._live is not None:
            self._live.refresh()
        elif any(key in row for key in ("kl", "loss", "tokens_per_s")):
            self._print_plain(self._line())

    def message(self, text: str) -> None:
        """Print a line above the panel, unbroken however long: it may hold a path."""
        if self._live is not None:
            self._console.print(Text(text), soft_wrap=True)
        else:
            self._print_plain(text)

    def _print_plain(self, text: str) -> None:
        print(text, file=self._console.file, flush=True)

    def _eta_s(self) -> float | None:
        if len(self._marks) < 2 or self._marks[-1][1] <= self._marks[0][1]:
            return None
        (start, first), (end, last) = self._marks[0], self._marks[-1]
        return (end - start) / (last - first) * max(self._total - last, 0)

    def _values(self) -> dict[str, str]:
        """The shown values by label, those that are known."""
        formats: list[tuple[str, str, Callable[[float], str]]] = [
            ("kl", "kl", lambda value: f"{value:.4f}"),
            ("loss", "loss", lambda value: f"{value:.4f}"),
            ("acc", "accuracy", lambda value: f"{value:.1%}"),
            ("tokens/s", "tokens_per_s", lambda value: f"{value:,.0f}"),
            ("dropped", "dropped_fraction", lambda value: f"{value:.1%}"),
        ]
        values = {}
        for label, key, show in formats:
            if key in self._row and not (key == "dropped_fraction" and not self._row[key]):
                values[label] = show(self._row[key]) if _is_number(self._row[key]) else "nan"
        eta = self._eta_s()
        if eta is not None:
            values["eta"] = _duration(eta)
        return values

    def _shares(self) -> dict[str, float]:
        """Each stage's part of the stages' seconds. They may overlap, so it is not of the wall."""
        times = {name: self._row.get(f"time/{name}") for name in STAGES}
        known = {name: float(value) for name, value in times.items() if value and _is_number(value)}
        total = sum(known.values())
        return {name: value / total for name, value in known.items()}

    def _line(self) -> str:
        parts = [f"step {self._row.get('step', 0)}/{self._total}"]
        parts += [f"{label} {value}" for label, value in self._values().items()]
        shares = " ".join(f"{name} {share:.0%}" for name, share in self._shares().items())
        return "  ".join([*parts, shares] if shares else parts)

    def _panel(self) -> Panel:
        step = int(self._row.get("step", 0))
        head = Table.grid(padding=(0, 2), expand=True)
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_row(f"step {step}/{self._total}", ProgressBar(total=max(self._total, 1), completed=step))
        numbers = Text("  ".join(f"{label} {value}" for label, value in self._values().items()))
        lines: list[Any] = [head, numbers]
        if len(self._kls) > 1:
            lines.append(Text("kl " + _sparkline(list(self._kls)), style="yellow", no_wrap=True))
        if shares := self._shares():
            width = max(self._console.width - 4, 10)
            bar = Text(no_wrap=True)
            for name, share in shares.items():
                bar.append("━" * round(share * width), style=STAGES[name])
            legend = Text("  ").join(Text(f"{name} {share:.0%}", style=STAGES[name]) for name, share in shares.items())
            lines += [bar, legend]
        return Panel(Group(*lines), title=Text(self._title), title_align="left")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _sparkline(values: list[float]) -> str:
    low, high = min(values), max(values)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0
    return "".join(_BLOCKS[round((value - low) * scale)] for value in values)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"
