"""Everything computes on one thread, in turn, and Ctrl-C neither leaves it busy nor kills it."""

import os
import signal
import threading
import time

import anyio
import pytest

from models.device_thread import compute, compute_blocking


def test_async_and_blocking_callers_share_one_thread():
    async def two() -> set[int]:
        found: set[int] = set()

        async def one() -> None:
            found.add(await compute(threading.get_ident))

        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(one)
        return found

    assert anyio.run(two) == {compute_blocking(threading.get_ident)}
    assert threading.get_ident() != compute_blocking(threading.get_ident)


def test_an_error_reaches_the_caller():
    with pytest.raises(ZeroDivisionError):
        compute_blocking(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        anyio.run(compute, lambda: 1 / 0)


def test_a_cancelled_caller_waits_until_the_function_has_ended():
    ended = []

    async def main() -> None:
        with anyio.move_on_after(0.05):
            await compute(lambda: (time.sleep(0.2), ended.append(True)))
        assert ended

    anyio.run(main)


def test_ctrl_c_interrupts_the_function_and_the_thread_lives_on():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a process started in the background ignores it
    interrupted = threading.Event()

    def work() -> None:
        try:
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
            while True:
                time.sleep(0.01)
        except KeyboardInterrupt:
            interrupted.set()
            raise

    with pytest.raises(KeyboardInterrupt):
        compute_blocking(work)
    assert interrupted.wait(5)
    assert compute_blocking(lambda: 7) == 7


def test_a_function_that_raises_keyboard_interrupt_does_not_end_the_thread():
    def work() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compute_blocking(work)
    assert compute_blocking(lambda: 7) == 7
