"""The options of on-policy distillation: the objective, how the student is sampled, and the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import chz

from envs.datasets import Dataset
from envs.given import answered
from errors import ConfigError
from models.checks import common_temperature
from models.types import SignalKind, SignalSpec
from recipes.student_config import StudentConfig, check_at_least, check_positive
from recipes.teacher_options import OneTeacher
from recipes.teachers import DEFAULT_EMA_DECAY, EMA, TeacherSpec
from training.distribution_losses import JSD, ClassicKD, Support, Tail, TopKForwardKL
from training.loop import LoopConfig
from training.objectives import SFT, Objective, ReverseKL

DEFAULT_TOP_K = 64


@chz.chz
class LossFnConfig:
    """Bounds of the policy-gradient losses; left out: the loss's usual ones."""

    clip_low_threshold: float | None = chz.field(default=None, doc="ppo (0.8), cispo (0): lower bound of the ratio")
    clip_high_threshold: float | None = chz.field(default=None, doc="ppo (1.2), cispo (4): upper bound of the ratio")
    is_cap: float = chz.field(default=5.0, doc="the importance ratio is truncated here")
    advantage_clip: float | None = chz.field(default=None, doc="clamp each token's advantage to ± this")
    signal_policy: Literal["current", "sampler"] = chz.field(
        default="current", doc="whose logprob the teacher's is compared with"
    )


@chz.chz
class OnPolicyConfig(StudentConfig):
    """Everything but the data and the teachers."""

    # objective
    objective: Literal["reverse_kl", "jsd", "topk_forward_kl", "kd", "sft"] = chz.field(
        default="reverse_kl",
        doc="reverse_kl: policy gradient on sampled tokens; jsd: divergence of whole distributions, or of their "
        "support; topk_forward_kl: cross-entropy against the teacher's top_k tokens; kd: cross-entropy with given "
        "answers (lmbda=0) and forward KL; sft: the cross-entropy alone, the teacher only measures",
    )
    beta: float = chz.field(default=1.0, doc="jsd: 0 is forward KL, 1 is reverse KL, between them Jensen-Shannon")
    support: Support = chz.field(
        default="full", doc="jsd: over the vocabulary, the teacher's or the student's top_k tokens, or the sampled one"
    )
    top_k: int | None = chz.field(
        default=None, doc=f"topk_forward_kl, and jsd with a top-k support: number of tokens; default {DEFAULT_TOP_K}"
    )
    tail: Tail | None = chz.field(
        default=None,
        doc="jsd with a support: the tokens outside are one more outcome (bucket, the default) or left out",
    )
    loss_temperature: float | None = chz.field(
        default=None, doc="of both models in the loss of jsd, topk_forward_kl, kd; default: `temperature`"
    )
    alpha: float = chz.field(default=0.5, doc="kd: share of the KL, the rest is cross-entropy with the given token")
    loss_fn: Literal["importance_sampling", "ppo", "cispo"] = chz.field(
        default="importance_sampling", doc="reverse_kl: the policy-gradient loss"
    )
    loss_fn_config: LossFnConfig = chz.field(default_factory=LossFnConfig, doc="bounds of loss_fn")
    kl_penalty_coef: float = chz.field(default=1.0, doc="reverse_kl: factor on the per-token KL")
    kl_discount_factor: float = chz.field(default=0.0, doc="reverse_kl: discount of later tokens' KL; 0 ignores it")

    # a teacher that is the student's moving average
    teacher_ema_decay: float | None = chz.field(
        default=None,
        doc=f"teacher_model={EMA} is the student's own moving average: share that a step keeps; default "
        f"{DEFAULT_EMA_DECAY}",
    )

    teacher_alignment: Literal["ids", "bytes"] = chz.field(
        default="ids",
        doc="bytes: a teacher may have another tokenizer, and spans of text are compared (objective=reverse_kl only)",
    )

    # sampling
    temperature: float = chz.field(default=1.0, doc="of sampling, and of every logprob that is compared")

    # given answers
    lmbda: float = chz.field(
        default=1.0,
        doc="probability that a prompt's group is sampled; else it is the row's completion. Not for reverse_kl",
    )

    # steps and evaluation
    num_substeps: int = chz.field(default=1, doc="optimizer steps per batch of episodes")
    eval_samples: int = chz.field(default=1, doc="sampled attempts per held-out row (KL, sampled accuracy)")
    eval_teacher: bool = chz.field(default=False, doc="evaluate the teacher once, to know what is within reach")
    rollouts_only: bool = chz.field(
        default=False, doc="sample, score and measure, train nothing and save no weights: for episodes/ and metrics"
    )
    max_dropped_fraction: float = chz.field(default=0.5, doc="fail when a step drops more of its episodes than this")

    @chz.validate
    def _ranges(self) -> None:
        check_at_least(self, _AT_LEAST)
        check_positive("kl_penalty_coef", self.kl_penalty_coef)
        if self.max_dropped_fraction > 1:
            raise ConfigError(f"max_dropped_fraction={self.max_dropped_fraction}: expected 0 to 1")
        self.make_objective()
        if self.aligns_by_bytes() and self.objective != "reverse_kl":
            raise ConfigError(
                "teacher_alignment=bytes: a teacher of another tokenizer gives log-probabilities of spans of text, "
                f"and objective={self.objective} compares distributions over one vocabulary. Use objective=reverse_kl"
            )
        self.comparison_temperature()
        self._check_lmbda()
        if self.teacher_ema_decay is not None and all(spec.ema_decay is None for spec in self.teacher_specs()):
            raise ConfigError(
                f"teacher_ema_decay={self.teacher_ema_decay} is for a teacher that is the student's average: "
                f"set teacher_model={EMA} as well, or leave it out"
            )

    def _check_lmbda(self) -> None:
        if not 0 <= self.lmbda <= 1:
            raise ConfigError(f"lmbda={self.lmbda}: expected a probability, from 0 to 1")
        if self.objective in OF_GIVEN_ANSWERS and "lmbda" in self.without():
            raise ConfigError(
                f"objective={self.objective} learns from given answers, and here are none: use objective=jsd"
            )
        if self.objective in OF_GIVEN_ANSWERS and self.lmbda != 0:
            raise ConfigError(
                f"objective={self.objective} learns from given answers, not from what the student samples: set lmbda=0"
                + (", or use recipes.off_policy_reasoning, which needs no teacher" if self.objective == "sft" else "")
            )
        if self.lmbda < 1 and self.objective == "reverse_kl":
            raise ConfigError(
                f"lmbda={self.lmbda}: objective=reverse_kl is a policy gradient on what the student samples: it has "
                "no meaning on given answers. Use objective=jsd or objective=topk_forward_kl, or lmbda=1"
            )

    def answered(self, data: Dataset, *, strict: bool) -> Dataset:
        """What can be trained on: with `lmbda` below 1, the rows that have a completion. Raises `DataError`."""
        if self.lmbda == 1:
            return data
        why = f"which lmbda={self.lmbda} may train on. Give it one, or set lmbda=1"
        return replace(data, train=answered(data.train, strict=strict, why=why))

    # --- what the options turn into

    def make_objective(self) -> Objective:
        """Raises `ConfigError` for options that the chosen objective does not have."""
        check_objective_options(self)
        if self.objective == "topk_forward_kl":
            return TopKForwardKL(DEFAULT_TOP_K if self.top_k is None else self.top_k, self.loss_temperature)
        if self.objective == "sft":
            return SFT()
        if self.objective in ("jsd", "kd"):
            top_k = self.top_k
            if top_k is None and self.support in ("teacher_topk", "student_topk"):
                top_k = DEFAULT_TOP_K
            beta = 0.0 if self.objective == "kd" else self.beta
            loss = JSD(beta, self.support, top_k, self.tail, self.loss_temperature)
            return ClassicKD(self.alpha, loss) if self.objective == "kd" else loss
        bounds = self.loss_fn_config
        return ReverseKL(
            coef=self.kl_penalty_coef,
            discount=self.kl_discount_factor,
            variant=self.loss_fn,
            clip_low=bounds.clip_low_threshold,
            clip_high=bounds.clip_high_threshold,
            is_cap=bounds.is_cap,
            advantage_clip=bounds.advantage_clip,
            signal_policy=bounds.signal_policy,
        )

    def signal_need(self) -> SignalSpec:
        need = self.make_objective().need
        return SignalKind.SAMPLED if need is SignalKind.NONE else need  # evaluations measure the KL

    def comparison_temperature(self) -> float:
        return common_temperature(self.temperature, {})

    def aligns_by_bytes(self) -> bool:
        return self.teacher_alignment == "bytes"

    def samples_teachers(self) -> bool:
        return self.eval_teacher

    def loop(self, steps_of_one_epoch: int) -> LoopConfig:
        return replace(
            super().loop(steps_of_one_epoch),
            num_substeps=self.num_substeps,
            temperature=self.comparison_temperature(),
            eval_samples=self.eval_samples,
            max_dropped_fraction=self.max_dropped_fraction,
            lmbda=self.lmbda,
            train=not self.rollouts_only,
        )


