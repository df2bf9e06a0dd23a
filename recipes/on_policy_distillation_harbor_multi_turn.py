"""Train a student on its own episodes in sandboxes, judged token by token by a teacher. No reward is needed.

    python -m recipes.on_policy_distillation_harbor_multi_turn
    python -m recipes.on_policy_distillation_harbor_multi_turn model_name=Qwen/Qwen3-4B teacher_model=Qwen/Qwen3-32B
    python -m recipes.on_policy_distillation_harbor_multi_turn model_name=./student teacher_model=./teacher \\
        dataset=./terminal-bench eval_size=16 eval_every=10 max_turns=20

The student works on Harbor tasks through a bash tool; what it sampled is trained on, what the sandbox said
is not. With `eval_size`, held-out tasks are graded by their own tests now and then. The same command goes on
where it was stopped. Without options: eight small tasks that ship, and two tiny models, of which one knows their
solutions by heart. That shows the machinery, not a model that learns to use a shell.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import chz

from envs.datasets import Cursor, Row
from envs.harbor.dataset import STARTER, HarborDataset
from envs.harbor.env import TOOL_SCHEMA, HarborBashTool, HarborEnvGroupBuilder, with_solution
from envs.rendering import Renderer
from errors import ConfigError
from recipes import setup
from recipes.cli import run_cli
from recipes.config import TrainConfig
from recipes.harbor_setup import (
    HarborOptions,
    check_lengths,
    check_solutions,
    check_task_lines,
    group_builder,
    prepare_engine,
    sandboxes_of,
)
from recipes.training_run import TrainingRun, print_dry_run, train
from tool_use.parsing import make_parser
from training.evaluation import EvalSet
from training.loop import DatasetPlan
from training.trackers import check_trackers


@chz.chz
class Config(HarborOptions, TrainConfig):
    """On-policy distillation of multi-turn episodes with a shell."""

    group_size: int = chz.field(default=4, doc="attempts per task")
    groups_per_batch: int = chz.field(default=8, doc="tasks per step")
    learning_rate: float = chz.field(default=1e-4, doc="AdamW's peak learning rate")
    lora_rank: int = chz.field(default=8, doc="rank of the LoRA adapter; 0 trains all weights")
    teacher_sees_solution: bool = chz.field(
        default=False, doc="the teacher's prompt shows the task's own solution, which the student never sees"
    )
    eval_size: int = chz.field(default=0, doc="tasks to hold out, and grade by their tests every eval_every steps")

    @staticmethod
    def without() -> Mapping[str, str]:
        return {"lmbda": "tasks have no given answers; leave it out"}

    @chz.validate
    def _sizes(self) -> None:
        for name, least in (("group_size", 1), ("groups_per_batch", 1), ("eval_size", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)}: expected {least} or more")
        if self.num_substeps > self.groups_per_batch:
            raise ConfigError(
                f"num_substeps={self.num_substeps}: there are only {self.groups_per_batch} groups to split"
            )
        if self.eval_size and not self.eval_samples:
            raise ConfigError("eval_samples=0: held-out tasks are attempted by sampling. Leave out eval_size instead")


DEMO: dict[str, Any] = {
    "model_name": "embedded:shell-student",
    "teacher_model": "embedded:shell-teacher",
    "objective": "jsd",  # exact reverse KL: the sampled estimate is too noisy for models this small
    "lora_rank": 0,
    "learning_rate": 1e-3,
    "warmup_steps": 5,
    "group_size": 2,
    "max_steps": 30,
    "max_turns": 4,
    "max_tokens": 192,
    "max_trajectory_tokens": 1024,
    "save_every": 10,
    "sampler_slots": 16,
}
"""Defaults where no model is named: two that come with Protege, on the tasks that do."""


def presets(given: dict[str, str]) -> dict[str, Any]:
    named = {"model_name", "teacher_model", "teacher.url"} & given.keys()
    return {} if named or given.get("dataset", STARTER) != STARTER else DEMO


@dataclass(frozen=True)
class Checked:
    data: HarborDataset
    models: setup.CheckedModels


def main(config: Config) -> None:
    checked = check(config)
    run = training_run(config, checked)
    if not config.dry_run:
        prepare_engine(checked.data, config.sandbox_runtime)
        train(config, run)
        return
    data, models = checked.data, checked.models
    task = data.tasks[data.train[0]]
    messages = [{"role": "user", "content": task.instruction}]
    shown = with_solution(task) if config.teacher_sees_solution else messages
    reads = len(models.teacher_renderer.prompt(shown, [TOOL_SCHEMA]))
    print_dry_run(
        config,
        run,
        data=[
            *check_task_lines(config, data),
            f"{config.groups_per_batch} tasks x {config.group_size} attempts a step, {config.max_turns} turns each",
        ],
        prompt=models.student_renderer.prompt(messages, [TOOL_SCHEMA]),
        teacher=f"its prompt has {reads} tokens" + (" (with the solution)" if config.teacher_sees_solution else ""),
    )


def check(config: Config) -> Checked:
    """Every check that needs no weights and no container. Raises `UserError`s."""
    check_trackers([*config.trackers, *(["wandb"] if config.wandb_project else [])])
    data = config.tasks(eval_size=config.eval_size, seed=config.seed)
    models = setup.check_models(config, tools=True)
    # how the student writes its calls must be known before it writes one
    make_parser(models.student_renderer, [HarborBashTool(None, timeout_s=1.0, max_output_bytes=100).bash])  # type: ignore[arg-type]
    check_lengths(config, data, models)
    if config.teacher_sees_solution:
        check_solutions(config, data, models)
    return Checked(data, models)


def log_path(config: Config) -> Path:
    """The run's folder: as given, or named after what is trained, so that the same command finds it again."""
    if config.log_path is not None:
        return Path(config.log_path)
    name = f"{Path(config.dataset).name}-{Path(config.model_name).name}"
    return Path("runs", "on_policy_distillation_harbor-" + re.sub(r"[^\w.-]+", "-", name))


def training_run(config: Config, checked: Checked) -> TrainingRun:
    data, models = checked.data, checked.models
    path = log_path(config)

    def builder(renderer: Renderer, row: Row, count: int, *, rewarded: bool) -> HarborEnvGroupBuilder:
        return group_builder(
            config, data, row, renderer=renderer, teacher=config.teacher_name,
            sandboxes=sandboxes_of(path, config), group_size=count, rewarded=rewarded,
            teacher_sees_solution=config.teacher_sees_solution,
        )  # fmt: skip

    def held_out(renderer: Renderer) -> list[EvalSet]:
        if not data.test:
            return []
        return [EvalSet(data.name, data.rows(data.test), None, lambda row, n: builder(renderer, row, n, rewarded=True))]

    student = models.student_renderer
    plan = DatasetPlan(
        name=data.name,
        cursor=Cursor(data.rows(data.train), seed=config.seed),
        groups_per_batch=config.groups_per_batch,
        builder=lambda row: builder(student, row, config.group_size, rewarded=False),
    )
    return TrainingRun(
        path=path,
        models=models,
        plans=[plan],
        eval_sets=held_out(student),
        teacher_sets={config.teacher_name: held_out(models.teacher_renderer)},
        steps_per_epoch=-(-len(data.train) // config.groups_per_batch),
    )


if __name__ == "__main__":
    run_cli(main, Config, presets=presets, argv=sys.argv[1:])
