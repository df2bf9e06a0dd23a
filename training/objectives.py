"""What a student is trained to do: pure losses over tensors, one class per objective. The losses over whole
distributions are in `distribution_losses.py`.

Formulas, signs and reductions: `docs/formulas.md`. Logits come in already divided by the common
temperature; every tensor is aligned over n trained tokens. A loss is per token: the learner weighs it,
so no objective knows about batches, packing or ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from errors import ConfigError
from models.types import SignalKind, SignalSpec


@dataclass(frozen=True)
class TokenBatch:
    """Streams over n trained tokens. Of the teacher's there are those that the objective's `need` asks for."""

    ids: Int[Tensor, " n"]
    sampler_logprobs: Float[Tensor, " n"]
    teacher_logprobs: Float[Tensor, " n"] | None = None
    teacher_logits: Float[Tensor, "n v"] | None = None
    topk_ids: Int[Tensor, "n k"] | None = None  # ids that the student has
    topk_logprobs: Float[Tensor, "n k"] | None = None  # of the teacher; -inf: no token there
    temperature: float = 1.0  # that all logits and logprobs are at
    advantages: Float[Tensor, " n"] | None = None  # given by `Objective.advantages`, if it looks ahead, or for spans
    spans: Int[Tensor, " n"] | None = None  # tokens that the teacher scored as one have one number; -1: not scored


@dataclass(frozen=True)
class LossOutput:
    loss: Float[Tensor, " n"]
    metrics: dict[str, Float[Tensor, " n"]]  # detached, per token; the learner takes sum/sum means


@dataclass(frozen=True)
class Advantages:
    values: Float[Tensor, " n"]
    metrics: dict[str, Float[Tensor, " n"]]  # per token, beside those of the loss


class Objective(Protocol):
    @property
    def need(self) -> SignalSpec: ...

    @property
    def looks_ahead(self) -> bool:
        """True: `advantages` needs the whole episode's logprobs before any loss. With spans it is asked anyway."""
        ...

    def loss(self, logits: Float[Tensor, "n v"], batch: TokenBatch) -> LossOutput: ...

    def advantages(self, logprobs: Float[Tensor, " n"], batch: TokenBatch, lengths: Sequence[int]) -> Advantages: ...


class _ChosenLogprobs(torch.autograd.Function):
    """log softmax(logits)[ids] whose backward makes one `[n, v]` tensor instead of three."""

    @staticmethod
    def forward(ctx, logits: Tensor, ids: Tensor) -> Tensor:
        lse = logits.logsumexp(-1, keepdim=True)
        ctx.save_for_backward(logits, ids, lse)
        return logits.gather(1, ids) - lse

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        logits, ids, lse = ctx.saved_tensors
        out = (logits - lse).exp_().mul_(-grad.sum(-1, keepdim=True))
        out.scatter_add_(1, ids, grad)
        return out, None


