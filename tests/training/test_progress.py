"""What a run prints: plain lines into a pipe, a panel on a terminal."""

import io
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from training.progress import Progress

ROW = {
    "step": 1,
    "kl": 0.25,
    "loss": 0.5,
    "accuracy": 0.125,
    "tokens_per_s": 12345.6,
    "time/sampling": 3.0,
    "time/scoring": 1.0,
    "dropped_fraction": 0.5,
}


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def plain(total=10, clock=None):
    console = Console(file=io.StringIO(), force_terminal=False)
    return Progress(total, "t", console=console, clock=clock or Clock()), console.file


def test_off_a_terminal_each_step_is_one_line_without_ansi():
    progress, out = plain()
    with progress:
        for step in (1, 2):
            progress.update({**ROW, "step": step})
    lines = out.getvalue().splitlines()
    assert len(lines) == 2 and "\x1b" not in out.getvalue()
    for part in ("kl 0.2500", "acc 12.5%", "tokens/s 12,346", "dropped 50.0%", "sampling 75% scoring 25%"):
        assert part in lines[0]
    assert lines[1].startswith("step 2/10")


def test_a_child_process_writing_to_a_pipe_prints_lines_at_once_and_without_ansi():
    script = (
        "from training.progress import Progress\n"
        "import sys, time\n"
        "with Progress(2, 't') as p:\n"
        "    p.update({'step': 1, 'kl': 0.5})\n"
        "    sys.stdin.readline()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={"PYTHONPATH": ".", "FORCE_COLOR": "1"},
    )
    assert child.stdout and child.stdin
    line = child.stdout.readline()  # arrives while the child waits: it was flushed
    child.stdin.close()
    child.wait()
    assert line.startswith("step 1/2  kl 0.5000") and "\x1b" not in line


def test_the_time_left_comes_from_the_pace_of_the_steps():
    clock = Clock()
    progress, out = plain(total=100, clock=clock)
    with progress:
        for step in (1, 2, 3):
            clock.now = step * 2.0
            progress.update({"step": step, "kl": 1.0})
    assert "eta 3m14s" in out.getvalue().splitlines()[-1]  # 97 steps of 2 s


def test_a_resumed_run_does_not_take_the_steps_before_it_for_its_own_pace():
    clock = Clock()
    progress, out = plain(total=60, clock=clock)
    with progress:
        for step in (50, 51, 52):
            clock.now += 10
            progress.update({"step": step, "kl": 1.0})
    lines = out.getvalue().splitlines()
    assert "eta" not in lines[0] and "eta 1m20s" in lines[-1]


def test_missing_and_null_values_are_no_error_and_an_evaluation_prints_no_line():
    progress, out = plain()
    with progress:
        progress.update({"step": 0, "eval/accuracy": 0.5})
        progress.update({"step": 1, "kl": None})
        progress.update({"step": 2, "loss": float("nan")})
    assert out.getvalue() == "step 1/10  kl nan  eta 0s\nstep 2/10  kl nan  loss nan  eta 0s\n"


def test_messages_keep_long_paths_whole_and_markup_as_text():
    path = "/data/" + "folder/" * 40 + "[bold]x[/bold]"
    for terminal in (False, True):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=40)
        with Progress(3, "t", console=console) as progress:
            progress.update(ROW)
            progress.message(path)
        assert path in console.file.getvalue()


def test_on_a_terminal_a_panel_shows_step_values_and_stages():
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    with Progress(10, "[title] of a run", console=console, clock=Clock()) as progress:
        progress.update(ROW)
        progress.update({**ROW, "step": 2})
    shown = console.file.getvalue()
    for part in ("[title] of a run", "step 2/10", "kl 0.2500", "sampling 75%", "scoring 25%"):
        assert part in shown