@chz.chz
class TrainConfig(OneTeacher, OnPolicyConfig):
    """Student, one teacher, objective, optimizer and run: everything but the data."""

    teacher_temperature: float | None = chz.field(
        default=None, doc="temperature of the teacher's logprobs; must be `temperature`, which is the default"
    )

    @chz.validate
    def _has_teacher(self) -> None:
        if not self.has_teacher:
            raise ConfigError(
                "missing: teacher_model\n  teacher_model=  (str), or teacher.url= for one that a server holds\n"
                "--help lists every option"
            )
        self.check_teacher()

    @property
    def teacher_name(self) -> str:
        """Of the teacher in metrics, episodes and errors."""
        return self.teacher_model or next(iter(self.teacher.url), "")

    def comparison_temperature(self) -> float:
        return common_temperature(self.temperature, {self.teacher_name: self.teacher_temperature})

    def teacher_specs(self) -> Sequence[TeacherSpec]:
        return [self.teacher_spec(self.teacher_name, self.teacher_ema_decay)]


_AT_LEAST = {
    "eval_samples": 0, "num_substeps": 1, "max_dropped_fraction": 0,
}  # fmt: skip
OF_GIVEN_ANSWERS = ("kd", "sft")
_OF_OBJECTIVE = {
    "loss_fn": ("reverse_kl",), "loss_fn_config": ("reverse_kl",), "kl_penalty_coef": ("reverse_kl",),
    "kl_discount_factor": ("reverse_kl",), "beta": ("jsd",), "support": ("jsd", "kd"), "tail": ("jsd", "kd"),
    "top_k": ("jsd", "topk_forward_kl", "kd"), "loss_temperature": ("jsd", "topk_forward_kl", "kd"), "alpha": ("kd",),
}  # fmt: skip
"""Options that only some objectives have."""


def check_objective_options(config: Any) -> None:
    """Raises `ConfigError` for an option of another objective than the config's."""
    fields = chz.chz_fields(type(config))
    for name, owners in _OF_OBJECTIVE.items():
        if name not in fields:
            continue
        value = getattr(config, name)
        default = LossFnConfig() if name == "loss_fn_config" else fields[name]._default
        if config.objective not in owners and value != default:
            raise ConfigError(
                f"objective={config.objective} has no {name} (given: {value}): leave it out, or use "
                + " or ".join(f"objective={owner}" for owner in owners)
            )
