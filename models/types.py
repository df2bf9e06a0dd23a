"""The seams between the loop and the engines: `Sampler`, `Scorer`, and the signal they carry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from envs.types import Sampled, SamplingParams


class SignalKind(StrEnum):
    """What an objective needs of a teacher at every sampled token."""

    NONE = "none"  # no teacher at all
    SAMPLED = "sampled"  # the log-probability of the sampled token
    FULL = "full"  # the whole distribution, as final hidden states plus the teacher's head


@dataclass(frozen=True)
class TeacherTopK:
    """Need of the teacher's `k` likeliest tokens at every sampled token, and of the sampled token's logprob.

    A vocabulary of fewer than `k` tokens is taken whole. `renormalised`: only their ratios are used, so that several
    teachers are blended as distributions over their top k."""

    k: int
    renormalised: bool = False

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"top_k={self.k}: expected 1 or more")


SignalSpec = SignalKind | TeacherTopK
"""What an objective needs of a teacher: kinds that need no number, or the top k."""


@dataclass(frozen=True)
class Spans:
    """Which span of text each scored token belongs to, where student and teacher have other tokenizers."""

    teacher: np.ndarray  # int64 [m], of the view's positions
    student: np.ndarray  # int64 [n], of its student_positions; -1: in none, nobody scores it
    count: int


@dataclass(frozen=True)
class TeacherView:
    """What a teacher reads for one episode.

    `positions[j]` is the teacher position whose token answers the student's `student_positions[j]`;
    both list every sampled token of the episode, in order. With `spans` they are not matched one by one: `positions`
    lists the teacher's tokens that are scored, and both sides say to which span each belongs. `swap` is the pair of
    ids that trade places between the two formats (the end-of-turn tokens), None where the formats agree.
    """

    token_ids: np.ndarray  # int64 [T_teacher]
    positions: np.ndarray  # int64 [n]
    student_positions: np.ndarray  # int64 [n]
    swap: tuple[int, int] | None = None
    spans: Spans | None = None
    row_id: str = ""  # of the episode

    def __post_init__(self) -> None:
        if self.spans is not None:
            lengths = len(self.spans.teacher), len(self.spans.student)
            if lengths != (len(self.positions), len(self.student_positions)):
                raise ValueError(f"spans of {lengths} tokens for {len(self.positions)}, {len(self.student_positions)}")
        elif len(self.positions) != len(self.student_positions):
            raise ValueError(f"{len(self.positions)} teacher positions, {len(self.student_positions)} of the student")
        if len(self.positions) and not 0 < self.positions.min() <= self.positions.max() < len(self.token_ids):
            raise ValueError("a scored token needs one before it that predicts it: positions outside 1 … T-1")


class Head(Protocol):
    """A language-model head: final hidden states to logits, already divided by the temperature."""

    def __call__(self, hidden: Float[Tensor, "n h"]) -> Float[Tensor, "n v"]: ...


@dataclass(frozen=True)
class Opinion:
    """What one teacher of a blend said, as far as metrics tell it."""

    logprobs: Float[Tensor, " n"]  # of the sampled tokens
    topk_mass: Float[Tensor, " n"] | None = None  # of its own top k


@dataclass(frozen=True)
class Signal:
    """A teacher's answer for one episode, aligned with the view's `student_positions` (length n).

    Kind SAMPLED has `logprobs`, kind FULL has `hidden` and `head`, a top-k signal has `logprobs`, `topk_ids`
    and `topk_logprobs`: ids as the student uses them, logprobs of the teacher's whole distribution. With `spans`
    (of a teacher with another tokenizer) `logprobs` has one value per span.
    """

    logprobs: Float[Tensor, " n"] | None = None  # of the sampled tokens, float32 on the CPU
    topk_ids: Int[Tensor, "n k"] | None = None  # int64 on the CPU, likeliest first, no id twice in a row
    topk_logprobs: Float[Tensor, "n k"] | None = None  # float32 on the CPU; -inf: no token, whatever its id
    hidden: Float[Tensor, "n h"] | None = None  # the teacher's final hidden states
    head: Head | None = None
    swap: tuple[int, int] | None = None  # columns of the head to exchange, see `TeacherView.swap`
    opinions: Mapping[str, Opinion] = field(default_factory=dict)  # of a blend's teachers, by name, where known
    spans: Int[Tensor, " n"] | None = None  # of each sampled token, see `Spans.student`

    def __post_init__(self) -> None:
        if (self.logprobs is None) == (self.hidden is None) or (self.hidden is None) != (self.head is None):
            raise ValueError("a signal has either logprobs, or hidden states with their head")
        values = self.logprobs if self.logprobs is not None else self.hidden
        if values is None or not torch.isfinite(values).all():
            raise ValueError("a teacher's value is missing or not finite")
        self._check_topk()

    def of_spans(self, spans: Spans) -> Signal:
        """From a logprob for every scored token of the teacher's to one for every span."""
        if self.logprobs is None or len(self.logprobs) != len(spans.teacher):
            raise ValueError(f"spans need a logprob for each of the teacher's {len(spans.teacher)} tokens")
        sums = torch.zeros(spans.count, dtype=torch.float64)
        sums.index_add_(0, torch.from_numpy(spans.teacher), self.logprobs.double())
        return Signal(logprobs=sums.float(), spans=torch.from_numpy(spans.student))

    def _check_topk(self) -> None:
        ids, logprobs = self.topk_ids, self.topk_logprobs
        if ids is None and logprobs is None:
            return
        if ids is None or logprobs is None or self.logprobs is None:
            raise ValueError("a top-k signal has ids, their logprobs, and the sampled tokens' logprobs")
        if ids.ndim != 2 or ids.shape != logprobs.shape or len(ids) != len(self.logprobs):
            raise ValueError(f"top-k ids {tuple(ids.shape)}, logprobs {tuple(logprobs.shape)}: unlike each other")
        if torch.isnan(logprobs).any() or (logprobs > 1e-4).any():
            raise ValueError("a teacher's top-k logprob is missing or above 0")


