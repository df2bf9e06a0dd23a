"""A teacher's engine on a plain `vllm serve`, over HTTP: token ids in, logprobs of prompt tokens out.

`/v1/completions` with `prompt_logprobs=k` gives at every position the prompt's own token and the k likeliest, of the
whole distribution, and always computes them anew, whatever is in the prefix cache. They are those of the raw logits: no
request, and no option of the server, brings a temperature into them. (The server's token-in-token-out endpoint
answers the same, but only where it was started with `--enable-scale-out`.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import anyio
import anyio.to_thread
import httpx2
import numpy as np
import torch

from errors import ConfigError, TeacherError
from models.device_thread import compute
from models.server_pool import Refused, ServerPool, Unanswered
from models.teacher_view import exchanged
from models.types import Signal, SignalKind, SignalSpec, TeacherTopK, TeacherView

MINUS_INFINITY = -9999.0
"""What vLLM writes for a logprob of minus infinity, which JSON does not have."""
NO_LOGPROBS = "they are no log-probabilities. Start it with --logprobs-mode=raw_logprobs, which is the default"
MASS_TOLERANCE = 1e-3
"""A distribution's mass may exceed 1 by this, in float32 sums of what a bfloat16 model said."""


class VllmScorer:
    """`Scorer` of one model on one or several servers. Gives SAMPLED and `TeacherTopK`; raises `ConfigError`
    for a temperature other than 1."""

    def __init__(self, name: str, model: str, pool: ServerPool, *, vocab_size: int, temperature: float = 1.0) -> None:
        if temperature != 1.0:
            raise ConfigError(
                f"teacher {name} is on a plain vLLM server, whose logprobs of given tokens are at temperature 1, not "
                f"{temperature}: set temperature=1, or serve the teacher with recipes.serve_teacher"
            )
        self.name = name
        self.temperature = temperature
        self._model = model
        self._pool = pool
        self._vocab_size = vocab_size  # that its tokenizer has: a server's top k of more ends its engine

    async def score(self, views: Sequence[TeacherView], need: SignalSpec) -> list[Signal]:
        """One signal per view, in order. Raises `TeacherError`."""
        if need is not SignalKind.SAMPLED and not isinstance(need, TeacherTopK):
            raise TeacherError(f"teacher {self.name} is on a plain vLLM server, which does not give {need} signals")
        k = min(need.k, self._vocab_size) if isinstance(need, TeacherTopK) else 0
        signals: dict[int, Signal] = {}
        failures: list[TeacherError] = []

        async with self._pool.client() as client, anyio.create_task_group() as tasks:

            async def one(i: int, view: TeacherView) -> None:
                try:
                    signals[i] = await self._signal(client, view, k)
                except TeacherError as error:
                    failures.append(error)
                    tasks.cancel_scope.cancel()  # all of them fail together, see `Scorer`

            for i, view in enumerate(views):
                tasks.start_soon(one, i, view)
        if failures:
            raise failures[0]
        return [signals[i] for i in range(len(views))]

    async def _signal(self, client: httpx2.AsyncClient, view: TeacherView, k: int) -> Signal:
        if not len(view.positions):
            return _Numbers(np.zeros(0, np.float32), np.zeros((0, k), np.int64), np.zeros((0, k), np.float32)).signal(
                view.swap
            )
        ids = view.token_ids.tolist()
        body = {"model": self._model, "prompt": ids, "prompt_logprobs": k, "max_tokens": 1, "temperature": 0.0}
        try:
            answer = await self._pool.ask(client, "/v1/completions", body)
            found = await anyio.to_thread.run_sync(_read, answer, view, k)
            return await compute(found.signal, view.swap)  # torch computes on one thread only
        except (Refused, Unanswered) as error:
            raise TeacherError(f"teacher {self.name} could not score {len(ids)} tokens: {error}") from error
        except _BadAnswer as error:
            raise TeacherError(f"teacher {self.name}'s server gave no usable logprobs: {error}") from error


class _BadAnswer(Exception):
    """An answer without the numbers that were asked for."""


@dataclass(frozen=True)
class _Numbers:
    """Of every scored token."""

    own: np.ndarray  # float32 [n]
    ids: np.ndarray  # int64 [n, k]
    top: np.ndarray  # float32 [n, k]

    def signal(self, swap: tuple[int, int] | None) -> Signal:
        own = torch.from_numpy(self.own)
        if not self.ids.shape[1]:
            return Signal(own, swap=swap)
        return Signal(own, exchanged(torch.from_numpy(self.ids), swap), torch.from_numpy(self.top), swap=swap)


def _read(answer: bytes, view: TeacherView, k: int) -> _Numbers:
    """What is in a completion's JSON. Raises `_BadAnswer`."""
    try:
        rows = json.loads(answer)["choices"][0]["prompt_logprobs"]
    except (ValueError, LookupError, TypeError):
        raise _BadAnswer("the answer is not a completion with prompt_logprobs") from None
    if not isinstance(rows, list) or len(rows) != len(view.token_ids):
        found = len(rows) if isinstance(rows, list) else "no"
        raise _BadAnswer(f"logprobs of {found} positions, {len(view.token_ids)} were asked for")
    own: list[float] = []
    ids = np.zeros((len(view.positions), k), dtype=np.int64)
    top = np.zeros((len(view.positions), k), dtype=np.float32)
    for i, position in enumerate(view.positions.tolist()):
        token = int(view.token_ids[position])
        row = _finite_row(rows[position], position)
        if not math.isfinite(row.get(token, -math.inf)):
            raise _BadAnswer(f"token {token} at position {position} has no finite logprob")
        own.append(row[token])
        if k:
            ids[i], top[i] = _likeliest(row, token, k, position)
    logprobs = np.array(own, dtype=np.float32)
    if (logprobs > 1e-4).any() or (np.exp(top.astype(np.float64)).sum(1) > 1 + MASS_TOLERANCE).any():
        raise _BadAnswer(NO_LOGPROBS)
    return _Numbers(logprobs, ids, top)


def _finite_row(row: Any, position: int) -> dict[int, float]:
    """Logprobs by id, minus infinity where vLLM says so. Raises `_BadAnswer`."""
    if not isinstance(row, Mapping):
        raise _BadAnswer(f"position {position} has no logprobs")
    try:
        found = {int(token): float(entry["logprob"]) for token, entry in row.items()}
    except (ValueError, TypeError, LookupError):
        raise _BadAnswer(f"a logprob at position {position} is missing") from None
    if not all(0 <= token < 1 << 31 for token in found):
        raise _BadAnswer(f"position {position} has a logprob of what is no id")
    if any(math.isnan(value) or value == math.inf for value in found.values()):
        raise _BadAnswer(f"a logprob at position {position} is not a number")
    return {token: -math.inf if value <= MINUS_INFINITY else value for token, value in found.items()}


def _likeliest(row: Mapping[int, float], token: int, k: int, position: int) -> tuple[list[int], list[float]]:
    """The k likeliest: the prompt's own token comes in addition where it is not one of them."""
    others = {other: value for other, value in row.items() if len(row) == k or other != token}
    if len(others) != k:
        raise _BadAnswer(f"{len(row)} logprobs at position {position}, {k} were asked for")
    ordered = sorted(others.items(), key=lambda item: -item[1])
    return [other for other, _ in ordered], [value for _, value in ordered]
