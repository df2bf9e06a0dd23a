"""Makes `report.html` of a run: one file, no scripts, no network; plots are inline SVG.

    from training.report import write_report
    write_report("runs/my-run")

It reads config.json, metrics.jsonl and episodes/, and may be made while the run goes on.
"""

from __future__ import annotations

import html
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import ConfigError
from training.atomic import write_atomic
from training.run_dir import read_config, read_metrics

Row = Mapping[str, Any]
MAX_EPISODES = 6
MAX_TEXT = 6000  # characters shown of one text

_COLORS = ("#2f6fb0", "#c4572b", "#3b8a4f", "#8a5aa8", "#9a7d1c", "#5b6770")
_STAGES = ("sampling", "scoring", "training", "evaluation", "other")


@dataclass(frozen=True)
class Chart:
    """Lines by label to the metric's name, against the step. A key with `<key>_se` gets error bars."""

    title: str
    lines: Mapping[str, str]
    log: bool = False  # logarithmic if everything is positive and spans a decade
    stacked: bool = False


CHARTS = (
    Chart(
        "KL to the teacher, nats per token",
        {
            "training": "kl",
            "held-out, sampled": "eval/reverse_kl",
            "held-out, exact": "eval/exact_reverse_kl",
        },
        log=True,
    ),
    Chart("Accuracy", {"training": "accuracy", "held-out": "eval/accuracy", "teacher": "eval/teacher_accuracy"}),
    Chart("Loss", {"loss": "loss"}),
    Chart("Length, sampled tokens", {"training": "completion_tokens_mean", "held-out": "eval/length"}),
    Chart(
        "Truncated and dropped, fraction of episodes",
        {
            "truncated": "truncated_fraction",
            "dropped": "dropped_fraction",
            "truncated, held-out": "eval/truncated_fraction",
        },
    ),
    Chart("Importance ratio", {"mean": "ratio/mean", "max": "ratio/max"}),
    Chart("Sampler mismatch, KL(sampler ‖ learner)", {"mismatch": "mismatch_kl"}),
    Chart("Gradient norm", {"gradient norm": "grad_norm"}),
    Chart("Tokens per second", {"tokens/s": "tokens_per_s"}),
    Chart("Seconds per step, by stage", {name: f"time/{name}" for name in _STAGES}, stacked=True),
    Chart("Peak memory, MiB", {"peak": "peak_memory_mb"}),
)


def write_report(run_dir_path: str | Path) -> Path:
    """Write `report.html` into the run's folder and return its path. What was not measured is left out."""
    path = Path(run_dir_path)
    config, rows = read_config(path), read_metrics(path)
    if config is None and not rows:
        raise ConfigError(f"{path} is not a run's folder: it has neither a config.json nor a metrics.jsonl")
    charts = [svg for chart in CHARTS if (svg := draw(chart, rows))]
    sections = [
        f"<h1>{_text(path.absolute().name)}</h1>",
        f"<p class=quiet>{_text(path.absolute())}, {_text(_extent(rows))}</p>",
        _evaluations(rows),
        "<h2>Curves</h2><div class=charts>" + "".join(charts) + "</div>" if charts else "",
        _episodes(path / "episodes"),
        _config(config or {}),
    ]
    target = path / "report.html"
    write_atomic(target, _PAGE.format(title=_text(path.absolute().name), body="\n".join(filter(None, sections))))
    return target


# Curves


def series(rows: Iterable[Row], key: str) -> tuple[list[float], list[float]]:
    """The steps and values of a metric, where it is a finite number."""
    points = [(row["step"], row[key]) for row in rows if _is_number(row.get(key))]
    return [float(step) for step, _ in points], [float(value) for _, value in points]


def draw(chart: Chart, rows: Sequence[Row]) -> str | None:
    """The chart as an `<svg>` element; None if no row has any of its metrics."""
    if not any(series(rows, key)[0] for key in chart.lines.values()):
        return None
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # why: parse_math off, or a dataset named $x$ would be typeset; a salt per chart, or the ids of two
    # SVGs in one page would clash
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": chart.title,
        "text.parse_math": False,
        "font.size": 9,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(5.2, 2.9), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        if chart.stacked:
            _stack(axes, chart, rows)
        else:
            _lines(axes, chart, rows)
        axes.set_title(chart.title, loc="left", fontsize=10)
        axes.set_xlabel("step")
        axes.grid(True, alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend(
                frameon=False,
                fontsize=8,
                ncols=5 if chart.stacked else 1,
                loc="upper right" if chart.stacked else "best",
            )
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)


