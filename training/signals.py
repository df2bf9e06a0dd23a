"""The second Ctrl-C: the first lets a run finish its update and save, the second does not wait for anything."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def second_signal_quits() -> Iterator[Callable[[], None]]:
    """Once what it gives has been called, SIGINT and SIGTERM end this process at once.

    Nothing is waited for, not even what is being computed: engines, sandboxes and half-written files are left to what
    guards them."""
    before: dict[int, Any] = {}

    def quit_now(*_: object) -> None:
        if os.isatty(1):
            os.write(1, b"\x1b[?25h")  # the panel hides the cursor
        os.write(2, b"\ninterrupted\n")
        os._exit(128 + signal.SIGINT)

    def arm() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, quit_now)

    try:
        yield arm
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
