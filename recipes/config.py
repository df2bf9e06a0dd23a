"""The options that every training recipe shares, and what they turn into.

Options keep the names of the Tinker cookbook's recipes where they mean the same here. A value is
declared once, in this class, and handed on whole.
"""

from __future__ import annotations

import json
from typing import Any, Literal

import chz
import torch

from errors import ConfigError
from models.checks import common_temperature
from training.learner import OptimizerConfig
from training.loop import LoopConfig, Schedule
from training.objectives import JSD, Objective, ReverseKL
from training.run_dir import Behavior

MAY_DIFFER_ON_RESUME = frozenset(
    {
        "max_steps", "eval_every", "eval_samples", "save_every", "keep_checkpoints", "max_dropped_fraction",
        "behavior_if_log_dir_exists", "dry_run", "trackers", "wandb_project", "log_path", "device",
        "eval_teacher",
    }
)  # fmt: skip
"""Options that a resumed run may change: at the same device, none changes what a step computes."""


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
class TrainConfig:
    """Student, teacher, objective, optimizer and run: everything but the data."""

    # student
    model_name: str = chz.field(doc="the student: hub id, local folder or .gguf file")
    load_checkpoint_path: str | None = chz.field(default=None, doc="start from these weights: HF folder or adapter")
    lora_rank: int = chz.field(default=0, doc="rank of the LoRA adapter; 0 trains all weights")
    lora_alpha: float | None = chz.field(default=None, doc="LoRA scaling; default 32, as in the Tinker cookbook")
    system_prompt: str | None = chz.field(default=None, doc="system message for rows that have none")
    chat_template_kwargs: str = chz.field(default="{}", doc="JSON object for the student's chat template")

    # teacher
    teacher_model: str = chz.field(doc="the teacher: hub id, local folder or .gguf file")
    teacher_checkpoint: str | None = chz.field(default=None, doc="the teacher's weights: HF folder or adapter")
    teacher_system_prompt: str | None = chz.field(
        default=None, doc="system message in the teacher's view; default: the student's, '' for none"
    )
    teacher_chat_template_kwargs: str | None = chz.field(
        default=None, doc="JSON object for the teacher's chat template; default: the student's"
    )
    teacher_temperature: float | None = chz.field(
        default=None, doc="temperature of the teacher's logprobs; must be `temperature`, which is the default"
    )

    # objective
    objective: Literal["reverse_kl", "jsd"] = chz.field(
        default="reverse_kl", doc="reverse_kl: policy gradient on sampled tokens; jsd: over the whole vocabulary"
    )
    beta: float = chz.field(default=1.0, doc="jsd: 0 is forward KL, 1 is reverse KL, between them Jensen-Shannon")
    loss_fn: Literal["importance_sampling", "ppo", "cispo"] = chz.field(
        default="importance_sampling", doc="reverse_kl: the policy-gradient loss"
    )
    loss_fn_config: LossFnConfig = chz.field(default_factory=LossFnConfig, doc="bounds of loss_fn")
    kl_penalty_coef: float = chz.field(default=1.0, doc="reverse_kl: factor on the per-token KL")
    kl_discount_factor: float = chz.field(default=0.0, doc="reverse_kl: discount of later tokens' KL; 0 ignores it")
    loss_reduction: Literal["token_mean", "token_sum", "sequence_mean"] = chz.field(
        default="token_mean", doc="token losses are weighed by 1/tokens of the step, by 1, or per episode alike"
    )

    # optimizer
    learning_rate: float = chz.field(default=1e-4, doc="AdamW's peak learning rate")
    lr_schedule: Schedule = chz.field(default="constant", doc="constant, or decay to 0 over max_steps")
    warmup_steps: int = chz.field(default=0, doc="steps of linear warm-up")
    max_grad_norm: float = chz.field(default=1.0, doc="clip the gradient's norm; 0 does not clip")
    weight_decay: float = chz.field(default=0.0, doc="AdamW's weight decay, on matrices only")
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    num_substeps: int = chz.field(default=1, doc="optimizer steps per batch of episodes")

    # sampling
    temperature: float = chz.field(default=1.0, doc="of sampling, and of every logprob that is compared")
    max_tokens: int = chz.field(default=512, doc="longest answer of one turn, in tokens")
    sampler_slots: int = chz.field(default=64, doc="largest batch of concurrent generation")

    # run
    max_steps: int | None = chz.field(default=None, doc="steps to train for; default: once through the largest dataset")
    eval_every: int = chz.field(default=20, doc="steps between evaluations; 0: at both ends only")
    eval_samples: int = chz.field(default=1, doc="sampled attempts per held-out row (KL, sampled accuracy)")
    eval_teacher: bool = chz.field(default=False, doc="evaluate the teacher once, to know what is within reach")
    save_every: int = chz.field(default=20, doc="steps between checkpoints; 0: at the end only")
    keep_checkpoints: int = chz.field(default=3, doc="keep this many of the last; 0 keeps all")
    max_dropped_fraction: float = chz.field(default=0.5, doc="fail when a step drops more of its episodes than this")
    seed: int = 0
    log_path: str | None = chz.field(default=None, doc="run directory; default: runs/<recipe>-<dataset>-<model>")
    behavior_if_log_dir_exists: Behavior = chz.field(
        default="ask", doc="ask: resume the same run, ask (or fail) if options differ; resume; delete; raise"
    )
    wandb_project: str | None = chz.field(default=None, doc="mirror metrics to this W&B project")
    trackers: tuple[str, ...] = chz.field(default=(), doc="mirror metrics to: tensorboard, wandb, trackio")
    dry_run: bool = chz.field(default=False, doc="check and print everything, load no weights, train nothing")

    # machine
    device: str = chz.field(default="auto", doc="auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16"] = chz.field(
        default="auto",
        doc="of the computation; auto: bfloat16 on CUDA, else float32. Full fine-tuning keeps float32 weights",
    )
    micro_batch_tokens: int | None = chz.field(
        default=None, doc="tokens of one forward and backward pass; default 128 on a CPU, 8192 on CUDA"
    )
    activation_checkpointing: bool = chz.field(default=False, doc="recompute activations: less memory, slower")
    attn_implementation: str = chz.field(
        default="auto", doc="auto: packed without padding; else transformers' own (sdpa, eager, …), padded"
    )

    @chz.validate
    def _ranges(self) -> None:
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ConfigError(f"{name}={value}: expected {least} or more")
        for name in ("learning_rate", "kl_penalty_coef"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ConfigError(f"{name}={value}: expected a positive number")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected 0 or more, and less than 1")
        if self.max_dropped_fraction > 1:
            raise ConfigError(f"max_dropped_fraction={self.max_dropped_fraction}: expected 0 to 1")
        if self.lora_alpha is not None and self.lora_rank == 0:
            raise ConfigError("lora_alpha is for LoRA: set lora_rank as well, or leave it out")
        self.make_objective()
        self.comparison_temperature()

    # --- what the options turn into

    def make_objective(self) -> Objective:
        """Raises `ConfigError` for options that the chosen objective does not have."""
        if self.objective == "jsd":
            changed = [n for n in _REVERSE_KL_ONLY if getattr(self, n) != _default(n)]
            if changed:
                raise ConfigError(f"objective=jsd has no {', '.join(changed)}: leave out, or use objective=reverse_kl")
            return JSD(beta=self.beta)
        if self.beta != 1.0:
            raise ConfigError(f"beta={self.beta} is of objective=jsd; objective=reverse_kl is always beta=1")
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

    def comparison_temperature(self) -> float:
        return common_temperature(self.temperature, {self.teacher_model: self.teacher_temperature})

    def optimizer(self) -> OptimizerConfig:
        return OptimizerConfig(
            weight_decay=self.weight_decay,
            beta1=self.adam_beta1,
            beta2=self.adam_beta2,
            eps=self.adam_eps,
            max_grad_norm=self.max_grad_norm,
        )

    def loop(self, steps_of_one_epoch: int) -> LoopConfig:
        return LoopConfig(
            max_steps=self.max_steps or steps_of_one_epoch,
            learning_rate=self.learning_rate,
            schedule=self.lr_schedule,
            warmup_steps=self.warmup_steps,
            num_substeps=self.num_substeps,
            temperature=self.comparison_temperature(),
            eval_every=self.eval_every,
            eval_samples=self.eval_samples,
            save_every=self.save_every,
            keep_checkpoints=self.keep_checkpoints,
            max_dropped_fraction=self.max_dropped_fraction,
            seed=self.seed,
        )

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        if self.dtype == "auto":
            return torch.bfloat16 if device.type == "cuda" else torch.float32
        return getattr(torch, self.dtype)

    def token_budget(self, device: torch.device) -> int:
        """Activations take more than 1 MiB a token on a small model: on a CPU, small passes cost little speed."""
        return self.micro_batch_tokens or (8192 if device.type == "cuda" else 128)

    def template_kwargs(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The student's and the teacher's `chat_template_kwargs`, parsed. Raises `ConfigError`."""
        ours = _json_object("chat_template_kwargs", self.chat_template_kwargs)
        if self.teacher_chat_template_kwargs is None:
            return ours, ours
        return ours, _json_object("teacher_chat_template_kwargs", self.teacher_chat_template_kwargs)

    def may_differ_on_resume(self) -> frozenset[str]:
        """A schedule that decays to 0 over `max_steps` cannot have these changed half-way."""
        return MAY_DIFFER_ON_RESUME - ({"max_steps"} if self.lr_schedule != "constant" else set())


_AT_LEAST = {
    "lora_rank": 0, "max_tokens": 1, "sampler_slots": 1, "max_steps": 1, "eval_every": 0, "eval_samples": 0,
    "save_every": 0, "keep_checkpoints": 0, "warmup_steps": 0, "num_substeps": 1, "micro_batch_tokens": 1,
    "max_grad_norm": 0, "weight_decay": 0, "adam_eps": 0, "max_dropped_fraction": 0,
}  # fmt: skip
_REVERSE_KL_ONLY = ("loss_fn", "loss_fn_config", "kl_penalty_coef", "kl_discount_factor")


def _default(name: str) -> Any:
    field = chz.chz_fields(TrainConfig)[name]
    return LossFnConfig() if name == "loss_fn_config" else field._default


def _json_object(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name}={text}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{name}={text}: expected a JSON object")
    return value
