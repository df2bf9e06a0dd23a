"""Signals to an event loop in this process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import anyio
import pytest

from training.signals import STOPPING, Interrupted, cancelled_at_signals

BUSY = """
import os, anyio
from training import signals
async def work():
    os.write(int(os.environ["READY"]), b"x")
    with anyio.CancelScope(shield=True):
        while True:
            {step}
            await anyio.sleep(0)
signals.run(work)
"""
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("pipe", "step"), [("full", 'print("x" * 15, flush=True)'), ("closed", "pass")])
def test_a_second_signal_ends_a_process_whose_output_nobody_reads(pipe: str, step: str):
    """As of `recipe 2>&1 | less`, and of `| tee log`, which has had the first Ctrl-C too."""
    (output, its_output), (ready, its_ready) = os.pipe(), os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY.format(step=step)], stdout=its_output, stderr=its_output, cwd=ROOT,
        env={**os.environ, "READY": str(its_ready)}, pass_fds=[its_ready],
    )  # fmt: skip
    os.close(its_output)
    os.close(its_ready)
    try:
        assert os.read(ready, 1) == b"x"
        if pipe == "closed":
            os.close(output)
        time.sleep(0.3)  # until the pipe is full
        for _ in range(2):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
        assert process.wait(10) == 143
    finally:
        process.kill()
        process.wait()
        for end in [ready, output][: 1 + (pipe == "full")]:
            os.close(end)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_cannot_be_told_of_is_heard_all_the_same(number: signal.Signals):
    """Ctrl-C in `recipe | tee log` ends tee, too, and with it the pipe."""
    said = []

    def say(text: str) -> None:
        said.append(text)
        raise BrokenPipeError

    async def main() -> None:
        async with cancelled_at_signals(say) as interruption:
            os.kill(os.getpid(), number)
            try:
                await anyio.sleep(30)
            finally:
                assert interruption.number == number

    started = time.monotonic()
    with pytest.raises(Interrupted) as caught:
        anyio.run(main)
    assert said == [STOPPING] and caught.value.exit_code == 128 + number
    assert time.monotonic() - started < 10
