"""Work that waits for the device: bounded, taken in batches across clients, and dropped when its client is gone."""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio

from errors import ProtegeError
from models.teacher_service.wire import Refused
from models.types import TeacherView

Score = Callable[[Any, Sequence[TeacherView]], Awaitable[Sequence[Any]]]
"""(what is asked, views) -> one answer per view."""


@dataclass(eq=False)
class _Job:
    key: object
    views: Sequence[TeacherView]
    tokens: int
    done: anyio.Event = field(default_factory=anyio.Event)
    answers: list[Any] | None = None
    error: Exception | None = None
    gone: bool = False  # its client
    batch: _Batch | None = None  # that it is being scored in


@dataclass(eq=False)
class _Batch:
    jobs: Sequence[_Job]
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)


class ScoreQueue:
    """`submit` waits for its turn and its answer; `work` runs for as long as the service does.

    Jobs of one key (a model and what is asked of it) that wait together are scored in one call of up to
    `batch_tokens`, whoever sent them. The key of the oldest job goes first.
    """

    def __init__(self, score: Score, *, max_jobs: int, max_tokens: int, batch_tokens: int) -> None:
        self._score = score
        self._max_jobs, self._max_tokens, self._batch_tokens = max_jobs, max_tokens, batch_tokens
        self._waiting: list[_Job] = []
        self._arrived = anyio.Event()
        self._closed = False
        self._tokens_per_s = 1000.0  # a guess until the first batch

    @property
    def jobs(self) -> int:
        return len(self._waiting)

    @property
    def tokens(self) -> int:
        return sum(job.tokens for job in self._waiting)

    async def submit(self, key: object, views: Sequence[TeacherView]) -> list[Any]:
        """Cancelled, it leaves the queue, or its batch, which is given up once all have left it.

        Raises `Refused` when full or closed, and what scoring raises."""
        job = _Job(key, views, sum(len(view.token_ids) for view in views))
        if self._closed:
            raise Refused(503, "the service is shutting down", retry_after_s=2)
        # A single job always fits into an empty queue.
        if self._waiting and (self.jobs >= self._max_jobs or self.tokens + job.tokens > self._max_tokens):
            wait_s = min(30, math.ceil(self.tokens / self._tokens_per_s) or 1)
            raise Refused(503, f"{self.jobs} requests are waiting already", retry_after_s=wait_s)
        self._waiting.append(job)
        self._arrived.set()
        try:
            await job.done.wait()
        finally:
            job.gone = True
            if job in self._waiting:
                self._waiting.remove(job)
            if job.batch is not None and all(other.gone for other in job.batch.jobs):
                job.batch.scope.cancel()
        if job.error is not None:
            raise job.error
        assert job.answers is not None
        return job.answers

    def close(self) -> None:
        """Take no more jobs, and send back those that wait; a batch that is being scored is finished."""
        self._closed = True
        for job in self._waiting:
            job.error = Refused(503, "the service is shutting down", retry_after_s=2)
            job.done.set()
        self._waiting = []

    async def work(self) -> None:
        while True:
            while not self._waiting:
                self._arrived = anyio.Event()
                await self._arrived.wait()
            await self._run(self._next_batch())

    def _next_batch(self) -> list[_Job]:
        first, *others = self._waiting
        batch, tokens = [first], first.tokens
        for job in others:
            if job.key == first.key and tokens + job.tokens <= self._batch_tokens:
                batch.append(job)
                tokens += job.tokens
        self._waiting = [job for job in self._waiting if job not in batch]
        return batch

    async def _run(self, jobs: list[_Job]) -> None:
        batch = _Batch(jobs)
        for job in jobs:
            job.batch = batch
        with batch.scope:
            await self._finish(jobs)

    async def _finish(self, batch: list[_Job]) -> None:
        started = time.monotonic()
        try:
            answers = iter(await self._score(batch[0].key, [view for job in batch for view in job.views]))
        except (Refused, ProtegeError) as error:
            if len(batch) > 1:  # one client's request must not fail another's
                for job in batch:
                    if not job.gone:
                        await self._run([job])
                return
            batch[0].error = error
        except Exception as error:  # a bug: told to this client, and the worker lives on
            for job in batch:
                job.error = error
        else:
            for job in batch:
                job.answers = [next(answers) for _ in job.views]
            rate = sum(job.tokens for job in batch) / max(time.monotonic() - started, 1e-6)
            self._tokens_per_s += 0.2 * (rate - self._tokens_per_s)
        for job in batch:
            job.batch = None
            job.done.set()
