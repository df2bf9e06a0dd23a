"""The losses of docs/formulas.md written out in probability space, one obvious line at a time.

Slow, float64, and blind to the implementation: probabilities instead of logsumexp, double loops instead of
recurrences, plain autograd. Whatever a formula detaches is computed from `frozen`, so that finite differences in
`logits` see it as the constant it is.
"""

from __future__ import annotations

import torch
from torch import Tensor


def probabilities(logits: Tensor) -> Tensor:
    weights = torch.exp(logits.double())
    return weights / weights.sum(-1, keepdim=True)


def of_ids(rows: Tensor, ids: Tensor) -> Tensor:
    return torch.stack([rows[i, int(token)] for i, token in enumerate(ids)])


def bounded(values: Tensor, low: float, high: float) -> Tensor:
    """min(max(x, low), high); no gradient outside."""
    limit = torch.ones_like(values)
    return torch.where(values < low, low * limit, torch.where(values > high, high * limit, values))


def advantage_to_go(values: list[float], lengths: list[int], discount: float) -> list[float]:
    """Discounted future sums by a double loop over every pair of tokens of one episode."""
    out, start = [], 0
    for length in lengths:
        for i in range(start, start + length):
            out.append(sum(discount ** (j - i) * values[j] for j in range(i, start + length)))
        start += length
    return out


def reverse_kl(
    logits: Tensor,
    ids: Tensor,
    sampler_logprobs: Tensor,
    teacher_logprobs: Tensor,
    lengths: list[int],
    *,
    frozen: Tensor | None = None,
    variant: str = "importance_sampling",
    coef: float = 1.0,
    discount: float = 0.0,
    is_cap: float = 5.0,
    low: float = 0.8,
    high: float = 1.2,
    advantage_clip: float = float("inf"),
    signal_policy: str = "current",
) -> Tensor:
    live = of_ids(probabilities(logits), ids)
    fixed = of_ids(probabilities(logits if frozen is None else frozen), ids).detach()
    sampler = torch.exp(sampler_logprobs.double())
    policy = fixed if signal_policy == "current" else sampler
    gains = coef * torch.log(torch.exp(teacher_logprobs.double()) / policy)
    gains = bounded(gains, -advantage_clip, advantage_clip)
    advantage = torch.tensor(advantage_to_go(gains.tolist(), lengths, discount), dtype=torch.float64)
    ratio = live / sampler
    if variant == "cispo":
        weight = bounded(fixed / sampler, low, high)
        return -weight * advantage * torch.log(live)
    ratio = bounded(ratio, 0.0, is_cap)
    if variant == "importance_sampling":
        return -ratio * advantage
    within = bounded(ratio, low, high)
    return torch.maximum(-ratio * advantage, -within * advantage)


def jsd(logits: Tensor, teacher_logits: Tensor, beta: float) -> Tensor:
    shared = min(logits.shape[1], teacher_logits.shape[1])
    s, t = probabilities(logits[:, :shared]), probabilities(teacher_logits[:, :shared])
    return between(s, t, beta)


def between(s: Tensor, t: Tensor, beta: float) -> Tensor:
    """JSD_beta of rows of probabilities."""
    if beta in (0, 1):
        from_, to = (t, s) if beta == 0 else (s, t)
        return (from_ * torch.log(from_ / to)).sum(-1)
    m = (1 - beta) * s + beta * t
    return beta * (t * torch.log(t / m)).sum(-1) + (1 - beta) * (s * torch.log(s / m)).sum(-1)


def likeliest(logits: Tensor, k: int) -> list[list[int]]:
    """Per row, the ids of the k largest, by sorting."""
    return [sorted(range(len(row)), key=lambda i, row=row: -row[i])[:k] for row in logits.tolist()]


def jsd_on(logits: Tensor, teacher_logits: Tensor, supports: list[list[int]], beta: float, tail: str) -> Tensor:
    """Over each row's own ids, with one more outcome for the rest or renormalised; 0 for a row without ids."""
    s, t = probabilities(logits), probabilities(teacher_logits)
    out = []
    for i, ids in enumerate(supports):
        mine, theirs = s[i][ids], t[i][ids]
        if tail == "bucket":
            mine, theirs = (torch.cat([p, 1 - p.sum(-1, keepdim=True)]) for p in (mine, theirs))
        else:
            mine, theirs = mine / mine.sum(), theirs / theirs.sum()
        out.append(between(mine, theirs, beta) if ids else 0 * s[i].sum())
    return torch.stack(out)


def topk_forward_kl(logits: Tensor, teacher_logits: Tensor, supports: list[list[int]]) -> Tensor:
    s, t = probabilities(logits), probabilities(teacher_logits)
    out = []
    for i, ids in enumerate(supports):
        w = t[i][ids] / t[i][ids].sum() if ids else t[i][ids]
        out.append(0 * s[i].sum() - (w * torch.log(s[i][ids])).sum())
    return torch.stack(out)


def cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    return -torch.log(of_ids(probabilities(logits), ids))


def finite_differences(function, at: Tensor, step: float = 1e-6) -> Tensor:
    """Central differences of a scalar function, one entry at a time."""
    out = torch.zeros_like(at)
    for index in range(at.numel()):
        values = []
        for sign in (1, -1):
            moved = at.clone()
            moved.view(-1)[index] += sign * step
            values.append(float(function(moved)))
        out.view(-1)[index] = (values[0] - values[1]) / (2 * step)
    return out
