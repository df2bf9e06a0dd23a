"""Blocking calls in threads that nobody has to wait for."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from functools import partial
from typing import TypeVar

T = TypeVar("T")


def call_in_thread(function: Callable[[], T]) -> asyncio.Future[T]:
    """What it returns or raises, once it does. Wait for it with `asyncio.wait`: it cannot be cancelled.

    Not `anyio.to_thread`: whoever is cancelled there waits for the call's end, and so does Python's own end. A call to
    an engine that is frozen has none."""
    loop = asyncio.get_running_loop()
    call: asyncio.Future[T] = loop.create_future()
    call.add_done_callback(lambda call: call.exception())  # else asyncio says that nobody asked for it

    def run() -> None:
        try:
            settle = partial(call.set_result, function())
        except Exception as error:
            settle = partial(call.set_exception, error)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any longer
            loop.call_soon_threadsafe(settle)

    threading.Thread(target=run, daemon=True, name="container engine").start()
    return call
