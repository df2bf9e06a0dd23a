"""Evaluate any model on held-out rows: accuracy with its error, length, truncation, and the KL to a teacher.

    python -m recipes.evaluate model_name=embedded:student dataset=arithmetic
    python -m recipes.evaluate model_name=./run/checkpoints/step_000100 dataset=gsm8k teacher_model=./teacher
    python -m recipes.evaluate model_name=./run/checkpoints/step_000100 dataset=gsm8k teacher.url=http://host:8000
    python -m recipes.evaluate model_name=./run/checkpoints/step_000100 dataset=gsm8k sampler=vllm

Prints a table, and with `output_path=` writes the numbers as JSON.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import chz

from envs.datasets import Dataset
from envs.sources import load_eval_rows
from errors import ConfigError, DataError
from models.device_thread import compute
from recipes import engines, samplers, setup
from recipes.cli import run_cli
from recipes.config import TrainConfig
from recipes.sampler_config import SamplerConfig, sampler_field
from recipes.student_config import check_at_least
from recipes.teacher_options import OneTeacher
from recipes.teachers import refuse_ema
from training import signals
from training.atomic import dumps, write_atomic
from training.evaluation import Judge, evaluate


@chz.chz
class Config(OneTeacher):
    """One model on held-out rows, and its reverse KL to a teacher (on a plain vLLM server: of sampled tokens)."""

    model_name: str = chz.field(doc="hub id, local folder (a checkpoint too) or .gguf file")
    load_checkpoint_path: str | None = chz.field(default=None, doc="weights to use instead: HF folder or adapter")
    teacher_alignment: Literal["ids", "bytes"] = chz.field(
        default="ids", doc="bytes: the teacher may have another tokenizer, and spans of text are compared"
    )
    dataset: str = chz.field(default="arithmetic", doc="arithmetic, deepmath, tulu3, gsm8k, or a path to JSONL")
    dataset_path: str | None = chz.field(default=None, doc="a local copy of the named dataset: file or folder")
    eval_size: int = chz.field(
        default=500, doc="at most this many rows: of the test split, or of all that a JSONL file has"
    )
    samples: int = chz.field(default=1, doc="sampled attempts per row; 0: greedy only")
    temperature: float = chz.field(default=1.0, doc="of the sampled attempts")
    max_tokens: int = chz.field(default=512, doc="longest answer, in tokens")
    system_prompt: str | None = chz.field(default=None, doc="system message for rows that have none")
    chat_template_kwargs: str = chz.field(default="{}", doc="JSON object for the chat template")
    sampler: SamplerConfig = sampler_field()
    sampler_slots: int = chz.field(default=64, doc="largest batch of concurrent generation")
    device: str = chz.field(default="auto", doc="auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16"] = chz.field(default="auto", doc="of the computation")
    seed: int = 0
    output_path: str | None = chz.field(default=None, doc="write the numbers to this JSON file")

    @chz.validate
    def _check(self) -> None:
        check_at_least(self, {"eval_size": 1, "samples": 0})
        self.check_teacher()
        if self.has_teacher and self.samples == 0:
            raise ConfigError("the KL to a teacher is measured on sampled attempts: samples=0 leaves none")
        refuse_ema(self.teacher_model or self.model_name)
        self.as_training()

    def as_training(self) -> TrainConfig:
        """The same models as a training run would see them, which is how they are loaded and checked."""
        return TrainConfig(
            model_name=self.model_name,
            load_checkpoint_path=self.load_checkpoint_path,
            teacher_model=self.teacher_model if self.has_teacher else self.model_name,
            teacher_checkpoint=self.teacher_checkpoint if self.has_teacher else self.load_checkpoint_path,
            teacher_alignment=self.teacher_alignment,
            teacher=self.teacher,
            teacher_system_prompt=self.teacher_system_prompt,
            teacher_chat_template_kwargs=self.teacher_chat_template_kwargs,
            system_prompt=self.system_prompt,
            chat_template_kwargs=self.chat_template_kwargs,
            temperature=self.temperature,
            max_tokens=self.max_tokens,
            sampler=self.sampler,
            sampler_slots=self.sampler_slots,
            device=self.device,
            dtype=self.dtype,
            seed=self.seed,
        )


def main(config: Config) -> None:
    if config.output_path is not None and not Path(config.output_path).absolute().parent.is_dir():
        raise ConfigError(f"output_path={config.output_path}: its folder does not exist")
    if config.output_path is not None and Path(config.output_path).is_dir():
        raise ConfigError(f"output_path={config.output_path} is a folder: expected the name of a file")
    data = load_eval_rows(config.dataset, config.dataset_path, eval_size=config.eval_size, seed=config.seed)
    if not data.test:
        raise DataError(f"{data.name} has no held-out rows")
    data = replace(data, train=[])  # whose lengths are nobody's concern here
    training = config.as_training()
    models = setup.check_models(training)
    data = setup.check_prompt_lengths(
        data,
        models,
        teacher_of=lambda row: training.teacher_name,
        max_tokens=config.max_tokens,
        drop=None,
    )
    metrics = signals.run(_evaluate, config, data, models, training)
    for name, value in metrics.items():
        if not name.endswith("_se"):
            error = metrics.get(f"{name}_se")
            print(f"{name.removeprefix('eval/'):28} {value:.4f}" + (f" ± {error:.4f}" if error is not None else ""))
    if config.output_path is not None:
        numbers = dumps({**chz.asdict(config), **metrics}, indent=2)
        try:
            write_atomic(Path(config.output_path), numbers + "\n")
        except OSError as error:
            raise ConfigError(f"output_path={config.output_path}: cannot be written ({error.strerror})") from error


async def _evaluate(
    config: Config, data: Dataset, models: setup.CheckedModels, training: TrainConfig
) -> dict[str, float]:
    student = await compute(engines.load_lm, training, models, models.student, models.compute_dtype)
    teachers = {training.teacher_name: student}
    if config.teacher.url:
        teachers = {}
    elif config.teacher_model is not None:
        lm = await compute(engines.load_teacher, training, models, models.only_teacher.source)
        teachers = {config.teacher_model: lm}
    parts = engines.assemble(
        training, models, student, teachers, folder=Path(config.output_path or "-").absolute().parent
    )
    rows = setup.eval_set(data, models.student_renderer, lambda row: training.teacher_name, config.max_tokens)
    judge = Judge(parts.learner, parts.teachers, parts.exact) if config.has_teacher else None
    async with samplers.sampling(parts.sampler, student) as sampler:
        return await evaluate(
            rows,
            sampler,
            models.student_renderer,
            temperature=config.temperature,
            samples=config.samples,
            seed=config.seed,
            judge=judge,
        )


def presets(given: dict[str, str]) -> dict[str, Any]:
    """The embedded models have a context of 128 tokens."""
    return {"max_tokens": 24} if given.get("dataset", "arithmetic") == "arithmetic" else {}


if __name__ == "__main__":
    run_cli(main, Config, presets=presets, argv=sys.argv[1:])
