"""From episodes with signals to packs of at most so many tokens: no padding, no shared attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from envs.types import Episode
from models.types import Signal


@dataclass(frozen=True)
class TrainingItem:
    """One episode, and what its teacher said of it (None for objectives without a teacher)."""

    episode: Episode
    signal: Signal | None


@dataclass(frozen=True)
class PackedBatch:
    """Whole sequences of one forward pass, and the streams at their trained positions.

    With T tokens and n trained ones: `rows[j]` is the position whose hidden state predicts trained token j.
    """

    sequences: list[Int[Tensor, " length"]]
    rows: Int[Tensor, " n"]
    ids: Int[Tensor, " n"]
    sampler_logprobs: Float[Tensor, " n"]
    weights: Float[Tensor, " n"]  # of each token's loss, see `token_weights`
    counts: tuple[int, ...]  # trained tokens per episode
    items: tuple[TrainingItem, ...]


def token_weights(items: Sequence[TrainingItem], reduction: str, factors: Sequence[float] | None = None) -> list[float]:
    """Per episode, the weight of each of its trained tokens, times the episode's factor. Taken over the whole optimizer
    step, so that splitting it into packs, micro-batches or ranks changes no gradient."""
    counts = [item.episode.num_sampled for item in items]
    if reduction == "token_mean":
        weights = [1 / sum(counts)] * len(items)
    elif reduction == "sequence_mean":
        weights = [1 / (len(items) * count) for count in counts]
    elif reduction == "token_sum":
        weights = [1.0] * len(items)
    else:
        raise ValueError(f"reduction={reduction}: expected token_mean, token_sum or sequence_mean")
    return weights if factors is None else [w * factor for w, factor in zip(weights, factors, strict=True)]


def pack(items: Sequence[TrainingItem], weights: Sequence[float], token_budget: int) -> list[PackedBatch]:
    """First-fit decreasing into packs of `token_budget` tokens; an episode above it gets a pack of its own."""
    order = sorted(range(len(items)), key=lambda i: (-len(items[i].episode), i))
    bins: list[list[int]] = []
    room: list[int] = []
    for i in order:
        size = len(items[i].episode)
        fit = next((b for b, left in enumerate(room) if left >= size), None)
        if fit is None:
            bins.append([i])
            room.append(token_budget - size)
        else:
            bins[fit].append(i)
            room[fit] -= size
    return [_packed([items[i] for i in b], [weights[i] for i in b]) for b in bins]


def _packed(items: list[TrainingItem], weights: list[float]) -> PackedBatch:
    rows, ids, logprobs, token_weight, offset = [], [], [], [], 0
    for item, weight in zip(items, weights, strict=True):
        episode = item.episode
        positions = np.flatnonzero(episode.sampled)
        rows.append(positions - 1 + offset)  # logits at i predict token i + 1
        ids.append(episode.token_ids[positions])
        logprobs.append(episode.sampler_logprobs[positions])
        token_weight.append(np.full(len(positions), weight, dtype=np.float32))
        offset += len(episode)
    return PackedBatch(
        sequences=[torch.from_numpy(item.episode.token_ids).long() for item in items],
        rows=torch.from_numpy(np.concatenate(rows)),
        ids=torch.from_numpy(np.concatenate(ids)).long(),
        sampler_logprobs=torch.from_numpy(np.concatenate(logprobs)),
        weights=torch.from_numpy(np.concatenate(token_weight)),
        counts=tuple(item.episode.num_sampled for item in items),
        items=tuple(items),
    )
