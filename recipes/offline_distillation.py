"""Train a student on what a teacher said once: from a file of `recipes.capture_teacher`, the teacher is never loaded.

    .venv/bin/python -m recipes.offline_distillation model_name=./student capture_path=teacher_capture.jsonl
    .venv/bin/python -m recipes.offline_distillation model_name=./student objective=jsd beta=0.5 top_k=8

Nothing is sampled: the student learns at the positions of given sequences. Stop it whenever you like; the same
command goes on where it stopped. Measure the result with `recipes.evaluate`.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import chz

from envs.datasets import Cursor, Row
from envs.given import GivenGroupBuilder
from envs.rendering import tokenizer_fingerprint
from errors import ConfigError, DataError, TokenizerMismatchError
from models.loading import load_config
from models.teacher_view import ViewMaker
from recipes import setup
from recipes.cli import run_cli
from recipes.config import check_objective_options
from recipes.memory import memory_lines
from recipes.student_config import StudentConfig, check_at_least
from recipes.training_run import TrainingRun, train
from training.capture import Capture, CapturedScorer, CaptureHeader
from training.capture_files import read_capture, read_header
from training.collect import Teacher
from training.distribution_losses import JSD, ClassicKD, Support, Tail, TopKForwardKL
from training.loop import DatasetPlan, LoopConfig
from training.objectives import Objective
from training.trackers import check_trackers

logger = logging.getLogger(__name__)


@chz.chz
class Config(StudentConfig):
    """Distillation from a capture file."""

    capture_path: str = chz.field(default="teacher_capture.jsonl", doc="a complete file of recipes.capture_teacher")
    objective: Literal["topk_forward_kl", "jsd", "kd"] = chz.field(
        default="topk_forward_kl",
        doc="topk_forward_kl: cross-entropy against the teacher's top_k tokens; jsd: divergence on a support; "
        "kd: cross-entropy with the given token and forward KL",
    )
    beta: float = chz.field(default=1.0, doc="jsd: 0 is forward KL, 1 is reverse KL, between them Jensen-Shannon")
    support: Support = chz.field(
        default="teacher_topk", doc="jsd: teacher_topk or sampled; what else there is needs a teacher that is loaded"
    )
    top_k: int | None = chz.field(
        default=None, doc="the teacher's likeliest tokens to use; default: all that there are"
    )
    tail: Tail | None = chz.field(
        default=None, doc="jsd: the tokens outside are one more outcome (bucket, the default) or left out"
    )
    loss_temperature: float | None = chz.field(default=None, doc="of both models in the loss; default: the capture's")
    alpha: float = chz.field(default=0.5, doc="kd: share of the KL, the rest is cross-entropy with the given token")
    groups_per_batch: int = chz.field(default=64, doc="examples per step")

    @staticmethod
    def without() -> Mapping[str, str]:
        why = "nothing is sampled here; leave it out, and measure with recipes.evaluate"
        return dict.fromkeys(("sampler", "sampler_slots", "max_tokens", "eval_every"), why)

    @chz.validate
    def _check(self) -> None:
        check_objective_options(self)
        check_at_least(self, {"groups_per_batch": 1, "top_k": 1})
        if self.support not in ("teacher_topk", "sampled"):
            raise ConfigError(
                f"support={self.support} needs the teacher's whole distribution, of which a capture holds the top k. "
                "Possible here: support=teacher_topk, support=sampled, and objective=topk_forward_kl"
            )
        if self.objective == "kd" and self.support == "sampled":
            raise ConfigError("support=sampled: objective=kd takes the teacher's top k; leave support out")
        self.make_objective(captured=self.top_k or 2)

    def make_objective(self, captured: int) -> Objective:
        """For a file that holds the top `captured`. Raises `ConfigError`."""
        if self.objective == "jsd" and self.support == "sampled":
            return JSD(self.beta, "sampled", self.top_k, self.tail, self.loss_temperature)
        top_k = self.top_k or captured
        if top_k > captured:
            raise ConfigError(f"top_k={top_k}: {self.capture_path} holds the teacher's top {captured}")
        if self.objective == "kd":
            return ClassicKD(self.alpha, JSD(0.0, self.support, top_k, self.tail, self.loss_temperature))
        if self.objective == "jsd":
            return JSD(self.beta, "teacher_topk", top_k, self.tail, self.loss_temperature)
        return TopKForwardKL(top_k, self.loss_temperature)

    def comparison_temperature(self) -> float:
        """The one that the capture was made at. Raises `DataError`."""
        return read_header(self.capture_path).temperature

    def loop(self, steps_of_one_epoch: int) -> LoopConfig:
        return replace(super().loop(steps_of_one_epoch), temperature=self.comparison_temperature())


def main(config: Config) -> None:
    checked = check(config)
    if config.dry_run:
        print(f"{config.capture_path}: {len(checked.capture.examples)} examples of {checked.capture.header.teacher}")
        print(f"objective: {checked.objective}")
        print(f"{config.loop(_steps(config, checked)).max_steps} steps of {config.groups_per_batch} examples")
        print("\n".join(memory_lines(config, checked.models)))
        print("dry run: no weights were loaded, no run was started")
        return
    train(config, training_run(config, checked))


# --- what is checked before anything is loaded


@dataclass(frozen=True)
class Checked:
    capture: Capture
    models: setup.CheckedModels
    objective: Objective


def check(config: Config) -> Checked:
    """Every check that needs no weights. Raises `UserError`s."""
    check_trackers([*config.trackers, *(["wandb"] if config.wandb_project else [])])
    capture = read_capture(config.capture_path)
    objective = config.make_objective(captured=capture.header.top_k)
    models = setup.check_models(config)
    _check_tokenizer(config, capture.header, models)
    size = load_config(models.student).get_text_config().vocab_size
    largest = max(int(example.input_ids.max()) for example in capture.examples)
    if largest >= size:
        raise DataError(f"{config.capture_path}: holds id {largest}, and the student has {size} ids. Capture anew")
    longest = max(capture.examples, key=lambda example: len(example.input_ids))
    if models.context_length is not None and len(longest.input_ids) > models.context_length:
        raise DataError(
            f"{config.capture_path}: {longest.row_id} has {len(longest.input_ids)} tokens, the student's context is "
            f"{models.context_length}. Capture shorter rows"
        )
    return Checked(capture, models, objective)


def _check_tokenizer(config: Config, header: CaptureHeader, models: setup.CheckedModels) -> None:
    student = models.student_renderer
    if tokenizer_fingerprint(student.tokenizer) != header.tokenizer:
        raise TokenizerMismatchError(
            f"{config.capture_path} was captured of {header.teacher} with another tokenizer than the student's "
            f"({config.model_name}): its ids mean something else there. Use a student with that tokenizer, or capture "
            f"anew with model_name={config.model_name}"
        )
    if student.fingerprint != header.format:
        logger.warning(
            "%s is written in another chat format than the student's own: it will learn that format. "
            "To keep its own, capture with its model_name, system_prompt and chat_template_kwargs",
            config.capture_path,
        )


def log_path(config: Config) -> Path:
    """The run's folder: as given, or named after what is trained, so that the same command finds it again."""
    if config.log_path is not None:
        return Path(config.log_path)
    name = f"{Path(config.capture_path).stem}-{Path(config.model_name).name}"
    return Path("runs", "offline_distillation-" + re.sub(r"[^\w.-]+", "-", name))


