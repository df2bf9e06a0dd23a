"""Train alone, on episodes that a run has saved: nothing is sampled. To look at training, or try another objective.

    python -m recipes.replay model_name=./student teacher_model=./teacher saved=runs/mine
    python -m recipes.replay model_name=./student teacher_model=./teacher saved=runs/mine objective=jsd max_steps=1

Step by step as the run had them, the teacher scores its episodes anew. With the run's own options of training this
trains what the run trained. (The reverse, sampling alone, is `rollouts_only=True` of any on-policy recipe.)
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import chz

from envs.datasets import Cursor, Row
from envs.given import GivenEpisode, GivenGroupBuilder
from envs.types import Episode
from errors import DataError
from recipes import setup
from recipes.cli import run_cli
from recipes.config import OF_GIVEN_ANSWERS, TrainConfig
from recipes.training_run import TrainingRun, print_dry_run, train
from training.loop import DatasetPlan
from training.saved_episodes import read_saved_episodes
from training.trackers import check_trackers

NAME = "replay"


@chz.chz
class Config(TrainConfig):
    """Training on the episodes of another run."""

    saved: str = chz.field(doc="a run's folder, or one of its files episodes/step_*.jsonl")

    @staticmethod
    def without() -> Mapping[str, str]:
        nothing = "a replay samples nothing: leave it out"
        no_rows = "a replay has no held-out rows: leave it out, and evaluate its checkpoints with recipes.evaluate"
        return {
            "num_substeps": "a replay makes one update of each saved step: leave it out",
            "lmbda": "a replay trains on what is saved, and draws nothing: leave it out",
            **dict.fromkeys(("rollouts_only", "sampler", "sampler_slots", "max_tokens"), nothing),
            **dict.fromkeys(("eval_every", "eval_samples", "eval_teacher"), no_rows),
        }

    def _check_lmbda(self) -> None:
        """What is saved decides which objectives there are: `check` reads it."""


@dataclass(frozen=True)
class Checked:
    steps: dict[str, list[Episode]]  # by the name of the file that one step left
    models: setup.CheckedModels


def main(config: Config) -> None:
    checked = check(config)
    run = training_run(config, checked)
    if not config.dry_run:
        train(config, run)
        return
    first = next(iter(checked.steps.values()))[0]
    print_dry_run(
        config,
        run,
        data=[f"{step}: {len(episodes)} episodes" for step, episodes in checked.steps.items()],
        prompt=first.token_ids[: first.turns[0].start].tolist(),
        teacher=f"it scores {sum(len(episodes) for episodes in checked.steps.values())} saved episodes",
        answer=f"and {first.num_sampled} tokens that were sampled",
    )


def check(config: Config) -> Checked:
    """Every check that needs no weights. Raises `UserError`s."""
    check_trackers([*config.trackers, *(["wandb"] if config.wandb_project else [])])
    saved = read_saved_episodes(config.saved)
    found = [replace(episode, teacher=config.teacher_name) for episode in saved.episodes]
    given = [isinstance(episode, GivenEpisode) for episode in found]
    if config.objective == "reverse_kl" and any(given):
        raise DataError(
            f"{config.saved}: has given answers, on which objective=reverse_kl has no meaning. "
            "Use objective=jsd or objective=topk_forward_kl"
        )
    if config.objective in OF_GIVEN_ANSWERS and not all(given):
        raise DataError(
            f"{config.saved}: has episodes that a student sampled, and objective={config.objective} learns from given "
            "answers. Use objective=jsd, or replay a run with lmbda=0"
        )
    models = setup.check_models(config, tools=saved.several_turns)
    saved.check_spelling(config.saved, models.student_renderer.tokenizer, config.model_name)
    longest = max(len(episode) for episode in found)
    if models.context_length is not None and longest > models.context_length:
        raise DataError(f"{config.saved}: an episode has {longest} tokens; {models.context_limit}")
    steps = {name: list(episodes) for name, episodes in groupby(found, key=lambda e: e.row_id.rpartition(":")[0])}
    return Checked(steps, models)


def training_run(config: Config, checked: Checked) -> TrainingRun:
    def builder(row: Row) -> GivenGroupBuilder:
        return GivenGroupBuilder(NAME, row.row_id, config.teacher_name, None, tuple(checked.steps[row.row_id]))

    rows = [Row(step, ()) for step in checked.steps]
    plan = DatasetPlan(NAME, Cursor(rows, seed=config.seed, shuffle=False), 1, builder)
    path = Path(config.log_path or Path("runs", f"replay-{Path(config.saved).stem}"))
    return TrainingRun(path, checked.models, [plan], [], {}, steps_per_epoch=len(rows))


if __name__ == "__main__":
    run_cli(main, Config, argv=sys.argv[1:])
