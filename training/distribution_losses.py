"""Losses between whole distributions, or between what they say of a few tokens: `JSD`, `TopKForwardKL`, `ClassicKD`.

There is one divergence. It is taken over the vocabulary, or over the few outcomes of a support: then rows of
some logprobs, with or without one more for the rest, are its logits. Formulas: `docs/formulas.md`.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from errors import ConfigError
from models.types import SignalKind, SignalSpec, TeacherTopK
from training.objectives import LossOutput, TokenBatch, chosen_logprobs, ratio_metrics, token_logprobs

Support = Literal["full", "teacher_topk", "student_topk", "sampled"]
Tail = Literal["bucket", "renormalise"]
NO_TOKEN = -1e4
"""Stands for the logprob of nothing: its exponential is 0 in any dtype and, unlike -inf, 0 times it is 0."""


class _Divergence(torch.autograd.Function):
    """JSD_beta of softmax(student) and softmax(teacher), with the student's gradient made in the forward pass.

    Both inputs may be logprobs, normalised or not. Its own `[n, v]` tensors are five at most; one is kept. With
    s, t, m as in the formulas, the gradient in the student's logits is s * (g - sum of s * g), where g is
    log s - log t at beta = 1, (1 - beta) * (log s - log m) below; at beta = 0 it is s - t.

    Also returns the student's entropy, and both logprobs of `ids`.
    """

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, beta: float, ids: Tensor) -> tuple[Tensor, ...]:
        log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)  # [n, v] each
        live, judged = (x.gather(1, ids[:, None])[:, 0] for x in (log_s, log_t))
        s = log_s.exp()
        entropy = -torch.linalg.vecdot(s, log_s)
        if beta == 0:
            t = log_t.exp()
            loss = torch.linalg.vecdot(t, log_t.sub_(log_s))
            gradient = s.sub_(t)
        else:
            loss = torch.zeros_like(entropy)
            if beta == 1:
                log_m = log_t
            else:
                log_m, t = log_s + math.log1p(-beta), log_t + math.log(beta)
                torch.logaddexp(log_m, t, out=log_m)
                torch.exp(log_t, out=t)
                loss = beta * torch.linalg.vecdot(t, log_t.sub_(log_m))
                del t
            weight = 1 - beta if beta < 1 else 1.0
            gap = log_s.sub_(log_m).mul_(s)
            own = gap.sum(-1)  # KL(s || m), or KL(s || t)
            loss = loss + weight * own
            gradient = gap.addcmul_(s, own[:, None], value=-1).mul_(weight)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(entropy, live, judged)
        return loss, entropy, live, judged

    @staticmethod
    def backward(ctx, grad: Tensor, *_: Tensor):  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * grad[:, None], None, None, None


def divergence(student: Float[Tensor, "n v"], teacher: Float[Tensor, "n v"], beta: float) -> Float[Tensor, " n"]:
    """JSD_beta of softmax(student) and softmax(teacher), natural logs, no temperature factor. The teacher gets no
    gradient."""
    return _Divergence.apply(student, teacher, beta, _first(student))[0]  # type: ignore[index]


def _first(rows: Tensor) -> Int[Tensor, " n"]:
    return torch.zeros(len(rows), dtype=torch.long, device=rows.device)


def outcomes(logprobs: Float[Tensor, "n k"], there: Bool[Tensor, "n k"], tail: Tail) -> Float[Tensor, "n o"]:
    """Logits over a support's outcomes: its tokens, and with `bucket` one more that holds all the rest.

    `renormalise` needs no work here, because a softmax of logprobs renormalises them."""
    inside = logprobs.masked_fill(~there, NO_TOKEN)
    if tail == "renormalise":
        return inside
    # why: rounding can bring the mass to 1 or above, and the rest must stay a probability
    rest = torch.log(-torch.expm1(inside.logsumexp(-1, keepdim=True).clamp(max=-1e-7)))
    return torch.cat([inside, rest], dim=-1)


@dataclass(frozen=True)
class JSD:
    """Generalised Jensen-Shannon divergence (SEMANTICS section 3; Agarwal et al. 2023, equation 1): `beta=0` is
    KL(teacher || student), `beta=1` KL(student || teacher).

    Over the vocabulary, or over a `support`: the `top_k` tokens that the teacher or the student finds likeliest,
    or the sampled token alone. `tail` says what becomes of the tokens outside: together one more outcome, or
    left out with both distributions renormalised. With a `loss_temperature`, both are taken at that one in place of the
    one that logits come at; no factor makes up for it. Raises `ConfigError`.
    """

    beta: float = 1.0
    support: Support = "full"
    top_k: int | None = None  # of teacher_topk and student_topk
    tail: Tail | None = None  # of any support but full; None: bucket
    loss_temperature: float | None = None  # None: that of the logits
    looks_ahead: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise ConfigError(f"beta={self.beta}: expected a number from 0 to 1")
        if self.support not in get_args(Support):
            raise ConfigError(f"support={self.support}: expected one of {', '.join(get_args(Support))}")
        if self.tail not in (None, *get_args(Tail)):
            raise ConfigError(f"tail={self.tail}: expected one of {', '.join(get_args(Tail))}")
        has_k = self.support in ("teacher_topk", "student_topk")
        if has_k != (self.top_k is not None):
            raise ConfigError(
                f"support={self.support} needs top_k, the number of tokens"
                if has_k
                else f"top_k={self.top_k} is of support=teacher_topk and support=student_topk, not of {self.support}"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k}: expected 1 or more")
        if self.support == "full" and self.tail is not None:
            raise ConfigError(
                f"tail={self.tail}: support=full leaves no token out; leave tail out, or choose a support"
            )
        if self._loses_everything:
            raise ConfigError(
                f"support={self.support} of one token with tail=renormalise: both distributions become 1 on it and the "
                "loss is always 0. Use tail=bucket, or more tokens"
            )
        check_loss_temperature(self.loss_temperature)
        if self.loss_temperature is not None and not self._can_change_temperature:
            raise ConfigError(
                f"loss_temperature={self.loss_temperature}: with support={self.support} and tail=bucket the mass "
                "outside would have to be known at that temperature, and is known at the sampling one. "
                "Possible: tail=renormalise with teacher_topk, support=full or student_topk, objective=topk_forward_kl"
            )
        if 0 < self.beta < 0.05 or 0.95 < self.beta < 1:
            warnings.warn(
                f"beta={self.beta}: near 0 and 1 the divergence tends to 0, not to the KL at the endpoint; "
                "use beta=0 or beta=1 for these",
                stacklevel=3,
            )

    @property
    def _loses_everything(self) -> bool:
        return self.tail == "renormalise" and (self.support == "sampled" or self.top_k == 1)

    @property
    def _can_change_temperature(self) -> bool:
        return self.support in ("full", "student_topk") or (
            self.support == "teacher_topk" and self.tail == "renormalise"
        )

    @property
    def need(self) -> SignalSpec:
        if self.support == "teacher_topk":
            assert self.top_k is not None
            return TeacherTopK(self.top_k, renormalised=self.tail == "renormalise")
        return SignalKind.SAMPLED if self.support == "sampled" else SignalKind.FULL

    def advantages(self, logprobs, batch, lengths):
        raise NotImplementedError("a distribution loss has no advantages")

    def loss(self, logits, batch):
        scale = to_loss_temperature(self.loss_temperature, batch)
        if self.support == "full":
            return self._full(logits, batch, scale)
        ids, teacher = self._support(logits, batch)  # [n, k] each
        there = torch.isfinite(teacher)
        student, judge = chosen_logprobs(_scaled(logits, scale), ids), _scaled(teacher, scale)
        if self.support == "student_topk" and scale != 1:
            assert batch.teacher_logits is not None
            judge = chosen_logprobs(_scaled(batch.teacher_logits, scale), ids)
        tail = self.tail or "bucket"
        loss = divergence(outcomes(student, there, tail), outcomes(judge, there, tail), self.beta)
        live, judged = _sampled_logprobs(logits, batch)
        metrics = _against_sampler(live, judged, batch)
        if self.top_k is not None:
            metrics |= _mass(teacher, there)
        return LossOutput(loss, metrics)

    def _full(self, logits: Float[Tensor, "n v"], batch: TokenBatch, scale: float) -> LossOutput:
        assert batch.teacher_logits is not None
        loss, entropy, live, judged = _Divergence.apply(  # type: ignore[misc]
            _scaled(logits, scale), _scaled(batch.teacher_logits, scale), self.beta, batch.ids
        )
        if scale != 1:  # what is measured is of the distributions that are sampled from
            return LossOutput(loss, _against_sampler(*_sampled_logprobs(logits, batch), batch))
        metrics = {**_against_sampler(live, judged, batch), "entropy": entropy}
        if self.beta == 1:
            metrics["exact_kl"] = loss.detach()
        return LossOutput(loss, metrics)

    def _support(self, logits: Float[Tensor, "n v"], batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Ids, and the teacher's logprobs of them."""
        if self.support == "teacher_topk":
            return _teacher_topk(batch)
        if self.support == "sampled":
            assert batch.teacher_logprobs is not None
            return batch.ids[:, None], batch.teacher_logprobs[:, None]
        assert batch.teacher_logits is not None and self.top_k is not None
        ids = logits.detach().topk(min(self.top_k, logits.shape[1])).indices
        return ids, chosen_logprobs(batch.teacher_logits, ids)


