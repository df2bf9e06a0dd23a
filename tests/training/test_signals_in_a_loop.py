"""Signals to an event loop in this process."""

from __future__ import annotations

import os
import signal
import time

import anyio
import pytest

from training.signals import STOPPING, Interrupted, cancelled_at_signals


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