def chosen_logprobs(logits: Float[Tensor, "n v"], ids: Int[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    """Log-probabilities of several `ids` a row under softmax(logits)."""
    return _ChosenLogprobs.apply(logits, ids)  # type: ignore[return-value]


def token_logprobs(logits: Float[Tensor, "n v"], ids: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Log-probability of `ids` under softmax(logits)."""
    return chosen_logprobs(logits, ids[:, None])[:, 0]


def discounted_sums(values: Float[Tensor, " n"], lengths: Sequence[int], discount: float) -> Float[Tensor, " n"]:
    """A_i = sum over later sampled tokens j of the same episode of discount**(rank j - rank i) * a_j.

    `lengths` splits the n sampled tokens by episode; tokens of the environment are not among them, so
    they take no time.
    """
    if discount == 0:
        return values
    out = values.double().cpu().clone()
    start = 0
    for length in lengths:
        piece = out[start : start + length].numpy()
        for i in range(length - 2, -1, -1):
            piece[i] += discount * piece[i + 1]
        start += length
    return out.to(values)


def span_sums(values: Float[Tensor, " n"], spans: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Each token's sum over its span; 0 for a token in none."""
    inside = spans >= 0
    place = spans.clamp(min=0)
    sums = torch.zeros_like(values).index_add_(0, place, values.masked_fill(~inside, 0.0))
    return sums[place].masked_fill(~inside, 0.0)


CLIP_DEFAULTS = {"ppo": (0.8, 1.2), "cispo": (0.0, 4.0)}


@dataclass(frozen=True)
class ReverseKL:
    """Policy gradient on the sampled reverse KL (SEMANTICS section 2, after the "on-policy distillation"
    of Thinking Machines Lab and Agarwal et al. 2023, arXiv 2306.13649).

    `k = log pi - log pi_T`, `a = -coef * k` with the live policy detached, discounted over the future,
    times the importance ratio pi / pi_sampler.
    """

    coef: float = 1.0
    discount: float = 0.0
    variant: Literal["importance_sampling", "ppo", "cispo"] = "importance_sampling"
    clip_low: float | None = None  # None: the variant's usual bounds, `CLIP_DEFAULTS`
    clip_high: float | None = None
    is_cap: float = 5.0
    advantage_clip: float | None = None
    signal_policy: Literal["current", "sampler"] = "current"
    need: SignalKind = SignalKind.SAMPLED

    def __post_init__(self) -> None:
        if self.variant not in ("importance_sampling", *CLIP_DEFAULTS):
            raise ConfigError(f"loss_fn={self.variant}: expected importance_sampling, ppo or cispo")
        if self.signal_policy not in ("current", "sampler"):
            raise ConfigError(f"signal_policy={self.signal_policy}: expected current or sampler")
        if not 0 <= self.discount <= 1:
            raise ConfigError(f"kl_discount_factor={self.discount}: expected a number from 0 to 1")
        low, high = self.clip
        if not 0 <= low <= high:
            raise ConfigError(f"clip thresholds {low}, {high}: expected 0 <= low <= high")
        if self.variant not in CLIP_DEFAULTS and (self.clip_low, self.clip_high) != (None, None):
            raise ConfigError(f"loss_fn={self.variant} does not clip: leave the clip thresholds out")
        for name, value in (("is_cap", self.is_cap), ("advantage_clip", self.advantage_clip)):
            if value is not None and not value > 0:
                raise ConfigError(f"{name}={value}: expected a positive number")

    @property
    def clip(self) -> tuple[float, float]:
        low, high = CLIP_DEFAULTS.get(self.variant, (0.0, math.inf))
        return (
            low if self.clip_low is None else self.clip_low,
            high if self.clip_high is None else self.clip_high,
        )

    @property
    def looks_ahead(self) -> bool:
        return self.discount > 0

    def advantages(self, logprobs, batch, lengths):
        own = self._token_advantages(logprobs, batch)
        metrics = self._clip_metrics(own)
        if batch.spans is None:
            return Advantages(discounted_sums(own, lengths, self.discount), metrics)
        # A span's advantage is that of each of its tokens, and stands once, at its first, for those before it.
        later = (batch.spans >= 0) & (batch.spans == batch.spans.roll(1))
        later[0] = False
        ahead = discounted_sums(own.masked_fill(later, 0.0), lengths, self.discount)
        return Advantages(ahead + own.masked_fill(~later, 0.0), metrics)

    def _token_advantages(self, logprobs: Float[Tensor, " n"], batch: TokenBatch) -> Float[Tensor, " n"]:
        assert batch.teacher_logprobs is not None
        policy = logprobs.detach() if self.signal_policy == "current" else batch.sampler_logprobs
        gap = policy - batch.teacher_logprobs
        advantages = -self.coef * (gap if batch.spans is None else span_sums(gap, batch.spans))
        if self.advantage_clip is not None:
            advantages = advantages.clamp(-self.advantage_clip, self.advantage_clip)
        return advantages

    def _clip_metrics(self, own: Float[Tensor, " n"]) -> dict[str, Float[Tensor, " n"]]:
        return {} if self.advantage_clip is None else {"advantage_clipped": (own.abs() >= self.advantage_clip).float()}

    def loss(self, logits, batch):
        assert batch.teacher_logprobs is not None
        logprobs = token_logprobs(logits, batch.ids)
        advantages, clipped = batch.advantages, {}
        if advantages is None:
            advantages = self._token_advantages(logprobs, batch)
            clipped = self._clip_metrics(advantages)
        log_ratio = logprobs - batch.sampler_logprobs
        # Truncated before the exponential: a runaway ratio must not overflow on its way to the cap.
        ratio = log_ratio.clamp(-20.0, min(20.0, math.log(self.is_cap))).exp()
        if self.variant == "importance_sampling":
            loss = -ratio * advantages
        elif self.variant == "ppo":
            loss = -torch.minimum(ratio * advantages, ratio.clamp(*self.clip) * advantages)
        else:
            weight = log_ratio.detach().clamp(-20.0, 20.0).exp().clamp(*self.clip)
            loss = -weight * advantages * logprobs
        live = logprobs.detach()
        metrics = {
            "kl": live - batch.teacher_logprobs,
            "teacher_logprob": batch.teacher_logprobs,
            **ratio_metrics(live, batch.sampler_logprobs, self.is_cap),
            **clipped,
        }
        if batch.spans is not None:
            metrics[UNSCORED] = (batch.spans < 0).to(live.dtype)
        return LossOutput(loss, metrics)


UNSCORED = "unscored"
"""A metric of episodes whose teacher scores spans, and of no others."""
RATIO_METRICS = frozenset({"ratio", "ratio_truncated", "mismatch_kl", "sampler_gap"})
"""Of these there are none for tokens whose sampler nobody knows."""


def ratio_metrics(
    logprobs: Float[Tensor, " n"], sampler_logprobs: Float[Tensor, " n"], is_cap: float
) -> dict[str, Float[Tensor, " n"]]:
    """How far the learner is from the sampler. `mismatch_kl` is Schulman's k3 estimate of KL(sampler || learner),
    `sampler_gap` the absolute difference of their logprobs."""
    log_ratio = (logprobs - sampler_logprobs).clamp(-20.0, 20.0)
    ratio = log_ratio.exp()
    return {
        "ratio": ratio,
        "ratio_truncated": (ratio > is_cap).float(),
        "mismatch_kl": ratio - 1 - log_ratio,
        "sampler_gap": (logprobs - sampler_logprobs).abs(),
    }


@dataclass(frozen=True)
class SFT:
    """Cross-entropy on the given tokens; needs no teacher."""

    need: SignalKind = field(default=SignalKind.NONE, init=False)
    looks_ahead: bool = field(default=False, init=False)

    def advantages(self, logprobs, batch, lengths):
        raise NotImplementedError("cross-entropy has no advantages")

    def loss(self, logits, batch):
        loss = -token_logprobs(logits, batch.ids)
        return LossOutput(loss, {"nll": loss.detach()})
