"""Is an answer right? One function per kind of grader, and the accuracy of many grades with its error.

Mathematics is checked by math-verify, in a process of its own. A student may write `9**9**9**9`: the
power is one C call that neither a thread nor `signal.alarm` (math-verify's own limit, main thread
only) can interrupt. The process carries a CPU-time limit that the kernel enforces.
"""

from __future__ import annotations

import atexit
import json
import logging
import math
import os
import re
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from envs import arithmetic
from envs.datasets import GraderName
from errors import ProtegeError

logger = logging.getLogger(__name__)

CPU_LIMIT_S = 5  # per answer; CPU and not wall time, so a busy machine grades alike
WALL_LIMIT_S = 60.0  # for a process that is frozen and uses none; far more than a busy machine makes of the other
MEMORY_LIMIT_BYTES = 4 << 30
MAX_MATH_CHARS = 4_000  # what math-verify is given: its patterns are quadratic in the length


def grade(kind: GraderName, text: str, expected: str) -> bool:
    """Does `text`, a student's whole answer, give the expected one?

    - `math`: equal by math-verify. The answer is the last filled `\\boxed{}` of the text; without one,
      what `exact` would take, or what math-verify finds in the end of the text (LaTeX, "answer: …",
      else the last number).
    - `arithmetic`: the digits after the last `;` are the expected ones.
    - `exact`: the whole text equals, or the rest of the line after the last "answer is", "answer:" or
      `####`, or the last `\\boxed{}`, whichever comes last. Case, white space and a final period are ignored.

    No text makes this raise or hang: one that cannot be checked within the limits is wrong. Any thread
    may call it.

    Raises:
        ProtegeError: the machine cannot run math-verify at all.
    """
    if kind == "math":
        return _grade_math(text, expected)
    if kind == "arithmetic":
        return arithmetic.answer(text) == expected.strip()
    if kind == "exact":
        return _grade_exact(text, expected)
    raise ValueError(f"grader {kind!r}: expected 'math', 'exact' or 'arithmetic'")


def accuracy_with_error(correct: Sequence[bool], groups: Sequence[str] | None = None) -> tuple[float, float]:
    """Mean and its standard error; `groups[i]` names the row that sample i answers.

    Samples of one row are not independent, so the error is clustered by row (cluster-robust variance
    with the G/(G−1) correction); without groups this is the usual √(p(1−p)/(n−1)). NaN error for one row.
    """
    if not correct:
        raise ValueError("accuracy of no answers")
    mean = sum(correct) / len(correct)
    residual: dict[object, float] = {}
    for row, right in zip(groups if groups is not None else range(len(correct)), correct, strict=True):
        residual[row] = residual.get(row, 0.0) + (right - mean)
    if len(residual) == 1:
        return mean, math.nan
    variance = sum(r * r for r in residual.values()) * len(residual) / (len(residual) - 1)
    return mean, math.sqrt(variance) / len(correct)


# --- exact ----------------------------------------------------------------------------------------

_MARKER = re.compile(r"answer\s+is\b\s*:?|answer\s*:|####", re.IGNORECASE)


def _grade_exact(text: str, expected: str) -> bool:
    wanted = _normal(expected)
    if _normal(text) == wanted:
        return True
    answer, start = last_boxed(text) or (None, -1)
    markers = list(_MARKER.finditer(text))
    if markers and markers[-1].start() > start:
        answer = text[markers[-1].end() :].strip().partition("\n")[0]
    return answer is not None and _normal(answer) == wanted


def _normal(text: str) -> str:
    text = " ".join(text.casefold().split()).strip("*` ")
    return text.removesuffix(".").strip("*` ")


_BRACES = re.compile(r"(?P<box>\\+f?boxed\s*\{)|\\\\|\\[{}]|(?P<open>\{)|(?P<close>\})")  # else: escapes


def last_boxed(text: str) -> tuple[str, int] | None:
    """The content of the last closed, non-empty `\\boxed{…}` and where it starts; None without one.

    One pass, linear: a degenerate student writes thousands of them.
    """
    best: tuple[str, int] | None = None
    opened: list[re.Match[str]] = []
    for mark in _BRACES.finditer(text):
        if mark["box"] or mark["open"]:
            opened.append(mark)
        elif mark["close"] and opened:
            opening = opened.pop()
            newer = opening["box"] and (best is None or opening.start() > best[1])
            if newer and not text[opening.end() : mark.start()].isspace() and opening.end() < mark.start():
                best = text[opening.end() : mark.start()].strip(), opening.start()
    return best


# --- mathematics ----------------------------------------------------------------------------------


