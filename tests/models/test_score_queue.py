"""The queue between many clients and one device, with a scripted scorer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import anyio
import numpy as np
import pytest
import torch

from errors import TeacherError
from models.teacher_service.queueing import ScoreQueue
from models.teacher_service.wire import Refused
from models.types import Signal, TeacherView

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def view(mark: int, length: int = 10) -> TeacherView:
    return TeacherView(np.full(length, mark), np.array([1]), np.array([1]))


class Scripted:
    """Records the marks of each call. Waits at `gate`; fails any call that holds a view marked `bad`."""

    def __init__(self, bad: int | None = None) -> None:
        self.calls: list[tuple[Any, list[int]]] = []
        self.gate = anyio.Event()
        self.bad = bad

    async def __call__(self, key: Any, views: Sequence[TeacherView]) -> list[Signal]:
        marks = [int(v.token_ids[0]) for v in views]
        self.calls.append((key, marks))
        await self.gate.wait()
        if self.bad in marks:
            raise TeacherError("this one cannot be scored")
        return [Signal(logprobs=torch.tensor([-float(mark)])) for mark in marks]


def queue_of(scripted: Scripted, *, max_jobs: int = 100, max_tokens: int = 1000, batch_tokens: int = 40) -> ScoreQueue:
    return ScoreQueue(scripted, max_jobs=max_jobs, max_tokens=max_tokens, batch_tokens=batch_tokens)


class Clients:
    """Submits jobs in order, keeps answers and errors by mark."""

    def __init__(self, queue: ScoreQueue, tasks: Any) -> None:
        self.queue, self.tasks = queue, tasks
        self.answers: dict[int, float] = {}
        self.errors: dict[int, Exception] = {}

    async def submit(self, key: str, mark: int, length: int = 10) -> anyio.CancelScope:
        scope = anyio.CancelScope()

        async def run() -> None:
            with scope:
                try:
                    (signal,) = await self.queue.submit(key, [view(mark, length)])
                    assert signal.logprobs is not None
                    self.answers[mark] = signal.logprobs.item()
                except (Refused, TeacherError) as error:
                    self.errors[mark] = error

        self.tasks.start_soon(run)
        await anyio.wait_all_tasks_blocked()
        return scope


async def test_those_of_one_key_that_wait_together_are_one_call_and_the_oldest_goes_first():
    scripted = Scripted()
    async with anyio.create_task_group() as tasks:
        clients = Clients(queue_of(scripted), tasks)
        tasks.start_soon(clients.queue.work)
        for key, mark in (("a", 1), ("b", 2), ("a", 3), ("b", 4), ("a", 5)):
            await clients.submit(key, mark)
        scripted.gate.set()
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    assert scripted.calls == [("a", [1]), ("b", [2, 4]), ("a", [3, 5])]
    assert clients.answers == {mark: -float(mark) for mark in range(1, 6)}


async def test_a_call_holds_no_more_tokens_than_a_batch_but_at_least_one_job():
    scripted = Scripted()
    async with anyio.create_task_group() as tasks:
        clients = Clients(queue_of(scripted), tasks)
        for mark, length in ((1, 100), (2, 30), (3, 20), (4, 10)):
            await clients.submit("a", mark, length)
        scripted.gate.set()
        tasks.start_soon(clients.queue.work)
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    assert scripted.calls == [("a", [1]), ("a", [2, 4]), ("a", [3])]


async def test_a_full_queue_says_when_to_come_back():
    scripted = Scripted()
    async with anyio.create_task_group() as tasks:
        clients = Clients(queue_of(scripted, max_jobs=2, max_tokens=35), tasks)
        tasks.start_soon(clients.queue.work)
        await clients.submit("a", 1)  # being scored
        await clients.submit("a", 2)
        await clients.submit("a", 3, 30)  # more tokens than may wait
        await clients.submit("a", 4)
        await clients.submit("a", 5)  # more requests than may wait
        scripted.gate.set()
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    assert clients.answers.keys() == {1, 2, 4}
    for mark in (3, 5):
        refused = clients.errors[mark]
        assert isinstance(refused, Refused) and refused.status == 503 and (refused.retry_after_s or 0) >= 1


async def test_a_request_larger_than_the_queue_is_taken_when_nothing_waits():
    scripted = Scripted()
    scripted.gate.set()
    async with anyio.create_task_group() as tasks:
        clients = Clients(queue_of(scripted, max_tokens=35), tasks)
        tasks.start_soon(clients.queue.work)
        await clients.submit("a", 1, 500)
        tasks.cancel_scope.cancel()
    assert clients.answers == {1: -1.0}


async def test_a_client_that_is_gone_leaves_the_queue():
    scripted = Scripted()
    async with anyio.create_task_group() as tasks:
        clients = Clients(queue_of(scripted), tasks)
        tasks.start_soon(clients.queue.work)
        await clients.submit("a", 1)
        gone = await clients.submit("a", 2)
        await clients.submit("a", 3)
        assert (clients.queue.jobs, clients.queue.tokens) == (2, 20)
        gone.cancel()
        await anyio.wait_all_tasks_blocked()
        assert (clients.queue.jobs, clients.queue.tokens) == (1, 10)
        scripted.gate.set()
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    assert scripted.calls == [("a", [1]), ("a", [3])]


async def test_a_batch_that_all_have_left_is_given_up():
    scripted, given_up = Scripted(), []

    async def score(key: Any, views: Sequence[TeacherView]) -> list[Signal]:
        try:
            return await scripted(key, views)
        except BaseException:
            given_up.append([int(view.token_ids[0]) for view in views])
            raise

    async with anyio.create_task_group() as tasks:
        clients = Clients(ScoreQueue(score, max_jobs=9, max_tokens=1000, batch_tokens=40), tasks)
        first = await clients.submit("a", 1)
        second = await clients.submit("a", 2)
        tasks.start_soon(clients.queue.work)
        await anyio.wait_all_tasks_blocked()
        await clients.submit("a", 3)
        first.cancel()
        await anyio.wait_all_tasks_blocked()
        assert not given_up, "somebody still waits for it"
        second.cancel()
        await anyio.wait_all_tasks_blocked()
        assert given_up == [[1, 2]] and scripted.calls[1:] == [("a", [3])], "the next one is begun"
        scripted.gate.set()
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    assert clients.answers == {3: -3.0}


async def test_a_request_that_fails_takes_no_other_with_it():
    scripted = Scripted(bad=2)
    scripted.gate.set()
    async with anyio.create_task_group() as tasks:
        clients = Clients(queue_of(scripted), tasks)
        for mark in (1, 2, 3):
            await clients.submit("a", mark)
        tasks.start_soon(clients.queue.work)
        await anyio.wait_all_tasks_blocked()
        await clients.submit("a", 4)
        tasks.cancel_scope.cancel()
    assert clients.answers == {1: -1.0, 3: -3.0, 4: -4.0}
    assert isinstance(clients.errors[2], TeacherError)
    assert scripted.calls == [("a", [1, 2, 3]), ("a", [1]), ("a", [2]), ("a", [3]), ("a", [4])]


async def test_closing_sends_those_away_that_wait_and_finishes_what_is_being_scored():
    scripted = Scripted()
    async with anyio.create_task_group() as tasks:
        clients = Clients(queue_of(scripted), tasks)
        tasks.start_soon(clients.queue.work)
        await clients.submit("a", 1)
        await clients.submit("a", 2)
        clients.queue.close()
        await clients.submit("a", 3)
        scripted.gate.set()
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    assert clients.answers == {1: -1.0}
    assert {mark: error.status for mark, error in clients.errors.items()} == {2: 503, 3: 503}  # type: ignore[attr-defined]
