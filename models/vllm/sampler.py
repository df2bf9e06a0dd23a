"""The student's engine on vLLM: requests over one or several engines, and weights proven to be the learner's."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import anyio
import anyio.abc

from envs.types import Sampled, SamplingParams
from errors import SamplerError
from models.types import WeightSource
from models.vllm.engine import Answer, Engine, Outdated, Transient, Unreachable
from models.vllm.handover import Handover, Model
from models.vllm.pool import Member, Pool

TRIES = 4
SLEEP_S = 600.0  # weights of any size are in the host's memory by then


@dataclass(frozen=True)
class Waits:
    """How long things may take."""

    request_s: float = 1800.0  # one turn
    patience_s: float = 30.0  # that all engines may be away
    look_every_s: float = 5.0  # at engines that are away or busy
    look_s: float = 10.0  # for an engine to say that it lives
    pause_s: float = 0.5  # before a second try; then twice as long


class VLLMSampler:
    """`Sampler` on vLLM engines that all have the same model. `slots`: most requests in flight at each.

    Until `update_weights` is called they sample with the weights that they have: those of `served`, if it is given, of
    what they serve."""

    def __init__(
        self,
        engines: Sequence[Engine],
        model: Model,
        *,
        temperature: float,
        slots: int,
        waits: Waits | None = None,
        served: str | None = None,
    ) -> None:
        self.waits = waits or Waits()
        self._pool = Pool(engines, slots=slots, patience_s=self.waits.patience_s)
        self._handover = Handover(model, temperature, secrets.token_hex(4))
        self._version = 0
        self._label: str | None = None  # of the weights that count, once this run has handed some over
        self._adapter = served
        self._tasks: anyio.abc.TaskGroup | None = None
        self._requests: set[anyio.CancelScope] = set()
        self._update = anyio.Lock()

    async def __aenter__(self) -> VLLMSampler:
        for member in self._pool.members:
            await member.engine.open()
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        self._tasks.start_soon(self._look_after_engines)
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._tasks is not None
        tasks, self._tasks = self._tasks, None
        for scope in self._requests:
            scope.cancel()
        tasks.cancel_scope.cancel()
        try:
            await tasks.__aexit__(None, None, None)
        finally:
            with anyio.CancelScope(shield=True):
                await self._handover.clean()
                for member in self._pool.members:
                    await member.engine.close()

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams) -> Sampled:
        """Sample one turn after `prompt_ids`. Raises `SamplerError`, `SamplerUnavailableError`."""
        if self._tasks is None:
            raise SamplerError("the sampler is not running: use it within `async with sampler:`")
        if not len(prompt_ids) or params.max_tokens < 1:
            raise SamplerError(f"nothing to do: {len(prompt_ids)} prompt ids, max_tokens={params.max_tokens}")
        with anyio.CancelScope() as scope:
            self._requests.add(scope)
            try:
                return await self._sample(list(prompt_ids), params)
            finally:
                self._requests.discard(scope)
        raise SamplerError("the student's engine failed: it was closed while the request was in flight")

    async def _sample(self, prompt_ids: list[int], params: SamplingParams) -> Sampled:
        failures: list[str] = []
        while len(failures) < TRIES:
            async with self._pool.place(prompt_ids) as member:
                try:
                    return await self._sample_at(member, prompt_ids, params)
                except Transient as error:  # it returned nothing: asking twice does no harm
                    gone = isinstance(error, Unreachable) and not await self._lives(member, error)
                    if not gone or isinstance(error, Outdated):  # which may say of itself that it is not
                        failures.append(str(error))
            if 0 < len(failures) < TRIES:
                await anyio.sleep(self.waits.pause_s * 2 ** (len(failures) - 1))
        raise SamplerError(f"{TRIES} tries failed, the last with: {failures[-1]}")

    async def _lives(self, member: Member, error: Unreachable) -> bool:
        """One broken connection is no reason to break all of them off. Takes an engine out that is really gone."""
        if member.down is None:
            if isinstance(error, Outdated):
                member.take_out(str(error))
            else:
                try:
                    with anyio.fail_after(self.waits.look_s):
                        await member.engine.check_alive()
                except (Transient, TimeoutError):
                    member.take_out(str(error))
        return member.down is None

    async def _sample_at(self, member: Member, prompt_ids: list[int], params: SamplingParams) -> Sampled:
        adapter = self._adapter
        with anyio.CancelScope() as scope:  # cancelled when the engine is found to be gone
            member.scopes.add(scope)
            try:
                with anyio.fail_after(self.waits.request_s):
                    await member.engine.wake()
                    answer = await member.engine.generate(prompt_ids, params, adapter)
            except TimeoutError as error:
                raise SamplerError(
                    f"{member.engine.name} took more than {self.waits.request_s:g} s for one turn. "
                    "Raise sampler.timeout_s, or lower max_tokens"
                ) from error
            finally:
                member.scopes.discard(scope)
        if scope.cancelled_caught:
            raise Unreachable(str(member.down))
        version = self._version_of(member, answer, adapter)
        self._pool.remember([*prompt_ids, *answer.token_ids], member)
        return Sampled(answer.token_ids, answer.logprobs, answer.stopped, version)

    def _version_of(self, member: Member, answer: Answer, adapter: str | None) -> int:
        """Raises `Outdated` for tokens that were drawn by weights which this run has not handed over."""
        if self._label is None:
            return self._version
        if (version := self._handover.version_of(answer.labels, adapter)) is None:
            raise Outdated(
                f"{member.engine.name} sampled with the weights {', '.join(answer.labels)!r} and not with this run's: "
                "it was started again, or another run uses it"
            )
        return version

    async def sleep(self) -> None:
        """Raises `SamplerError` while requests are running."""
        if self._requests:
            raise SamplerError("the sampler cannot sleep while requests are running")
        for member in self._pool.alive:
            try:
                with anyio.fail_after(SLEEP_S):
                    await member.engine.sleep()
            except (Transient, TimeoutError) as error:  # the next weights find no engine, and say so
                member.take_out(str(error) or f"{member.engine.name} froze while it gave its memory back")

    async def update_weights(self, source: WeightSource, version: int) -> None:
        """Raises `ProtegeError`: weights that did not arrive, `SamplerUnavailableError`: at no engine."""
        async with self._update:
            await self._look(revive=True)
            handed = await self._handover.to(self._pool.members, source, version)
            self._version, self._label, self._adapter = version, handed.label, handed.adapter
            self._pool.forget()
            if not self._pool.alive:
                raise self._pool.unavailable()
            self._pool.notify()

    async def _look(self, *, revive: bool = False) -> None:
        """`revive`: engines with other weights count as well, for they are about to get new ones."""
        label, adapter = (None, None) if revive else (self._label, self._adapter)
        await self._pool.look(label, adapter, timeout_s=self.waits.look_s, before_update=revive)

    async def _look_after_engines(self) -> None:
        while True:
            await anyio.sleep(self.waits.look_every_s)
            if not self._update.locked():  # an engine that reads weights may well be silent
                await self._look()
