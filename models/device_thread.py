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
from typing import TypeVar

import anyio
import anyio.lowlevel

T = TypeVar("T")

_executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="device")


async def compute(function: Callable[..., T], *args: object) -> T:
    """`function(*args)` on the device thread, in turn. A cancelled caller waits until it has ended."""
    await anyio.lowlevel.checkpoint()
    future = asyncio.get_running_loop().run_in_executor(_executor, lambda: function(*args))
    with anyio.CancelScope(shield=True):  # never abandoned: nothing may compute behind its owner's back
        await asyncio.wait([future])
    return future.result()


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
