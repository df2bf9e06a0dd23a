"""What is sent to a shell for one command, given to a bash of this machine."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator

import pytest

from sandbox.shell import LONG_BYTES, line

TOKEN = "ab" * 16
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def sent(command: str, **options: object) -> bytes:
    given = {"mark": None, "workdir": None, "env": None, "stdin": None, **options}
    return line(command, TOKEN, **given).encode()  # type: ignore[arg-type]


@contextlib.contextmanager
def bash() -> Iterator[subprocess.Popen[bytes]]:
    pipe = subprocess.PIPE
    with subprocess.Popen(["bash", "--norc"], stdin=pipe, stdout=pipe, stderr=pipe) as process:
        try:
            yield process
        finally:
            process.kill()


def answers(*texts: bytes) -> tuple[list[tuple[bytes, int]], bytes]:
    """Output and status of each command, and all complaints."""
    with bash() as process:
        out, err = process.communicate(b"".join(texts), timeout=60)
    parts = out.split(TOKEN.encode())[1:]  # output, report and what is between two commands, for each command
    return [(parts[i], int(parts[i + 1].rstrip(b"\0"))) for i in range(0, len(parts) - 2, 3)], err.replace(
        TOKEN.encode(), b""
    )


LONG = "#" + "x" * LONG_BYTES + "\n"


@pytest.mark.parametrize(
    "before", ["", "set -a", "TMOUT=1", "readonly TMOUT=9", "set -o posix", "export LC_ALL=C.UTF-8"]
)
def test_long_texts_are_run_as_short_ones(before: str):
    short, long = (
        answers(sent(before), sent(f"{pad}cat; echo é; (exit 3)", stdin=b"\0'\\n" * times))
        for pad, times in (("", 3), (LONG, 3 * LONG_BYTES))
    )
    assert long[1] == short[1] == b""
    (_, (said, status)), (_, (first, same)) = long[0], short[0]
    assert (status, same) == (3, 3)
    assert (said, first) == (b"\0'\\n" * 3 * LONG_BYTES + "é\n".encode(), b"\0'\\n" * 3 + "é\n".encode())


@pytest.mark.parametrize(
    "broken", [sent("echo 'open" + LONG), sent(LONG + "echo x", workdir="/nowhere", stdin=b"y" * 200_000)]
)
def test_what_could_not_be_run_leaves_nothing_behind(broken: bytes):
    """Exported, it would be too long an environment for every program."""
    found, _ = answers(sent("set -a"), broken, sent("env | wc -c; set | grep -c '^__text\\|^__input'"))
    assert found[1][1] in (1, 2)
    size, left = found[2][0].split()
    assert int(size) < 10_000 and left == b"0"


def test_a_text_that_did_not_arrive_whole_is_not_begun():
    """The shell ends before the command, which is then run in another."""
    text = sent(LONG + "echo half\n" * 1000 + "echo END")
    with bash() as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(sent("readonly TMOUT=1") + text[:-3000])
        process.stdin.flush()
        time.sleep(1.5)
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(text[-3000:])
            process.stdin.close()
        process.stdin = None
        out = process.stdout.read()
        status = process.wait(timeout=10)
    assert out.count(TOKEN.encode()) == 3 and b"half" not in out and status != 0
