"""Train a student on its own answers, judged token by token by a teacher.

    python -m recipes.on_policy_distillation
    python -m recipes.on_policy_distillation dataset=deepmath lora_rank=128 wandb_project=mine
    python -m recipes.on_policy_distillation dataset=prompts.jsonl model_name=./student teacher_model=./teacher
    python -m recipes.on_policy_distillation dataset=gsm8k teacher.url=http://host:8000

Without options: two-digit addition with two tiny embedded models, on any machine in minutes.
Stop it whenever you like; the same command goes on where it stopped.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import chz

from envs.datasets import Cursor, Dataset, Row
from envs.given import given_builder
from envs.rendering import Renderer
from envs.sources import NAMES, load_dataset_rows, locate
from errors import ConfigError, DataError
from recipes import setup
from recipes.cli import run_cli
from recipes.config import TrainConfig
from recipes.training_run import TrainingRun, print_dry_run, train
from training.evaluation import EvalSet
from training.loop import DatasetPlan
from training.trackers import check_trackers


@chz.chz
class Config(TrainConfig):
    """On-policy distillation of single answers."""

    dataset: str = chz.field(
        default="arithmetic", doc="arithmetic, deepmath, tulu3, gsm8k, or a path to JSONL (one `messages` per row)"
    )
    dataset_path: str | None = chz.field(default=None, doc="a local copy of the named dataset: file or folder")
    max_rows: int | None = chz.field(default=None, doc="use at most this many training rows")
    group_size: int = chz.field(default=1, doc="attempts per prompt")
    groups_per_batch: int = chz.field(default=64, doc="prompts per step")
    eval_size: int = chz.field(default=64, doc="held-out rows to evaluate on; 0: no evaluation")
    max_prompt_tokens: int | None = chz.field(default=None, doc="longest prompt; default: what the context leaves")
    long_prompts: Literal["error", "drop"] = chz.field(default="error", doc="what to do with longer ones")

    @chz.validate
    def _sizes(self) -> None:
        for name, least in (("group_size", 1), ("groups_per_batch", 1), ("eval_size", 0), ("max_rows", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name}={value}: expected {least} or more")
        if self.num_substeps > self.groups_per_batch:
            raise ConfigError(
                f"num_substeps={self.num_substeps}: there are only {self.groups_per_batch} groups to split"
            )


PRESETS: dict[str, dict[str, Any]] = {
    "arithmetic": {
        "model_name": "embedded:student",
        "teacher_model": "embedded:teacher",
        "objective": "jsd",  # exact reverse KL: the sampled estimate is too noisy for models this small
        "groups_per_batch": 128,
        "learning_rate": 5e-4,
        "warmup_steps": 30,
        "max_steps": 300,
        "max_tokens": 24,
        "eval_every": 100,
        "eval_size": 500,
        "eval_teacher": True,
        "save_every": 50,
        "sampler_slots": 256,
        "micro_batch_tokens": 4096,
    },
    "deepmath": {
        "model_name": "Qwen/Qwen3-8B-Base",
        "teacher_model": "Qwen/Qwen3-8B",
        "lora_rank": 128,
        "groups_per_batch": 512,
        "group_size": 4,
        "learning_rate": 1e-4,
        "max_tokens": 4096,
    },
    "tulu3": {
        "model_name": "Qwen/Qwen3-8B-Base",
        "teacher_model": "Qwen/Qwen3-8B",
        "lora_rank": 128,
        "groups_per_batch": 64,
        "group_size": 4,
        "learning_rate": 1e-4,
        "max_tokens": 4096,
    },
    "gsm8k": {
        "model_name": "Qwen/Qwen2.5-0.5B-Instruct",
        "teacher_model": "Qwen/Qwen2.5-1.5B-Instruct",
        "learning_rate": 1e-5,
    },
}
"""Defaults that a dataset brings with it. Anything given on the command line wins."""


def presets(given: dict[str, str]) -> dict[str, Any]:
    dataset = given.get("dataset", "arithmetic")
    if dataset in PRESETS:
        of_a_local_teacher = {"teacher_model", "eval_teacher"} if "teacher.url" in given else set()
        return {key: value for key, value in PRESETS[dataset].items() if key not in of_a_local_teacher}
    locate(dataset, given.get("dataset_path"))  # a typo is named here, not the options that it did not bring
    size = eval_size_of_file(dataset)
    return {} if size is None else {"eval_size": size}


def eval_size_of_file(dataset: str) -> int | None:
    """How many rows to hold out of a file that has no test split: a short one is not spent on evaluation."""
    if not Path(dataset).is_file():
        return None
    with open(dataset, "rb") as lines:
        return min(64, sum(1 for _ in lines) // 10)


def main(config: Config) -> None:
    checked = check(config)
    run = training_run(config, checked)
    if not config.dry_run:
        train(config, run)
        return
    data, models = checked.data, checked.models
    row = data.train[0]
    teacher = models.teacher_renderer.prompt(row.teacher_messages or row.messages)
    print_dry_run(
        config,
        run,
        data=[
            f"{data.name}: {len(data.train)} training rows, {len(data.test)} held out, graded as {data.grader}",
            f"{config.groups_per_batch} prompts x {config.group_size} attempts a step",
        ],
        prompt=models.student_renderer.prompt(row.messages),
        teacher=f"its prompt has {len(teacher)} tokens" + (" (privileged)" if row.teacher_messages else ""),
    )


# --- what is checked before anything is loaded


@dataclass(frozen=True)
class Checked:
    data: Dataset
    models: setup.CheckedModels


def check(config: Config) -> Checked:
    """Every check that needs no weights. Raises `UserError`s."""
    check_trackers([*config.trackers, *(["wandb"] if config.wandb_project else [])])
    data = load_dataset_rows(
        config.dataset, config.dataset_path, eval_size=config.eval_size, seed=config.seed, max_rows=config.max_rows
    )
    data = config.answered(data, strict=config.dataset not in NAMES)
    for row in (*data.train, *data.test):
        if row.teacher not in (None, config.teacher_name):
            raise DataError(
                f"{row.place}: its teacher is {row.teacher!r}, this run has only {config.teacher_name!r}. "
                "Remove the key, or use recipes.on_policy_multi_teacher"
            )
    models = setup.check_models(config)
    data = setup.check_prompt_lengths(
        data,
        models,
        teacher_of=lambda row: config.teacher_name,
        max_tokens=config.max_tokens,
        asked=(config.max_prompt_tokens, f"max_prompt_tokens={config.max_prompt_tokens}"),
        drop=config.long_prompts == "drop",
    )
    return Checked(data=data, models=models)


def log_path(config: Config) -> Path:
    """The run's folder: as given, or named after what is trained, so that the same command finds it again."""
    if config.log_path is not None:
        return Path(config.log_path)
    name = f"{Path(config.dataset).stem}-{Path(config.model_name).name}"
    return Path("runs", "on_policy_distillation-" + re.sub(r"[^\w.-]+", "-", name))


def training_run(config: Config, checked: Checked) -> TrainingRun:
    data, models = checked.data, checked.models

    def teacher_of(row: Row) -> str:
        return config.teacher_name

    def held_out(renderer: Renderer) -> list[EvalSet]:
        return [setup.eval_set(data, renderer, teacher_of, config.max_tokens)] if data.test else []

    plan = DatasetPlan(
        name=data.name,
        cursor=Cursor(data.train, seed=config.seed),
        groups_per_batch=config.groups_per_batch,
        builder=setup.group_builder(
            models.student_renderer,
            data.name,
            teacher_of,
            group_size=config.group_size,
            max_tokens=config.max_tokens,
        ),
        given=given_builder(models.student_renderer, data.name, teacher_of, max_tokens=config.max_tokens),
    )
    return TrainingRun(
        path=log_path(config),
        models=models,
        plans=[plan],
        eval_sets=held_out(models.student_renderer),
        teacher_sets={config.teacher_name: held_out(models.teacher_renderer)},
        steps_per_epoch=-(-len(data.train) // config.groups_per_batch),
    )


if __name__ == "__main__":
    run_cli(main, Config, presets=presets, argv=sys.argv[1:])
