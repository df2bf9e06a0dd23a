"""The one thread that computes: loading, sampling, scoring and training take turns on it.

Not a lock, a thread: torch's pool of CPU threads belongs to the thread that started it, and with two pools in
a process libgomp takes the machine for oversubscribed and lets idle threads sleep between products. Decoding,
which is many small products, then took 1.6 times as long (benchmarks/LOG.md).
"""

from __future__ import annotations

import asyncio
import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import anyio
import anyio.lowlevel

T = TypeVar("T")

_executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="device")


class Stopped(BaseException):
    """Out of a function on the device thread whose caller was cancelled. Nobody sees it but `compute`."""


@dataclass
class _Call:
    cancelled: bool = False
    committed: bool = False


_thread = threading.local()  # .call: what the device thread is in


def stop_if_cancelled() -> None:
    """For functions on the device thread, between two pieces of work: ends the function if its caller was cancelled."""
    call = getattr(_thread, "call", None)
    if call is not None and call.cancelled and not call.committed:
        raise Stopped


def commit() -> None:
    """For functions on the device thread that are about to change what must not be left half changed: from here on
    the function is finished and its caller has the result, cancelled or not."""
    stop_if_cancelled()
    if (call := getattr(_thread, "call", None)) is not None:
        call.committed = True


async def compute(function: Callable[..., T], *args: object) -> T:
    """`function(*args)` on the device thread, in turn. A cancelled caller waits until it has ended, see
    `stop_if_cancelled`, or leaves its turn to others."""
    await anyio.lowlevel.checkpoint()
    call = _Call()
    future = asyncio.get_running_loop().run_in_executor(_executor, _run, call, function, args)
    try:
        await asyncio.wait([future])
    except asyncio.CancelledError:
        call.cancelled = True
        with anyio.CancelScope(shield=True):  # never abandoned: nothing may compute behind its owner's back
            await asyncio.wait([future])
        if not call.committed:
            future.exception()  # else asyncio says that nobody asked for it
            raise
    return future.result()


def _run(call: _Call, function: Callable[..., T], args: tuple[object, ...]) -> T:
    _thread.call = call
    try:
        stop_if_cancelled()
        return function(*args)
    finally:
        _thread.call = None


def compute_blocking(function: Callable[..., T], *args: object) -> T:
    """The same, outside an event loop. Ctrl-C interrupts the function itself."""
    running: set[int] = set()  # the device thread, while it is in `function`
    lock = threading.Lock()

    def run() -> T:
        running.add(threading.get_ident())
        try:
            return function(*args)
        finally:
            with lock:
                running.clear()

    future = _executor.submit(run)
    try:
        return future.result()
    except KeyboardInterrupt:
        future.cancel()
        with lock:  # an exception that arrived after `function` had ended would end the thread
            for thread in running:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(KeyboardInterrupt))
        raise