def _grade_math(text: str, expected: str) -> bool:
    wanted_box = last_boxed(expected)
    wanted = _bare(wanted_box[0] if wanted_box else expected)
    box = last_boxed(text)
    answer = _bare(box[0]) if box else text[-MAX_MATH_CHARS:]
    if not wanted or not answer.strip() or len(answer) > MAX_MATH_CHARS:
        return False
    if answer == wanted or (not box and _grade_exact(text, wanted)):
        return True
    ours, theirs = plain_number(_bare(answer)), plain_number(wanted)
    if ours is not None and theirs is not None:
        if ours == theirs:
            return True
        if ours.denominator == theirs.denominator == 1:
            return False  # two integers; whether 0.333333 is 1/3 is for math-verify
    return _worker.equal(f"\\boxed{{{answer}}}" if box else answer, f"\\boxed{{{wanted}}}")


def _bare(latex: str) -> str:
    """Without a final period and enclosing dollars."""
    latex = latex.strip().removesuffix(".")
    while len(latex) > 2 and latex[0] == latex[-1] == "$":
        latex = latex[1:-1].strip()
    return latex


_PLAIN = re.compile(r"([-+]?)(?:\\?\$)?([0-9]{1,3}(?:(?:,|\{,\})[0-9]{3})+|[0-9]{1,40})(\.[0-9]{1,40})?\.?")
_RATIO = re.compile(r"([-+]?)(?:\\[dt]?frac\{([0-9]{1,40})\}\{([0-9]{1,40})\}|([0-9]{1,40})/([0-9]{1,40}))")


def plain_number(text: str) -> Fraction | None:
    """The exact value of a text that is one plain number or ratio; None for anything else."""
    if m := _PLAIN.fullmatch(text):
        return Fraction(m[1] + re.sub(r"[^0-9]", "", m[2]) + (m[3] or ""))
    if m := _RATIO.fullmatch(text):
        above, below = int(m[2] or m[4]), int(m[3] or m[5])
        return Fraction(-above if m[1] == "-" else above, below) if below else None
    return None


# --- the process that runs math-verify ------------------------------------------------------------


class MathWorker:
    """One persistent child process that answers "are these two equal?", restarted when it is killed.

    One question at a time: a lock, because the pipe is one. A forked child starts its own.
    """

    def __init__(self, cpu_limit_s: float = CPU_LIMIT_S) -> None:
        self._cpu_limit_s = cpu_limit_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0  # the pid that started the process

    def equal(self, answer: str, expected: str) -> bool:
        question = json.dumps([answer, expected]).encode() + b"\n"
        with self._lock:
            process = self._running()
            assert process.stdin is not None
            try:
                process.stdin.write(question)
                process.stdin.flush()
                reply = self._reply(process)
            except BrokenPipeError:
                reply = b""
            if reply:
                return reply == b"1\n"
            status = process.wait()
            self._process = None
        reason = f"took more than {self._cpu_limit_s} s of CPU" if status == -signal.SIGPROF else f"status {status}"
        logger.warning("math-verify was stopped (%s); graded wrong: %.80r", reason, answer)
        return False

    def close(self) -> None:
        with self._lock:
            if self._process is not None and self._owner == os.getpid():
                self._process.kill()
                self._process.communicate()
            self._process = None

    @staticmethod
    def _reply(process: subprocess.Popen[bytes]) -> bytes:
        """One line; none from a process that has ended, or is ended here because it says nothing."""
        assert process.stdout is not None
        if not select.select([process.stdout], [], [], WALL_LIMIT_S)[0]:
            process.kill()
        return process.stdout.readline()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return self._process
        root = str(Path(__file__).resolve().parent.parent)
        code = f"import sys; sys.path.insert(0, {root!r}); from envs.grading import serve; serve({self._cpu_limit_s})"
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for the run; the worker ends when its stdin does
        )
        if self._reply(process) != b"ready\n":
            status = process.wait()
            raise ProtegeError(f"math grading did not start (status {status}); is math-verify installed?")
        self._process, self._owner = process, os.getpid()
        return process


_worker = MathWorker()
atexit.register(_worker.close)


def serve(cpu_limit_s: float) -> None:
    """The child's loop: one JSON line [answer, expected] in, "1" or "0" out, until stdin ends."""
    import resource

    from math_verify import parse, verify

    with os.fdopen(os.dup(1), "w") as replies:
        print("ready", file=replies, flush=True)
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)  # parsers print; replies must stay alone on their pipe
        os.dup2(silence, 2)
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        if hard == resource.RLIM_INFINITY or hard > MEMORY_LIMIT_BYTES:
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, hard))
        signal.signal(signal.SIGPROF, signal.SIG_DFL)  # the kernel ends us, whatever C call we are in
        for line in sys.stdin:
            answer, expected = json.loads(line)
            signal.setitimer(signal.ITIMER_PROF, cpu_limit_s)
            try:
                gold = parse(expected, parsing_timeout=None)  # type: ignore[arg-type]
                found = parse(answer, parsing_timeout=None)  # type: ignore[arg-type]
                right = verify(gold, found, timeout_seconds=None)
            except Exception:  # whatever sympy throws at text it cannot handle, RecursionError included
                right = False
            signal.setitimer(signal.ITIMER_PROF, 0)
            print("1" if right else "0", file=replies, flush=True)
