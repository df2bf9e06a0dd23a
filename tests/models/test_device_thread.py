"""Everything computes on one thread, in turn, and Ctrl-C neither leaves it busy nor kills it."""

import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from functools import partial

import anyio
import anyio.to_thread
import pytest

from models.device_thread import commit, compute, compute_blocking, stop_if_cancelled


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


def test_a_cancelled_function_ends_at_its_next_look_and_what_waits_behind_it_is_not_begun():
    looked, begun = [], []

    async def main() -> None:
        inside = threading.Event()

        def work() -> None:
            while True:
                looked.append(len(looked))
                inside.set()
                time.sleep(0.01)
                stop_if_cancelled()

        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(compute, work)
                await anyio.to_thread.run_sync(inside.wait)
                tasks.start_soon(compute, begun.append, 1)
                await anyio.sleep(0.01)
                scope.cancel()
        assert scope.cancelled_caught
        assert await compute(lambda: 7) == 7

    anyio.run(main)
    assert looked and not begun
    stop_if_cancelled()  # elsewhere it is nothing


async def cancelled_in_the_midst(
    caller: Callable[[], Awaitable[None]], inside: threading.Event, go_on: threading.Event
) -> None:
    """The caller is cancelled while its function is `inside`, which then is let go on."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(caller)
        await anyio.to_thread.run_sync(inside.wait)
        tasks.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            await anyio.sleep(0.05)
            go_on.set()


@pytest.mark.parametrize("shielded", [False, True])
def test_a_function_that_has_committed_is_finished_and_its_result_given(shielded: bool):
    committed, go_on, steps = threading.Event(), threading.Event(), []

    def work() -> str:
        if not shielded:
            commit()
        committed.set()
        go_on.wait(20)
        stop_if_cancelled()
        steps.append("whole")
        return "result"

    async def main() -> None:
        async def one() -> None:
            with anyio.CancelScope(shield=shielded):
                steps.append(await compute(work))
            await anyio.sleep(0)
            steps.append("never")

        await cancelled_in_the_midst(one, committed, go_on)

    anyio.run(main)
    assert steps == ["whole", "result"]


def test_what_is_cancelled_already_commits_to_nothing():
    inside, go_on, done = threading.Event(), threading.Event(), []

    def work() -> None:
        inside.set()
        go_on.wait(20)
        commit()
        done.append(1)

    anyio.run(cancelled_in_the_midst, partial(compute, work), inside, go_on)
    assert not done


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
