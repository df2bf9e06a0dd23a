"""The models of a service: known by their files from the start, loaded when somebody first needs them."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from errors import ModelError, ProtegeError, TeacherError
from models.causal_lm import CausalLM
from models.device_thread import compute
from models.heads import LinearHead, raw, take_head
from models.teacher_service.messages import ModelInfo, RequestFields
from models.teacher_service.wire import Refused
from models.transformers_scorer import TransformersScorer
from models.types import Signal, TeacherView

logger = logging.getLogger(__name__)
RETRY_S = 60.0
_STRIDE, _SAMPLE = 1 << 18, 1 << 10  # elements: of each 262,144 of a weight, 1,024 are hashed


class Loaded:
    """A model in memory. All of it but `score` computes on the caller's thread, which must be the device's."""

    def __init__(self, lm: CausalLM, *, token_budget: int) -> None:
        self.lm = lm
        self._token_budget = token_budget
        self.digest = _digest(lm)

    @cached_property
    def head(self) -> tuple[LinearHead, str]:
        """The head, and its digest. Raises `ModelError` where it cannot be sent."""
        head = take_head(self.lm)
        return head, head.digest()

    async def score(self, views: Sequence[TeacherView], fields: RequestFields) -> list[dict[str, np.ndarray]]:
        """Of each view, the arrays of its answer. Raises `TeacherError`."""
        scorer = TransformersScorer(
            fields.model, self.lm, temperature=fields.temperature, token_budget=self._token_budget
        )
        signals = await scorer.score(views, fields.spec)
        # here, and not where the answer is put together: torch computes on one thread only
        return await compute(lambda: [_arrays(signal, fields) for signal in signals])


def _arrays(signal: Signal, fields: RequestFields) -> dict[str, np.ndarray]:
    if signal.hidden is not None and fields.hidden_dtype is not None:
        return {"hidden": raw(signal.hidden.to(getattr(torch, fields.hidden_dtype)))}
    if signal.logprobs is None:
        raise TeacherError(f"the scorer left out what need={fields.need} is for")
    if signal.topk_ids is None or signal.topk_logprobs is None:
        return {"logprobs": raw(signal.logprobs)}
    ids = signal.topk_ids.int()
    return {"logprobs": raw(signal.logprobs), "topk_ids": raw(ids), "topk_logprobs": raw(signal.topk_logprobs)}


class Checkpoint:
    """One set of weights, whatever names it is served under. `load` is called on the device thread."""

    def __init__(self, load: Callable[[], CausalLM], *, token_budget: int) -> None:
        self._load = load
        self._token_budget = token_budget
        self._loaded: Loaded | None = None
        self._failure = ""  # of the last attempt to load, the kind of error
        self._failed_at = -math.inf

    @property
    def in_memory(self) -> bool:
        return self._loaded is not None

    async def loaded(self, name: str) -> Loaded:
        """Raises `Refused`: what a loader says names files of this machine, so it goes to the log alone.

        What failed is not tried again for `RETRY_S`: each attempt may take minutes, and all others wait for it."""
        if self._loaded is None and not self._failed_lately:
            await compute(self._load_once, name)
        if self._loaded is None:
            raise Refused(
                500,
                f"model {name} could not be loaded ({self._failure}); the service's log says why. It is tried again "
                f"for requests that come {RETRY_S:g} s later, or after a restart",
            )
        return self._loaded

    @property
    def _failed_lately(self) -> bool:
        return time.monotonic() < self._failed_at + RETRY_S

    def _load_once(self, name: str) -> None:
        if self._loaded is not None or self._failed_lately:  # callers that waited together
            return
        try:
            self._loaded = Loaded(self._load(), token_budget=self._token_budget)
        except Exception as error:  # transformers raises all kinds; only its name is kept: it holds what was loaded
            unexpected = not isinstance(error, ProtegeError)
            logger.error("model %s could not be loaded: %s", name, error, exc_info=unexpected)
            self._failure, self._failed_at = type(error).__name__, time.monotonic()


@dataclass(frozen=True)
class ServedModel:
    """A name, what is said of it, and its weights."""

    info: ModelInfo
    checkpoint: Checkpoint


async def head_of(model: ServedModel) -> tuple[LinearHead, str]:
    """The model's head and its digest. Raises `Refused`."""
    loaded = await model.checkpoint.loaded(model.info.name)
    try:
        return await compute(lambda: loaded.head)
    except ModelError as error:
        raise Refused(422, f"model {model.info.name} cannot give whole distributions: {error}") from error


def _digest(lm: CausalLM) -> str:
    """Of samples of every weight: enough to tell two checkpoints apart, and the same after a restart."""
    digest = hashlib.sha256()
    for name, weight in sorted(lm.model.named_parameters()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        flat = weight.detach().reshape(-1)
        samples = [flat[start : start + _SAMPLE] for start in range(0, len(flat), _STRIDE)]
        digest.update(np.ascontiguousarray(raw(torch.cat(samples))).data)
    return digest.hexdigest()