def _lines(axes: Any, chart: Chart, rows: Sequence[Row]) -> None:
    shown: list[float] = []
    for color, (label, key) in zip(_COLORS, chart.lines.items(), strict=False):
        steps, values = series(rows, key)
        if not steps:
            continue
        shown += values
        marker = "o" if key.startswith("eval/") or len(steps) == 1 else ""
        axes.plot(steps, values, color=color, label=label, linewidth=1.4, marker=marker, markersize=4)
        errors = [
            (row["step"], row[key], row[f"{key}_se"])
            for row in rows
            if _is_number(row.get(key)) and _is_number(row.get(f"{key}_se"))
        ]
        if errors:
            x, y, error = zip(*errors, strict=True)
            axes.errorbar(x, y, _half_widths(error), color=color, fmt="none", capsize=2, linewidth=1)
    if chart.log and min(shown) > 0 and max(shown) / min(shown) > 10:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # why: the default is math text
        axes.yaxis.set_minor_formatter(lambda value, _: "")


def _half_widths(standard_errors: Sequence[float]) -> list[float]:
    """Half-widths of 95% intervals."""
    return [1.96 * error for error in standard_errors]


def _stack(axes: Any, chart: Chart, rows: Sequence[Row]) -> None:
    timed = [row for row in rows if any(_is_number(row.get(key)) for key in chart.lines.values())]
    steps = [row["step"] for row in timed]
    layers = {label: [_seconds(row, key) for row in timed] for label, key in chart.lines.items()}
    layers = {label: values for label, values in layers.items() if any(values)}
    if not layers:
        return
    if len(steps) > 40:  # why: as bars, a long run would be megabytes of SVG
        axes.stackplot(steps, *layers.values(), labels=list(layers), colors=_COLORS)
    else:
        base = [0.0] * len(timed)
        for color, (label, values) in zip(_COLORS, layers.items(), strict=False):
            axes.bar(steps, values, bottom=base, width=0.9, color=color, label=label)
            base = [low + value for low, value in zip(base, values, strict=True)]
    axes.set_ylim(0, 1.25 * max(map(sum, zip(*layers.values(), strict=True))))  # room for the legend


def _seconds(row: Row, key: str) -> float:
    return float(row[key]) if _is_number(row.get(key)) else 0.0


# Tables


def _extent(rows: Sequence[Row]) -> str:
    steps = {row["step"] for row in rows if "kl" in row or "loss" in row}
    return f"{len(steps)} training steps, last step {max(steps)}" if steps else "no training step yet"


def _evaluations(rows: Sequence[Row]) -> str:
    """First and last evaluation side by side."""
    evals = [row for row in rows if any(key.startswith("eval/") for key in row)]
    if not evals:
        return ""
    first, last = evals[0], evals[-1]
    keys = list(dict.fromkeys(key for row in (first, last) for key in row if key.startswith("eval/")))
    body = ""
    for key in keys:
        if key.endswith("_se") or not (_is_number(first.get(key)) or _is_number(last.get(key))):
            continue
        change = ""
        if last is not first and _is_number(first.get(key)) and _is_number(last.get(key)):
            change = f"{last[key] - first[key]:+.4g}"
        cells = (key.removeprefix("eval/"), _with_error(first, key), _with_error(last, key), change)
        body += "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in cells) + "</tr>"
    heads = ("held-out", f"step {first['step']}", f"step {last['step']}", "change")
    head = "".join(f"<th>{_text(name)}</th>" for name in heads)
    return (
        f"<h2>Evaluation, first and last</h2><table><tr>{head}</tr>{body}</table>"
        "<p class=quiet>± is one standard error; bars in the curves are 95% intervals.</p>"
    )


def _with_error(row: Row, key: str) -> str:
    if not _is_number(row.get(key)):
        return "–"
    error = row.get(f"{key}_se")
    return f"{row[key]:.4g}" + (f" ± {error:.2g}" if _is_number(error) else "")


def _config(config: Mapping[str, Any]) -> str:
    if not config:
        return ""
    body = "".join(
        f"<tr><td>{_text(key)}</td><td><code>{_text(value)}</code></td></tr>" for key, value in _flat(config)
    )
    return f"<h2>Configuration</h2><table>{body}</table>"


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


# Episodes


