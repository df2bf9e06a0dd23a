"""The options that every training recipe shares, and what they turn into: the student, its optimizer, the run.

Options keep the names of the Tinker cookbook's recipes where they mean the same here. A value is
declared once, in one of the config classes, and handed on whole.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import chz
import torch

from errors import ConfigError
from models.checks import default_dtype
from models.types import SignalKind, SignalSpec
from recipes.sampler_config import SamplerConfig, sampler_field
from recipes.served import ServerOptions
from recipes.teachers import TeacherSpec
from training.learner import OptimizerConfig
from training.loop import LoopConfig, Schedule
from training.run_dir import Behavior

MAY_DIFFER_ON_RESUME = frozenset(
    {
        "max_steps", "eval_every", "eval_samples", "save_every", "keep_checkpoints", "max_dropped_fraction",
        "behavior_if_log_dir_exists", "dry_run", "trackers", "wandb_project", "log_path", "device",
        "eval_teacher", "sampler", "teacher", "datasets.N.teacher", "teachers_in_memory",
        *(f"teachers.N.{name}" for name in chz.chz_fields(ServerOptions)),
    }
)  # fmt: skip
"""Options that a resumed run may change: at the same device, none changes what a step computes. Engines round
unlike each other, but the student that they sample is the same."""


@chz.chz
class StudentConfig:
    """What is trained, how it is updated, where it is kept, and on which machine."""

    # student
    model_name: str = chz.field(doc="the student: hub id, local folder or .gguf file")
    load_checkpoint_path: str | None = chz.field(default=None, doc="start from these weights: HF folder or adapter")
    lora_rank: int = chz.field(default=0, doc="rank of the LoRA adapter; 0 trains all weights")
    lora_alpha: float | None = chz.field(default=None, doc="LoRA scaling; default 32, as in the Tinker cookbook")
    system_prompt: str | None = chz.field(default=None, doc="system message for rows that have none")
    chat_template_kwargs: str = chz.field(default="{}", doc="JSON object for the student's chat template")

    # optimizer
    learning_rate: float = chz.field(default=1e-4, doc="AdamW's peak learning rate")
    lr_schedule: Schedule = chz.field(default="constant", doc="constant, or decay to 0 over max_steps")
    warmup_steps: int = chz.field(default=0, doc="steps of linear warm-up")
    max_grad_norm: float = chz.field(default=1.0, doc="clip the gradient's norm; 0 does not clip")
    weight_decay: float = chz.field(default=0.0, doc="AdamW's weight decay, on matrices only")
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    loss_reduction: Literal["token_mean", "token_sum", "sequence_mean"] = chz.field(
        default="token_mean", doc="token losses are weighed by 1/tokens of the step, by 1, or per episode alike"
    )

    # generation
    sampler: SamplerConfig = sampler_field()
    max_tokens: int = chz.field(default=512, doc="longest answer of one turn, in tokens")
    sampler_slots: int = chz.field(default=64, doc="largest batch of concurrent generation")

    # run
    max_steps: int | None = chz.field(default=None, doc="steps to train for; default: once through the largest dataset")
    eval_every: int = chz.field(default=20, doc="steps between evaluations; 0: at both ends only")
    save_every: int = chz.field(default=20, doc="steps between checkpoints; 0: at the end only")
    keep_checkpoints: int = chz.field(default=3, doc="keep this many of the last; 0 keeps all")
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
        doc="of the computation; auto: bfloat16 on GPUs that have it, else float32. Weights trained whole stay float32",
    )
    micro_batch_tokens: int | None = chz.field(
        default=None, doc="tokens of one forward and backward pass; default 128 on a CPU, 8192 on CUDA"
    )
    activation_checkpointing: bool = chz.field(default=False, doc="recompute activations: less memory, slower")
    attn_implementation: str = chz.field(
        default="auto", doc="auto: packed without padding; else transformers' own (sdpa, eager, …), padded"
    )

    @staticmethod
    def without() -> Mapping[str, str]:
        """Options that a recipe inherits and has no use for, see `recipes.cli.Narrowed`."""
        return {}

    @chz.validate
    def _without(self) -> None:
        for name, why in self.without().items():
            if (value := getattr(self, name)) != chz.chz_fields(type(self))[name]._default:
                given = f"{name}={value}" if isinstance(value, bool | int | float | str) else name
                raise ConfigError(f"{given}: {why}")

    @chz.validate
    def _student_ranges(self) -> None:
        check_at_least(self, _AT_LEAST)
        check_positive("learning_rate", self.learning_rate)
        for name in ("weight_decay", "adam_eps"):
            if not math.isfinite(getattr(self, name)):
                raise ConfigError(f"{name}={getattr(self, name)}: expected a finite number")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected 0 or more, and less than 1")
        if self.seed >= 2**63:
            raise ConfigError(f"seed={self.seed}: expected a number below 2**63")
        if self.lora_alpha is not None:
            if self.lora_rank == 0:
                raise ConfigError("lora_alpha is for LoRA: set lora_rank as well, or leave it out")
            check_positive("lora_alpha", self.lora_alpha)

    # --- what the options turn into

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
            eval_every=self.eval_every,
            save_every=self.save_every,
            keep_checkpoints=self.keep_checkpoints,
            seed=self.seed,
        )

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        return default_dtype(self.dtype, device)

    def token_budget(self, device: torch.device) -> int:
        """Activations take more than 1 MiB a token on a small model: on a CPU, small passes cost little speed."""
        return self.micro_batch_tokens or (8192 if device.type == "cuda" else 128)

    def teacher_specs(self) -> Sequence[TeacherSpec]:
        """The teachers of the run, each name once; none to learn from given answers alone. Raises `ConfigError`."""
        return ()

    def blends(self) -> Mapping[str, Mapping[str, float]]:
        """Teachers that judge together: by the blend's name, its members' weights, which sum to 1."""
        return {}

    def teachers_at_a_time(self) -> int | None:
        """How many of the teachers' models are in memory together; None: all."""
        return None

    def signal_need(self) -> SignalSpec:
        """What every teacher must give."""
        return SignalKind.NONE

    def comparison_temperature(self) -> float:
        """The one temperature of every logprob that is compared. Raises `ConfigError`."""
        return 1.0

    def aligns_by_bytes(self) -> bool:
        """Whether a teacher may have another tokenizer than the student."""
        return False

    def samples_teachers(self) -> bool:
        """Whether a teacher's own answers are wanted, and not only what it thinks of the student's."""
        return False

    def student_template_kwargs(self) -> dict[str, Any]:
        """Raises `ConfigError`."""
        return json_object("chat_template_kwargs", self.chat_template_kwargs)

    def may_differ_on_resume(self) -> frozenset[str]:
        """A schedule that decays to 0 over `max_steps` cannot have these changed half-way."""
        return MAY_DIFFER_ON_RESUME - ({"max_steps"} if self.lr_schedule != "constant" else set())


_AT_LEAST = {
    "lora_rank": 0, "max_steps": 1, "eval_every": 0, "save_every": 0, "keep_checkpoints": 0, "warmup_steps": 0,
    "micro_batch_tokens": 1, "max_tokens": 1, "sampler_slots": 1, "max_grad_norm": 0, "weight_decay": 0, "adam_eps": 0,
    "seed": 0,
}  # fmt: skip


def check_at_least(config: Any, least: Mapping[str, float]) -> None:
    """Raises `ConfigError` for the first option below its least value; None passes."""
    for name, bound in least.items():
        value = getattr(config, name)
        if value is not None and not value >= bound:
            raise ConfigError(f"{name}={value}: expected {bound} or more")


def check_positive(name: str, value: float) -> None:
    """Raises `ConfigError` unless 0 < value < infinity."""
    if not 0 < value < float("inf"):
        raise ConfigError(f"{name}={value}: expected a positive number")


def json_object(name: str, text: str) -> dict[str, Any]:
    """The option's value, parsed. Raises `ConfigError`."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name}={text}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{name}={text}: expected a JSON object")
    return value
