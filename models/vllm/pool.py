"""Which engine a request goes to: one that lives, has this run's weights, and has read the episode's earlier turns."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio

from errors import SamplerError, SamplerUnavailableError
from models.vllm.engine import Engine, Outdated, Transient, Unreachable

REMEMBERED = 1 << 16  # turns whose engine is known


@dataclass(eq=False)
class Member:
    """One engine of the pool."""

    engine: Engine
    load: int = 0  # requests in flight
    down: str | None = None  # why it gets no requests
    unproven: bool = False  # it was given weights, and nobody knows what it has: no requests until some are proven
    misses: int = 0  # looks in a row that found it silent
    scopes: set[anyio.CancelScope] = field(default_factory=set)  # of its requests

    def take_out(self, why: str) -> None:
        """No further requests; those in flight are broken off, to be asked elsewhere."""
        self.down = why
        for scope in self.scopes:
            scope.cancel()


class Pool:
    """Engines of one run. At most `slots` requests at a time go to each; the others wait for the first free place."""

    def __init__(self, engines: Sequence[Engine], *, slots: int, patience_s: float) -> None:
        self.members = [Member(engine) for engine in engines]
        self.slots = slots
        self.patience_s = patience_s
        self._changed = anyio.Event()
        self._read_by: OrderedDict[int, Member] = OrderedDict()  # hash of a log -> who has it in its prefix cache

    @property
    def alive(self) -> list[Member]:
        return [member for member in self.members if member.down is None]

    @asynccontextmanager
    async def place(self, prompt_ids: Sequence[int]) -> AsyncIterator[Member]:
        """A place at an engine. Raises `SamplerUnavailableError` once none has lived for `patience_s`."""
        preferred = self._reader(prompt_ids)
        while (member := self._free(preferred)) is None:
            with anyio.move_on_after(self.patience_s) as waited:
                await self._changed.wait()
            if waited.cancelled_caught and not self.alive:
                raise self.unavailable()
        member.load += 1
        try:
            yield member
        finally:
            member.load -= 1
            self.notify()

    def unavailable(self) -> SamplerUnavailableError:
        reasons = "; ".join(dict.fromkeys(str(member.down) for member in self.members))
        return SamplerUnavailableError(
            f"no engine is left to sample the student from: {reasons}. Nothing was trained on what is missing. Start "
            "the server again with the same command as before, if it is one of yours, then repeat this run's command: "
            "it goes on from its last checkpoint"
        )

    def remember(self, log: Sequence[int], member: Member) -> None:
        """The next turn starts with this log, and `member` has read it."""
        if len(self.members) > 1:
            self._read_by[_hashes(log)[-1]] = member
            if len(self._read_by) > REMEMBERED:
                self._read_by.popitem(last=False)

    def forget(self) -> None:
        """New weights: no prefix cache holds anything."""
        self._read_by.clear()

    def notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    def _free(self, preferred: Member | None) -> Member | None:
        free = [member for member in self.alive if member.load < self.slots and not member.unproven]
        if preferred in free:
            return preferred
        return min(free, key=lambda member: member.load, default=None)

    def _reader(self, prompt_ids: Sequence[int]) -> Member | None:
        """Who has read the longest beginning of this log that ends a turn."""
        if len(self.members) == 1:
            return None
        for key in reversed(_hashes(prompt_ids)):
            if key in self._read_by:
                return self._read_by[key]
        return None

    # --- who lives

    async def look(
        self, label: str | None, adapter: str | None, *, timeout_s: float, before_update: bool = False
    ) -> None:
        """At every engine that is down or has requests. `label` and `adapter`: of the weights that count.
        `before_update`: engines whose weights were not proven are looked for as well, to be given new ones."""
        async with anyio.create_task_group() as tasks:
            for member in self.members:
                if member.down is not None or member.load:
                    tasks.start_soon(self._look_at, member, label, adapter, timeout_s, before_update)

    async def _look_at(
        self, member: Member, label: str | None, adapter: str | None, timeout_s: float, before_update: bool
    ) -> None:
        try:
            with anyio.fail_after(timeout_s):
                await member.engine.check_alive()
                if member.down is not None:
                    await check_current(member.engine, label, adapter)
        except (Transient, TimeoutError, SamplerError) as error:  # the last: what answers there is no vLLM
            member.misses += 1
            why = str(error) or f"{member.engine.name} did not answer within {timeout_s:g} s"
            if isinstance(error, Outdated):
                member.down = why
            elif member.down is None and (member.misses >= 2 or isinstance(error, Unreachable)):
                member.take_out(why)
        else:
            member.misses = 0
            if member.down is not None and (before_update or not member.unproven):
                member.down = None
                self.notify()


async def check_current(engine: Engine, label: str | None, adapter: str | None) -> None:
    """Raises `Outdated`."""
    if adapter is not None and not await engine.has_adapter(adapter):
        raise Outdated(f"{engine.name} does not have the adapter {adapter} (it was started again)")
    if label is not None and (found := await engine.label()) != label:
        raise Outdated(
            f"{engine.name} has the weights {found!r} and not {label!r} (it was started again, or another run uses it)"
        )


def _hashes(log: Sequence[int]) -> list[int]:
    """Of every beginning of the log."""
    found, value = [], 0
    for token in log:
        value = (value * 1_000_003 + token + 1) % 2_305_843_009_213_693_951  # a prime, 2^61 - 1
        found.append(value)
    return found