@dataclass(frozen=True)
class TopKForwardKL:
    """Cross-entropy against the teacher's `top_k` likeliest tokens, their probabilities renormalised to 1
    (SEMANTICS section 3), both at `loss_temperature` if it is given. Raises `ConfigError`."""

    top_k: int
    loss_temperature: float | None = None  # None: that of the logits
    looks_ahead: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        check_loss_temperature(self.loss_temperature)
        if self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k}: expected 1 or more")

    @property
    def need(self) -> SignalSpec:
        return TeacherTopK(self.top_k, renormalised=True)

    def advantages(self, logprobs, batch, lengths):
        raise NotImplementedError("a distribution loss has no advantages")

    def loss(self, logits, batch):
        ids, teacher = _teacher_topk(batch)
        there = torch.isfinite(teacher)
        scale = to_loss_temperature(self.loss_temperature, batch)
        judge = _scaled(teacher, scale).masked_fill(~there, NO_TOKEN)
        weights = judge.softmax(-1).masked_fill(~there, 0.0)  # all 0: no token is there
        loss = -(weights * chosen_logprobs(_scaled(logits, scale), ids)).sum(-1)
        live, judged = _sampled_logprobs(logits, batch)
        return LossOutput(loss, {**_against_sampler(live, judged, batch), **_mass(teacher, there)})