def _episodes(folder: Path) -> str:
    """A few episodes of the first and of the last step that have some."""
    files = sorted(folder.glob("step_*.jsonl"), key=lambda file: (len(file.name), file.name))
    shown = ""
    for file in dict.fromkeys([*files[:1], *files[-1:]]):
        each = MAX_EPISODES if len(files) == 1 else MAX_EPISODES // 2
        for row in _first_rows(file, each):
            shown += _episode(file.stem.replace("_", " "), row)
    return f"<h2>Sample episodes</h2>{shown}" if shown else ""


def _first_rows(file: Path, count: int) -> list[dict[str, Any]]:
    rows = []
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            if len(rows) == count:
                break
            row = json.loads(line)
            if isinstance(row, dict):
                rows.append(row)
    return rows


def _episode(title: str, row: Mapping[str, Any]) -> str:
    """Texts and messages in full, single values in a line; streams of numbers only by their length."""
    facts, blocks = [], []
    for key, value in row.items():
        if key == "tokens" and _gaps(row) is not None:
            blocks.append(f"<h4>tokens, by teacher minus student logprob</h4>{_token_strip(row)}")
        elif isinstance(value, str) and ("\n" in value or len(value) > 60):
            blocks.append(f"<h4>{_text(key)}</h4><pre>{_clipped(value)}</pre>")
        elif isinstance(value, list) and value and all(isinstance(item, dict) and "role" in item for item in value):
            said = "\n".join(f"[{item['role']}] {item.get('content') or ''}" for item in value)
            blocks.append(f"<h4>{_text(key)}</h4><pre>{_clipped(said)}</pre>")
        elif isinstance(value, list | dict):
            facts.append(f"{key}: {len(value)} values")
        else:
            facts.append(f"{key}: {value}")
    summary = f"{title}, {row.get('dataset', '')} {row.get('row_id', '')}"
    return (
        f"<details><summary>{_text(summary)}</summary><p class=quiet>{_text(', '.join(facts))}</p>"
        + "".join(blocks)
        + "</details>"
    )


def _gaps(row: Mapping[str, Any]) -> list[float | None] | None:
    """log pi_T - log pi_sampler per token, None where not sampled; None if the row lacks the streams."""
    streams = [row.get(key) for key in ("tokens", "teacher_logprobs", "sampler_logprobs")]
    if not all(isinstance(stream, list) and len(stream) == len(row["tokens"]) for stream in streams):
        return None
    return [
        teacher - student if _is_number(teacher) and _is_number(student) else None
        for teacher, student in zip(row["teacher_logprobs"], row["sampler_logprobs"], strict=True)
    ]


def _token_strip(row: Mapping[str, Any]) -> str:
    """Sampled tokens shaded red where the teacher would have been less likely to say them, else green."""
    parts = []
    for token, gap in zip(row["tokens"], _gaps(row) or [], strict=True):
        if gap is None:
            parts.append(f"<span class=quiet>{_text(token)}</span>")
        else:
            hue = "196,60,43" if gap < 0 else "59,138,79"
            strength = min(abs(gap) / 4, 1) * 0.6  # full colour at a factor of e^4
            style = f"background:rgba({hue},{strength:.2f})"
            parts.append(f'<span style="{style}" title="{gap:+.2f}">{_text(token)}</span>')
    return f"<pre>{''.join(parts)}</pre>"


def _clipped(text: str) -> str:
    more = f"\n… {len(text) - MAX_TEXT} more characters" if len(text) > MAX_TEXT else ""
    return _text(text[:MAX_TEXT] + more)


def _text(value: Any) -> str:
    """Escaped for HTML. Everything that a dataset, a model or a user wrote passes through here."""
    return html.escape(str(value), quote=True)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1d2329; background: #fff; max-width: 1150px;
  margin: 2rem auto; padding: 0 1rem; }}
h1 {{ margin-bottom: 0; }} h2 {{ margin-top: 2rem; font-size: 1.15rem; }} h4 {{ margin: .8rem 0 .2rem; }}
.quiet {{ color: #67717b; }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 1rem; }}
.charts svg {{ width: 100%; height: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
td, th {{ text-align: left; padding: .15rem 1rem .15rem 0; border-bottom: 1px solid #e6e9ec;
  vertical-align: top; overflow-wrap: anywhere; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f7f8; padding: .6rem; margin: 0; }}
details {{ border-bottom: 1px solid #e6e9ec; padding: .3rem 0; }} summary {{ cursor: pointer; }}
</style></head><body>
{body}
</body></html>
"""
