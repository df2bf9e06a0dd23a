"""Train a student on answers that somebody else has written: supervised learning on given completions.

    python -m recipes.off_policy_reasoning model_name=Qwen/Qwen3-8B-Base learning_rate=1e-3 batch_size=128 lora_rank=128
    python -m recipes.off_policy_reasoning dataset=answers.jsonl model_name=./student

A row's prompt and completion are written in the student's own chat format. The loss is on the completion and on
the token that ends its turn. Nothing is sampled but, in evaluation, answers to rows that say what to expect.
The same command goes on where it was stopped.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import chz

from envs.datasets import Cursor, Dataset, Row
from envs.given import GivenEpisode, GivenGroupBuilder, answered, given_answer
from envs.sources import NAMES, load_dataset_rows, locate
from errors import ConfigError
from recipes import setup
from recipes.cli import run_cli
from recipes.on_policy_distillation import eval_size_of_file
from recipes.student_config import StudentConfig, check_at_least
from recipes.training_run import TrainingRun, print_dry_run, train
from training.loop import DatasetPlan, LoopConfig
from training.objectives import SFT
from training.trackers import check_trackers

GIVEN = "given"
"""Who is named as the teacher of an answer that a dataset gives."""


@chz.chz
class Config(StudentConfig):
    """Supervised learning on given completions."""

    dataset: str = chz.field(
        default="openthoughts3",
        doc="openthoughts3, arithmetic, tulu3, or a path to JSONL: `messages` and `completion`",
    )
    dataset_path: str | None = chz.field(default=None, doc="a local copy of the named dataset: file or folder")
    max_rows: int | None = chz.field(default=None, doc="use at most this many training rows")
    batch_size: int = chz.field(default=128, doc="examples per step")
    max_length: int = chz.field(
        default=16384, doc="longest example, prompt and answer, in tokens; answers are cut off there"
    )
    long_prompts: Literal["error", "drop"] = chz.field(
        default="error", doc="what to do with prompts that leave no room in max_length"
    )
    eval_size: int = chz.field(default=64, doc="held-out rows to evaluate on; 0: no evaluation")

    @chz.validate
    def _sizes(self) -> None:
        check_at_least(self, {"batch_size": 1, "max_length": 2, "eval_size": 0, "max_rows": 1})

    def loop(self, steps_of_one_epoch: int) -> LoopConfig:
        return replace(super().loop(steps_of_one_epoch), eval_samples=0)  # greedy answers are all that is sampled


PRESETS: dict[str, dict[str, Any]] = {
    "openthoughts3": {
        "model_name": "Qwen/Qwen3-8B-Base",
        "lora_rank": 128,
        "learning_rate": 1e-3,
        "max_rows": 400_000,  # they are kept in memory, 30 kB each
        "max_steps": 3000,
        "eval_every": 500,
        "save_every": 100,
        "long_prompts": "drop",
    },
    "arithmetic": {
        "model_name": "embedded:student",
        "learning_rate": 1e-3,
        "max_steps": 100,
        "max_tokens": 24,
        "max_length": 64,
        "eval_every": 50,
        "sampler_slots": 64,
        "micro_batch_tokens": 4096,
    },
}
"""Defaults that a dataset brings with it. Anything given on the command line wins."""


def presets(given: dict[str, str]) -> dict[str, Any]:
    dataset = given.get("dataset", "openthoughts3")
    if dataset in PRESETS:
        return PRESETS[dataset]
    locate(dataset, given.get("dataset_path"))  # a typo is named here, not the options that it did not bring
    size = eval_size_of_file(dataset)
    return {} if size is None else {"eval_size": size}


# --- what is checked before anything is loaded


@dataclass(frozen=True)
class Checked:
    data: Dataset
    models: setup.CheckedModels
    max_length: int

    def episode(self, row: Row) -> GivenEpisode:
        return given_answer(
            row, self.models.student_renderer, dataset=self.data.name, teacher=GIVEN, max_length=self.max_length
        )

    def builder(self, row: Row) -> GivenGroupBuilder:
        return GivenGroupBuilder(self.data.name, row.row_id, GIVEN, row.teacher_messages, (self.episode(row),))


def check(config: Config) -> Checked:
    """Every check that needs no weights. Raises `UserError`s."""
    check_trackers([*config.trackers, *(["wandb"] if config.wandb_project else [])])
    data = load_dataset_rows(
        config.dataset, config.dataset_path, eval_size=config.eval_size, seed=config.seed, max_rows=config.max_rows
    )
    strict = config.dataset not in NAMES  # a user's own file is not thinned out without a word
    why = "which is what there is to learn"
    data = replace(
        data,
        train=answered(data.train, strict=strict, why=why),
        test=answered(data.test, strict=strict, why=why) if data.test else [],
    )
    models = setup.check_models(config)
    longest = min(config.max_length, models.context_length or config.max_length)
    data = setup.check_prompt_lengths(
        data,
        models,
        teacher_of=None,
        max_tokens=None,
        asked=(config.max_length - 1, f"max_length={config.max_length}"),
        drop=config.long_prompts == "drop",
    )
    if any(row.expected_answer is not None for row in data.test):
        _check_generation(config, data, models)
    return Checked(data, models, longest)


def _check_generation(config: Config, data: Dataset, models: setup.CheckedModels) -> None:
    """Held-out rows with an expected answer are answered: there must be room for it."""
    if models.context_length is None:
        return
    longest = max(len(models.student_renderer.prompt(row.messages)) for row in data.test)
    if longest + config.max_tokens > models.context_length:
        raise ConfigError(
            f"max_tokens={config.max_tokens}: the student's context is {models.context_length} tokens, and held-out "
            f"prompts have up to {longest}. Lower it, or set eval_size=0"
        )


def main(config: Config) -> None:
    checked = check(config)
    run = training_run(config, checked)
    if not config.dry_run:
        train(config, run)
        return
    data, first = checked.data, checked.episode(checked.data.train[0])
    print_dry_run(
        config,
        run,
        data=[f"{data.name}: {len(data.train)} examples, {len(data.test)} held out"],
        prompt=first.token_ids[~first.sampled].tolist(),
        answer=f"and {first.num_sampled} tokens of the given answer",
    )


def log_path(config: Config) -> Path:
    """The run's folder: as given, or named after what is trained, so that the same command finds it again."""
    if config.log_path is not None:
        return Path(config.log_path)
    name = f"{Path(config.dataset).stem}-{Path(config.model_name).name}"
    return Path("runs", "off_policy_reasoning-" + re.sub(r"[^\w.-]+", "-", name))


def training_run(config: Config, checked: Checked) -> TrainingRun:
    data, models = checked.data, checked.models
    held_out = setup.eval_set(data, models.student_renderer, lambda row: GIVEN, config.max_tokens)
    return TrainingRun(
        path=log_path(config),
        models=models,
        plans=[DatasetPlan(data.name, Cursor(data.train, seed=config.seed), config.batch_size, checked.builder)],
        eval_sets=[replace(held_out, answers=[checked.episode(row) for row in data.test])] if data.test else [],
        teacher_sets={},
        steps_per_epoch=-(-len(data.train) // config.batch_size),
        objective=SFT(),
    )


if __name__ == "__main__":
    run_cli(main, Config, presets=presets, argv=sys.argv[1:])
