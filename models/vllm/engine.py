"""One vLLM engine, wherever it runs: what it is asked, what it answers, and how it fails."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from envs.types import LOGPROB_ROUNDING, SamplingParams
from errors import SamplerError
from models.types import WeightSource

NO_LOGPROB = -9999.0  # what vLLM's servers send for a logprob that is missing, infinite or NaN


class Transient(Exception):
    """The request returned nothing and may be asked again, here or elsewhere."""


class Unreachable(Transient):
    """The engine is dead, gone or frozen."""


class Outdated(Unreachable):
    """The engine runs, but not on the weights of this run: it was started again, or another run has changed them."""


@dataclass(frozen=True)
class Answer:
    """One sampled turn, and the labels of the engine's own weights that drew it, from its first token on."""

    token_ids: list[int]
    logprobs: list[float]
    stopped: bool
    labels: tuple[str, ...]  # under an adapter, of the weights that it was put on


class Engine(Protocol):
    """One engine. Weights have a label, which `generate` returns: it tells an engine that has missed an update."""

    name: str  # in messages

    @property
    def takes_adapters(self) -> bool: ...  # LoRA is hot-loaded; else merged weights are reloaded

    @property
    def takes_tensors(self) -> bool: ...  # weights go from memory to memory; else a folder is read

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    @property
    def started(self) -> bool: ...  # it has a model, whatever its weights

    async def start(self, model: Path, label: str) -> None:
        """Load the model in a folder: weights with this label."""
        ...

    async def generate(self, prompt_ids: Sequence[int], params: SamplingParams, adapter: str | None) -> Answer:
        """Raises `Transient`, or `SamplerError` for what another try would not change. Cancelling it aborts it."""
        ...

    async def check_alive(self) -> None:
        """Raises `Unreachable`."""
        ...

    async def label(self) -> str: ...

    async def reload(self, folder: Path, label: str) -> None:
        """Requests in flight are paused, and go on with the weights of `folder` from where they are."""
        ...

    async def transfer(self, source: WeightSource, label: str) -> None:
        """The same as `reload`, with the weights of `source`. For engines that take tensors."""
        ...

    async def load_adapter(self, folder: Path, name: str) -> None: ...

    async def drop_adapter(self, name: str) -> None: ...

    async def has_adapter(self, name: str) -> bool: ...

    async def sleep(self) -> None: ...

    async def wake(self) -> None: ...


def sampling_params(params: SamplingParams) -> dict[str, Any]:
    """vLLM's names. Everything that a model's `generation_config` could set is set: nothing applies in silence."""
    return {
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "seed": params.seed,
        "stop_token_ids": sorted(params.stop.token_ids),
        "stop": list(params.stop.strings),
        "ignore_eos": True,  # the env's stop ids are all that stop a turn
        "logprobs": 0,  # of the sampled token alone
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "min_tokens": 0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "detokenize": bool(params.stop.strings),  # text is needed to find a stop string in it, and for nothing else
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
    }


def read_answer(name: str, body: Mapping[str, Any], vocab_size: int | None = None) -> Answer:
    """An answer of the token-in-token-out endpoint. Raises `SamplerError` for one that lacks anything."""
    try:
        (choice,) = body["choices"]
        ids, reason = [int(token) for token in choice["token_ids"]], choice["finish_reason"]
        content = choice["logprobs"]["content"]
        logprobs = [float(entry["logprob"]) for entry in content]
        matching = [entry["token_id"] for entry in content] == ids
        labels = tuple(str(span["version"]) for span in choice["weight_versions"])
    except (KeyError, TypeError, ValueError) as error:
        raise SamplerError(f"{name} sent a malformed answer ({type(error).__name__}: {error})") from error
    if not matching:
        raise SamplerError(f"{name} sent logprobs of other tokens than it sampled")
    return checked_answer(name, ids, logprobs, reason, labels)


def checked_answer(
    name: str, ids: list[int], logprobs: list[float], reason: str | None, labels: tuple[str, ...]
) -> Answer:
    """Raises `SamplerError` for an answer that cannot be trained on, `Transient` for one that was broken off."""
    if reason not in ("stop", "length"):
        raise Transient(f"{name} broke a request off ({reason})")
    if not ids or len(ids) != len(logprobs):
        raise SamplerError(f"{name} sampled {len(ids)} tokens and gave {len(logprobs)} logprobs")
    if not labels:
        raise SamplerError(f"{name} does not say which weights sampled")
    if bad := [p for p in logprobs if not math.isfinite(p) or p <= NO_LOGPROB or p > LOGPROB_ROUNDING]:
        raise SamplerError(f"{name} gave no usable logprob for {len(bad)} of {len(ids)} sampled tokens, e.g. {bad[0]}")
    return Answer(ids, logprobs, reason == "stop", labels)
