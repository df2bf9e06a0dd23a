"""SIGINT and SIGTERM: the first lets what runs save and clean up, the second does not wait for anything."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio

from errors import CheckpointError, ProtegeError
from models.exiting import exit_now

T = TypeVar("T")

SIGNALS = (signal.SIGINT, signal.SIGTERM)
EXIT_S = 20.0  # that Python may take to end after a signal
STOPPING = "stopping: what was begun is finished or undone; Ctrl-C again to quit now"


class Interrupted(KeyboardInterrupt):
    """Ended by a signal, in order."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


@dataclass
class Interruption:
    """Whether there was a signal, for code that is cancelled or about to be."""

    number: int | None = None


@contextmanager
def raised_at_signals() -> Iterator[None]:
    """For the main thread of a process that ends with this block: a signal raises `Interrupted` in the midst of it."""

    def stop(number: int) -> None:
        raise Interrupted(number)

    try:
        with _handled_by(stop):
            yield
    except Interrupted as interrupted:
        _quit_at_next()
        _quit_after(EXIT_S, interrupted.exit_code)
        raise


@asynccontextmanager
async def cancelled_at_signals(say: Callable[[str], object]) -> AsyncIterator[Interruption]:
    """The block is cancelled, and once it has cleaned up, `Interrupted` is raised. For the main thread's event loop."""
    interruption, scope, loop = Interruption(), anyio.CancelScope(), asyncio.get_running_loop()

    def cancel() -> None:
        scope.cancel()
        with contextlib.suppress(OSError):  # of `| tee log`, which had the same Ctrl-C
            say(STOPPING)

    def stop(number: int) -> None:
        interruption.number = number
        loop.call_soon_threadsafe(cancel)

    with _woken_by_signals(loop), _handled_by(stop):
        try:
            with scope:
                yield interruption
        except (ProtegeError, BaseExceptionGroup) as error:
            # why: engines may have had the same signal, and died of it
            others = BaseExceptionGroup("", [error]).split(_may_follow_from_a_signal)[1]
            if interruption.number is None or others is not None:
                raise
    if interruption.number is not None:
        raise Interrupted(interruption.number)


def run(function: Callable[..., Awaitable[T]], *args: Any) -> T:
    """`anyio.run`, where signals cancel the function. Raises `Interrupted` when it has cleaned up."""

    async def cancellable() -> T:
        async with cancelled_at_signals(lambda text: print(text, file=sys.stderr, flush=True)):
            return await function(*args)
        raise AssertionError("cancelled, and nothing was raised")

    return anyio.run(cancellable)


@contextmanager
def _woken_by_signals(loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """A signal that comes just before the loop begins to wait would else be handled when it has waited."""
    ours, woken = socket.socketpair()
    for end in (ours, woken):
        end.setblocking(False)
    loop.add_reader(ours, ours.recv, 4096)
    before = signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        loop.remove_reader(ours)
        ours.close()
        woken.close()


@contextmanager
def _handled_by(first: Callable[[int], None]) -> Iterator[None]:
    """`first` is called with the number of the first signal; the second ends the process."""

    def handle(number: int, _: object) -> None:
        _quit_at_next()
        first(number)

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) in (handle, _quit):  # else somebody else's, who stays in charge
                signal.signal(number, handler)


def _quit_at_next() -> None:
    for number in SIGNALS:
        signal.signal(number, _quit)


def _quit_after(seconds: float, exit_code: int) -> None:
    """All is cleaned up, but Python waits at its end for threads that compute or download."""

    def end() -> None:
        try:
            sys.stdout.flush()
        finally:
            os._exit(exit_code)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def _quit(number: int, _: object) -> None:
    """Not even what is being computed is waited for: engines, sandboxes and half-written files are left to what guards
    them."""
    exit_now(128 + number, (1, b"\x1b[?25h" * os.isatty(1)), (2, b"\ninterrupted\n"))  # the panel hides the cursor


def _may_follow_from_a_signal(error: BaseException) -> bool:
    return isinstance(error, ProtegeError) and not isinstance(error, CheckpointError)
