"""A teacher's engine on transformers, in-process: packs views to a token budget, one forward each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from errors import TeacherError
from models.causal_lm import CausalLM
from models.device_thread import compute, stop_if_cancelled
from models.teacher_view import exchanged
from models.types import Signal, SignalKind, SignalSpec, TeacherTopK, TeacherView

HEAD_ELEMENTS = 1 << 23  # logits held at a time, to a row: 32 MiB in float32


class TransformersScorer:
    """`Scorer` on a `CausalLM`, at one temperature."""

    def __init__(
        self,
        name: str,
        lm: CausalLM,
        *,
        temperature: float = 1.0,
        token_budget: int = 4096,
    ) -> None:
        self.name = name
        self.temperature = temperature
        self._lm = lm
        self._budget = token_budget

    async def score(self, views: Sequence[TeacherView], need: SignalSpec) -> list[Signal]:
        """One signal per view, in order. Raises `TeacherError`."""
        return await compute(self.score_now, views, need)

    def score_now(self, views: Sequence[TeacherView], need: SignalSpec) -> list[Signal]:
        """The same, for callers on the device's thread."""
        try:
            return self._score(views, need)
        except (RuntimeError, IndexError, ValueError) as error:
            raise TeacherError(f"teacher {self.name} could not score: {error}") from error

    def head(self, hidden: Float[Tensor, "n h"]) -> Float[Tensor, "n v"]:
        """The teacher's logits at its temperature."""
        return self._lm.logits(hidden.to(self._lm.device)) / self.temperature

    @torch.no_grad()
    def _score(self, views: Sequence[TeacherView], need: SignalSpec) -> list[Signal]:
        signals: list[Signal] = []
        longest = self._lm.context_length
        for view in views:
            if int(view.token_ids.max()) >= self._lm.vocab_size:
                raise TeacherError(f"teacher {self.name} has no token {view.token_ids.max()}, the student does")
            size = len(view.token_ids)
            if longest is not None and size > longest:  # most models would read on, and not know what
                raise TeacherError(
                    f"teacher {self.name} reads {size} tokens of an episode, and its context is {longest}"
                )
        for pack in self._packs(views):
            stop_if_cancelled()
            hidden = self._lm.hidden([torch.from_numpy(view.token_ids).long() for view in pack])  # [T, h]
            offset = 0
            for view in pack:
                # The logits at i predict token i + 1.
                rows = torch.from_numpy(view.positions - 1 + offset).to(hidden.device)
                signals.append(self._signal(hidden[rows], view, need))
                offset += len(view.token_ids)
        return signals

    def _signal(self, hidden: Float[Tensor, "n h"], view: TeacherView, need: SignalSpec) -> Signal:
        if need is SignalKind.FULL:
            return Signal(hidden=hidden.cpu(), head=self.head, swap=view.swap)  # a whole batch is too much for a GPU
        ids = torch.from_numpy(view.token_ids[view.positions]).long().to(hidden.device)
        chunk = -(-HEAD_ELEMENTS // self._lm.vocab_size)  # rounded up, as the learner's
        k = min(need.k, self._lm.vocab_size) if isinstance(need, TeacherTopK) else 0
        logprobs, topk_ids, topk_logprobs = [], [], []
        for h, x in zip(hidden.split(chunk), ids.split(chunk), strict=True):
            logits = self.head(h)  # [chunk, v]
            lse = logits.logsumexp(-1, keepdim=True)
            logprobs.append((logits.gather(1, x[:, None]) - lse)[:, 0].cpu())
            if k:
                values, indices = logits.topk(k)  # [chunk, k]
                topk_ids.append(indices.cpu())
                topk_logprobs.append((values - lse).cpu())
        if not k:
            return Signal(logprobs=torch.cat(logprobs), swap=view.swap)
        return Signal(
            logprobs=torch.cat(logprobs),
            topk_ids=exchanged(torch.cat(topk_ids), view.swap),
            topk_logprobs=torch.cat(topk_logprobs),
            swap=view.swap,
        )

    def _packs(self, views: Sequence[TeacherView]) -> Iterator[list[TeacherView]]:
        pack: list[TeacherView] = []
        tokens = 0
        for view in views:
            if pack and tokens + len(view.token_ids) > self._budget:
                yield pack
                pack, tokens = [], 0
            pack.append(view)
            tokens += len(view.token_ids)
        if pack:
            yield pack