class WeightSource(Protocol):
    """A learner's weights as they are now, for engines that keep a copy. Its methods compute: call them on the
    device thread."""

    @property
    def has_adapter(self) -> bool: ...  # only a LoRA adapter is trained

    def save(self, folder: Path) -> None:
        """Write the whole model as `from_pretrained` loads it, an adapter merged in, without a tokenizer."""
        ...

    def save_base(self, folder: Path) -> None:
        """The same without the adapter."""
        ...

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter alone, in PEFT's format."""
        ...

    def tensors(self) -> Mapping[str, Tensor]:
        """What `save` writes, where the model is: the same names, types and values."""
        ...

    def logprobs(self, token_ids: Sequence[int], temperature: float) -> list[float]:
        """Of every token but the first, each given those before it."""
        ...


class Sampler(Protocol):
    """The student's engine: token ids in, sampled ids and their logprobs out.

    Used as an async context manager. Concurrent `sample` calls are batched. Cancelling a call frees
    its work. Raises `SamplerError` when the engine fails.
    """

    async def __aenter__(self) -> Sampler: ...

    async def __aexit__(self, *exc: object) -> None: ...

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams) -> Sampled: ...

    async def sleep(self) -> None:
        """Free what only sampling needs, while something else has the device. The next call wakes it."""
        ...

    async def update_weights(self, source: WeightSource, version: int) -> None:
        """From here on, sample from the weights of `source`. What is sampled later carries `version`.

        Requests in flight are not lost; an engine that cannot pause them refuses. Raises `ProtegeError` if the
        weights did not arrive: it never goes on with the old ones."""
        ...


class Scorer(Protocol):
    """A teacher's engine: reads views, returns one signal per view, in order.

    Raises `TeacherError` when it cannot score; never returns a made-up number.
    """

    name: str
    temperature: float

    async def score(self, views: Sequence[TeacherView], need: SignalSpec) -> list[Signal]: ...
