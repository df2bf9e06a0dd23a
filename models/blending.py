"""Several teachers as one: the mixture of their distributions, position by position. Formulas: `docs/formulas.md`.

Teachers read in formats of their own, but a signal is about the student's positions, in the student's ids: it is
signals that are blended.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from models.types import Head, Opinion, Signal, SignalKind, SignalSpec, TeacherTopK


def blended(signals: Mapping[str, Signal], weights: Sequence[float], need: SignalSpec) -> Signal:
    """What a mixture of these teachers says of one episode. `weights` are above 0, sum to 1, and stand in the order
    of `signals`."""
    parts = list(signals.values())
    if need is SignalKind.FULL:
        return _mixed_states(parts, weights)
    logprobs = _mixed([_known(signal.logprobs) for signal in parts], weights)
    if not isinstance(need, TeacherTopK):
        return Signal(logprobs=logprobs, opinions={name: Opinion(_known(s.logprobs)) for name, s in signals.items()})
    ids, topk_logprobs = _mixed_topk(parts, weights, need)
    opinions = {
        name: Opinion(_known(s.logprobs), topk_mass=_known(s.topk_logprobs).exp().sum(-1))
        for name, s in signals.items()
    }
    return Signal(logprobs=logprobs, topk_ids=ids, topk_logprobs=topk_logprobs, opinions=opinions)


def _known(values: Tensor | None) -> Tensor:
    if values is None:
        raise ValueError("a teacher of a blend gave less than the others")
    return values


def _mixed(logprobs: Sequence[Float[Tensor, " n"]], weights: Sequence[float]) -> Float[Tensor, " n"]:
    """log of the weighted sum of probabilities."""
    shifted = [x.double() + math.log(weight) for x, weight in zip(logprobs, weights, strict=True)]
    return torch.stack(shifted).logsumexp(0).to(logprobs[0].dtype)


def _mixed_topk(
    signals: Sequence[Signal], weights: Sequence[float], need: TeacherTopK
) -> tuple[Tensor, Float[Tensor, "n k"]]:
    """The `need.k` likeliest ids of the union, and their logprobs. Outside of its top k a teacher counts as 0."""
    tops = [(_known(s.topk_ids), _known(s.topk_logprobs).double().exp()) for s in signals]  # [n, k] each
    masses = [mass.sum(-1, keepdim=True) for _, mass in tops]  # [n, 1] each
    # Each teacher's top k as a distribution of its own; the common factor puts back what they hold on average.
    whole = sum(weight * mass for weight, mass in zip(weights, masses, strict=True))
    shares = [
        weight * (mass / total.clamp(min=1e-300) * whole if need.renormalised else mass)
        for weight, (_, mass), total in zip(weights, tops, masses, strict=True)
    ]
    ids, order = torch.sort(torch.cat([ids for ids, _ in tops], -1), stable=True, dim=-1)  # [n, m]
    share = torch.cat(shares, -1).gather(-1, order)
    new = torch.ones_like(ids, dtype=torch.bool)
    new[:, 1:] = ids[:, 1:] != ids[:, :-1]
    slot = new.cumsum(-1) - 1  # equal ids share a place
    share = torch.zeros_like(share).scatter_add_(-1, slot, share)
    ids = torch.zeros_like(ids).scatter_(-1, slot, ids)
    share, order = torch.sort(share, stable=True, dim=-1, descending=True)
    k = min(need.k, ids.shape[-1])
    logprobs = share[:, :k].log().clamp(max=0.0)  # why: a sum of probabilities may round to above 1
    return ids.gather(-1, order)[:, :k], logprobs.float()


# --- whole distributions


@dataclass(frozen=True)
class MixedHead:
    """Log-probabilities of a mixture, of the teachers' hidden states side by side."""

    heads: tuple[Head, ...]
    sizes: tuple[int, ...]  # of their states
    swaps: tuple[tuple[int, int] | None, ...]
    weights: tuple[float, ...]

    def __call__(self, hidden: Float[Tensor, "n h"]) -> Float[Tensor, "n v"]:
        mixed: Tensor | None = None
        for head, states, swap, weight in zip(
            self.heads, hidden.split(self.sizes, -1), self.swaps, self.weights, strict=True
        ):
            logprobs = exchanged_columns(head(states), swap).log_softmax(-1).add_(math.log(weight))  # [n, v]
            mixed = logprobs if mixed is None else _logaddexp(mixed, logprobs)
        assert mixed is not None
        return mixed


def _logaddexp(a: Float[Tensor, "n v"], b: Float[Tensor, "n w"]) -> Float[Tensor, "n x"]:
    """Of padded embeddings too: where only one has a column, the other has no mass there."""
    wide = max(a.shape[-1], b.shape[-1])
    return torch.logaddexp(*(F.pad(x, (0, wide - x.shape[-1]), value=-math.inf) for x in (a, b)))


def _mixed_states(signals: Sequence[Signal], weights: Sequence[float]) -> Signal:
    states = [_known(signal.hidden) for signal in signals]
    heads = [signal.head for signal in signals]
    assert None not in heads  # a signal with states has a head
    return Signal(
        hidden=torch.cat(states, -1),
        head=MixedHead(
            heads=tuple(heads),  # type: ignore[arg-type]
            sizes=tuple(x.shape[-1] for x in states),
            swaps=tuple(signal.swap for signal in signals),
            weights=tuple(weights),
        ),
    )


def exchanged_columns(logits: Float[Tensor, "n v"], swap: tuple[int, int] | None) -> Float[Tensor, "n v"]:
    """The teacher's columns as the student's: those of the two end-of-turn tokens trade places."""
    if swap is None:
        return logits
    logits = logits.clone()
    logits[:, list(swap)] = logits[:, list(swap[::-1])]
    return logits