# --- the run


def _steps(config: Config, checked: Checked) -> int:
    return -(-len(checked.capture.examples) // config.groups_per_batch)


def plan(config: Config, capture: Capture) -> DatasetPlan:
    """Every example as a row, and its sequence as the row's one episode."""
    header = capture.header
    examples = {example.row_id: example for example in capture.examples}

    def builder(row: Row) -> GivenGroupBuilder:
        episode = examples[row.row_id].episode(header.dataset, header.teacher)
        return GivenGroupBuilder(header.dataset, row.row_id, header.teacher, None, (episode,))

    rows = [Row(row_id, ()) for row_id in examples]  # only names: the sequences are there already
    return DatasetPlan(header.dataset, Cursor(rows, seed=config.seed), config.groups_per_batch, builder)


def teachers(capture: Capture, models: setup.CheckedModels) -> dict[str, Teacher]:
    """The file in the teacher's place. It reads what the student reads, id by id."""
    views = ViewMaker(models.student_renderer, models.student_renderer)
    return {capture.header.teacher: Teacher(CapturedScorer(capture), views)}


def training_run(config: Config, checked: Checked) -> TrainingRun:
    return TrainingRun(
        path=log_path(config),
        models=checked.models,
        plans=[plan(config, checked.capture)],
        eval_sets=[],
        teacher_sets={},
        steps_per_epoch=_steps(config, checked),
        objective=checked.objective,
        captured=teachers(checked.capture, checked.models),
        identity={"capture": asdict(checked.capture.header)},  # another file is another run
    )


if __name__ == "__main__":
    run_cli(main, Config, argv=sys.argv[1:])
