"""Distil on environments of your own: give rows, and how a row becomes a group of attempts.

    from recipes.tool_env import Config, train

    train(Config(model_name=…, teacher_model=…), rows, lambda row, renderer: ToolEnvGroupBuilder(…))

`docs/write-a-tool-environment.md` does it from beginning to end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import chz

from envs.datasets import Cursor, Row
from envs.rendering import Renderer
from envs.types import EnvGroupBuilder, Hinted, hint_roles
from errors import ConfigError
from recipes import setup, training_run
from recipes.config import TrainConfig
from recipes.training_run import TrainingRun
from tool_use.parsing import make_parser
from training.loop import DatasetPlan
from training.trackers import check_trackers

MakeGroup = Callable[[Row, Renderer], EnvGroupBuilder]
"""Called for every row that is drawn, with the student's renderer."""


@chz.chz
class Config(TrainConfig):
    """On-policy distillation in environments that a program defines."""

    name: str = chz.field(default="tools", doc="the dataset's name in metrics and episodes")
    groups_per_batch: int = chz.field(default=8, doc="rows per step")

    @staticmethod
    def without() -> Mapping[str, str]:
        return {
            "lmbda": "environments have no given answers; leave it out",
            **dict.fromkeys(
                ("eval_every", "eval_samples", "eval_teacher"), "there is no evaluation here; leave it out"
            ),
        }

    @chz.validate
    def _sizes(self) -> None:
        if self.groups_per_batch < 1:
            raise ConfigError(f"groups_per_batch={self.groups_per_batch}: expected 1 or more")
        if self.num_substeps > self.groups_per_batch:
            raise ConfigError(
                f"num_substeps={self.num_substeps}: there are only {self.groups_per_batch} groups to split"
            )


def train(config: Config, rows: Sequence[Row], make_group: MakeGroup) -> Path:
    """Train, or go on where an earlier call stopped; returns the run's folder. There is no evaluation.

    `make_group` decides the group's size, its tools and its limits. Its `dataset` and `teacher` must be
    `config.name` and `config.teacher_name`. Raises `UserError`s before anything is loaded, where it can.
    """
    check_trackers([*config.trackers, *(["wandb"] if config.wandb_project else [])])
    cursor = Cursor(rows, seed=config.seed)
    models = setup.check_models(config)
    student = models.student_renderer
    make_parser(student, [])  # which tools it will be is not known yet; that it can have some is
    first = make_group(rows[0], student)
    of_rows = [row.teacher_hints for row in rows] + [first.teacher_hints if isinstance(first, Hinted) else ()]
    roles = {roles for hints in of_rows for roles in hint_roles(hints)}
    models.teacher_renderer.check(tools=True, hints=roles)
    if (first.dataset, first.teacher) != (config.name, config.teacher_name):
        raise ConfigError(
            f"the group of row {first.row_id!r} has dataset={first.dataset!r} and teacher={first.teacher!r}: expected "
            f"config.name={config.name!r} and config.teacher_name={config.teacher_name!r}"
        )
    path = Path(config.log_path or f"runs/tool_env-{config.name}-{Path(config.model_name).name}")
    plan = DatasetPlan(config.name, cursor, config.groups_per_batch, lambda row: make_group(row, student))
    steps = -(-len(rows) // config.groups_per_batch)
    training_run.train(config, TrainingRun(path, models, [plan], [], {}, steps_per_epoch=steps))
    return path