@dataclass(frozen=True)
class ClassicKD:
    """(1 - alpha) * cross-entropy with the given token + alpha * tau**2 * KL(teacher || student), the KL of both at the
    temperature tau, after Hinton et al. 2015 (arXiv 1503.02531; SEMANTICS section 4). Raises `ConfigError`.

    `soft` is that KL: a `JSD` at `beta=0` with tau as its `loss_temperature`. The cross-entropy is at temperature 1.
    """

    alpha: float = 0.5
    soft: JSD = field(default_factory=lambda: JSD(beta=0))
    looks_ahead: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha={self.alpha}: expected a number from 0 to 1")
        if self.soft.beta != 0 or self.soft.support not in ("full", "teacher_topk"):
            raise ConfigError(
                f"beta={self.soft.beta} support={self.soft.support}: objective=kd is about KL(teacher || student), "
                "with support=full or support=teacher_topk"
            )

    @property
    def need(self) -> SignalSpec:
        return self.soft.need

    def advantages(self, logprobs, batch, lengths):
        raise NotImplementedError("a distribution loss has no advantages")

    def loss(self, logits, batch):
        soft = self.soft.loss(logits, batch)
        tau = batch.temperature if self.soft.loss_temperature is None else self.soft.loss_temperature
        hard = -token_logprobs(_scaled(logits, batch.temperature), batch.ids)
        loss = (1 - self.alpha) * hard + self.alpha * tau**2 * soft.loss
        return LossOutput(loss, {**soft.metrics, "nll": hard.detach(), "forward_kl": soft.loss.detach()})


# --- temperature


def check_loss_temperature(value: float | None) -> None:
    """Raises `ConfigError`."""
    if value is not None and not 0 < value < math.inf:
        raise ConfigError(f"loss_temperature={value}: expected a positive number")


def to_loss_temperature(wanted: float | None, batch: TokenBatch) -> float:
    """The factor that takes logits from the batch's temperature to the wanted one."""
    return 1.0 if wanted is None else batch.temperature / wanted


def _scaled(values: Tensor, factor: float) -> Tensor:
    return values if factor == 1 else values * factor


def _teacher_topk(batch: TokenBatch) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
    assert batch.topk_ids is not None and batch.topk_logprobs is not None
    return batch.topk_ids, batch.topk_logprobs


# --- metrics


@torch.no_grad()
def _sampled_logprobs(logits: Float[Tensor, "n v"], batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """The student's and the teacher's logprobs of the sampled tokens. [n] each."""
    live = token_logprobs(logits.detach(), batch.ids)
    if batch.teacher_logprobs is not None:
        return live, batch.teacher_logprobs
    assert batch.teacher_logits is not None
    return live, token_logprobs(batch.teacher_logits, batch.ids)


def _against_sampler(live: Tensor, judged: Tensor, batch: TokenBatch) -> dict[str, Tensor]:
    ratios = ratio_metrics(live, batch.sampler_logprobs, math.inf)
    return {"kl": live - judged, "teacher_logprob": judged, **ratios}


def _mass(teacher: Float[Tensor, "n k"], there: Bool[Tensor, "n k"]) -> dict[str, Float[Tensor, " n"]]:
    """The teacher's probability inside the support, and tokens where it has none."""
    return {"topk_mass": teacher.exp().sum(-1), "no_teacher_mass": (~there.any(-1)).to(teacher.dtype)}
