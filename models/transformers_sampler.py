"""The student's engine on transformers, in-process: concurrent requests share one decoding batch.

`async with TransformersSampler(lm) as sampler` runs one driver task; the model itself runs on the device
thread, a few tokens at a time, so that tools, scoring and cancellation are never blocked for long. Every
request draws from its own seeded stream of uniforms, so its sample does not depend on its neighbours.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import anyio
import anyio.abc
import anyio.lowlevel
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from envs.types import Sampled, SamplingParams
from errors import SamplerError
from models.causal_lm import CausalLM
from models.device_thread import compute
from models.generation import make_stepper
from models.types import WeightSource

STEPS_PER_HOP = 8  # tokens between two looks at new requests and cancellations


@dataclass(eq=False)
class _Request:
    prompt: list[int]
    params: SamplingParams
    uniforms: Float[Tensor, " max_tokens"]
    version: int
    done: anyio.Event = field(default_factory=anyio.Event)
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False
    cancelled: bool = False
    error: Exception | None = None


class TransformersSampler:
    """`Sampler` on a `CausalLM`. `slots` is the largest decoding batch."""

    def __init__(
        self,
        lm: CausalLM,
        tokenizer: PreTrainedTokenizerBase,
        *,
        slots: int = 64,
    ) -> None:
        self._lm = lm
        self._tokenizer = tokenizer
        self._stepper = make_stepper(lm, slots)
        self._waiting: deque[_Request] = deque()
        self._running: list[_Request] = []  # in the stepper's row order
        self._version = 0
        self._wake = anyio.Event()
        self._tasks: anyio.abc.TaskGroup | None = None

    async def __aenter__(self) -> TransformersSampler:
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        self._tasks.start_soon(self._drive)
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._tasks is not None
        self._tasks.cancel_scope.cancel()
        try:
            await self._tasks.__aexit__(None, None, None)
        finally:
            self._tasks = None
            for request in (*self._running, *self._waiting):  # nobody else would ever answer them
                request.error = SamplerError("it was closed while the request was in flight")
                request.done.set()
            self._running, self._waiting = [], deque()
            self._stepper.forget()

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams) -> Sampled:
        """Sample one turn after `prompt_ids`. Raises `SamplerError` if the engine fails."""
        if self._tasks is None:
            raise SamplerError("the sampler is not running: use it within `async with sampler:`")
        if not len(prompt_ids) or params.max_tokens < 1:
            raise SamplerError(f"nothing to do: {len(prompt_ids)} prompt ids, max_tokens={params.max_tokens}")
        generator = torch.Generator().manual_seed(params.seed)
        uniforms = torch.rand(params.max_tokens, generator=generator)
        request = _Request(list(prompt_ids), params, uniforms, self._version)
        self._waiting.append(request)
        self._wake.set()
        try:
            await request.done.wait()
        finally:
            request.cancelled = not request.done.is_set()
        if request.error is not None:
            raise SamplerError(f"the student's engine failed: {request.error}") from request.error
        return Sampled(request.ids, request.logprobs, request.stopped, request.version)

    async def sleep(self) -> None:
        """Free the keys and values. Raises `SamplerError` while requests are running."""
        if any(not request.cancelled for request in (*self._running, *self._waiting)):
            raise SamplerError("the sampler cannot sleep or change weights while requests are running")
        while self._running or self._waiting:  # cancelled: the driver drops them at its next look
            await anyio.sleep(0.001)
        self._stepper.forget()

    async def update_weights(self, source: WeightSource, version: int) -> None:
        """Those of `source` are this model's own and changed in place: forget what was computed with the old."""
        await self.sleep()
        self._version = version

    async def _drive(self) -> None:
        while True:
            await self._wake.wait()
            self._wake = anyio.Event()
            for _ in range(3):  # let every task that starts now queue its request: one batch, one order
                await anyio.lowlevel.checkpoint()
            while self._waiting or self._running:
                # Not abandoned on cancel: it ends within a few tokens, and nothing outlives the engine.
                finished = await compute(self._advance)
                for request in finished:
                    request.done.set()
                await anyio.lowlevel.checkpoint()

    def _advance(self) -> list[_Request]:
        """Admit, decode a few tokens, and return what ended. Runs in a worker thread."""
        try:
            with torch.no_grad():
                return self._admit() or self._decode()
        except Exception as error:  # a failing engine fails its batch; the loop drops and counts them
            failed, self._running = self._running, []
            for request in failed:
                request.error = error
            self._stepper.forget()
            return failed

    def _admit(self) -> list[_Request]:
        self._drop_cancelled()
        new: list[_Request] = []
        # Pops only: the event loop appends meanwhile.
        while self._waiting and len(new) < self._stepper.room():
            request = self._waiting.popleft()
            if not request.cancelled:
                new.append(request)
        if not new:
            return []
        self._running += new
        hidden = self._stepper.prefill([request.prompt for request in new])
        self._append(new, hidden)
        return self._release_ended()

    def _decode(self) -> list[_Request]:
        for _ in range(STEPS_PER_HOP):
            if not self._running:
                return []
            hidden = self._stepper.decode([request.ids[-1] for request in self._running])
            self._append(self._running, hidden)
            if ended := self._release_ended():
                return ended
        return []

    def _append(self, requests: list[_Request], hidden: Float[Tensor, "n h"]) -> None:
        """Draw one token per request from the distribution that `hidden` predicts."""
        logits = self._lm.logits(hidden)  # [n, v]
        temperature = torch.tensor([r.params.temperature for r in requests], device=logits.device)
        uniforms = torch.stack([r.uniforms[len(r.ids)] for r in requests]).to(logits.device)
        ids, logprobs = draw(logits, temperature, uniforms)
        if not torch.isfinite(logprobs).all():
            raise SamplerError("the student's logits are not finite; its weights are broken")
        for request, token, logprob in zip(requests, ids.tolist(), logprobs.tolist(), strict=True):
            request.ids.append(token)
            request.logprobs.append(logprob)
            request.stopped = self._stops(request)

    def _stops(self, request: _Request) -> bool:
        stop = request.params.stop
        if request.ids[-1] in stop.token_ids:
            return True
        if not stop.strings:
            return False
        # A token has at least one byte: this many cover every string that could end here.
        tail = self._tokenizer.decode(request.ids[-max(len(s.encode()) for s in stop.strings) - 4 :])
        return any(string in tail for string in stop.strings)

    def _release_ended(self) -> list[_Request]:
        ended = []
        for row in reversed(range(len(self._running))):
            request = self._running[row]
            if request.stopped or len(request.ids) == request.params.max_tokens or request.cancelled:
                self._release(row)
                ended.append(request)
        return ended[::-1]

    def _release(self, row: int) -> None:
        self._stepper.release(row)
        self._running[row] = self._running[-1]
        self._running.pop()

    def _drop_cancelled(self) -> None:
        for row in reversed(range(len(self._running))):
            if self._running[row].cancelled:
                self._release(row)


def draw(
    logits: Float[Tensor, "n v"], temperature: Float[Tensor, " n"], uniforms: Float[Tensor, " n"]
) -> tuple[Tensor, Tensor]:
    """One id per row by inverse CDF, and its logprob under softmax(logits / temperature).

    A temperature of 0 takes the largest logit and gives its logprob at temperature 1.
    """
    greedy = temperature == 0
    logprobs = (logits / temperature.masked_fill(greedy, 1.0)[:, None]).log_softmax(-1)
    # why: a GPU sums in parallel, and float32 sums of a large vocabulary then go up and down: unlikely ids were drawn
    cdf = logprobs.exp().cumsum(-1, dtype=torch.float64 if logits.device.type == "cuda" else None)
    # `right=True` and a target below the total: an id of probability zero is never drawn.
    target = uniforms[:, None] * cdf[:, -1:]
    ids = torch.searchsorted(cdf, target, right=True)[:, 0].clamp(max=logits.shape[1] - 1)
    ids = torch.where(greedy, logprobs.argmax(-1), ids)
    return ids, logprobs.gather(1, ids[:, None])[:, 0]
