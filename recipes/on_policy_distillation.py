"""Train a student on its own answers, judged token by token by a teacher.

    python -m recipes.on_policy_distillation
    python -m recipes.on_policy_distillation dataset=deepmath lora_rank=128 wandb_project=mine
    python -m recipes.on_policy_distillation dataset=prompts.jsonl model_name=./student teacher_model=./teacher

Without options: two-digit addition with two tiny embedded models, on any machine in minutes.
Stop it whenever you like; the same command goes on where it stopped.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import anyio
import chz
from rich.console import Console
from rich.text import Text

from envs.datasets import Cursor, Dataset
from envs.sources import load_dataset_rows, locate
from errors import ConfigError, DataError
from models.checks import probe_scorer, probe_view
from models.device_thread import compute_blocking
from models.transformers_sampler import TransformersSampler
from recipes import setup
from recipes.cli import run_cli
from recipes.config import TrainConfig
from training.evaluation import evaluate
from training.loop import DatasetPlan, Loop
from training.progress import Progress
from training.report import write_report
from training.run_dir import RunDir, open_run_dir
from training.trackers import check_trackers, open_trackers


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
        return PRESETS[dataset]
    locate(dataset, given.get("dataset_path"))  # a typo is named here, not the options that it did not bring
    if not Path(dataset).is_file():
        return {}
    with open(dataset, "rb") as lines:  # a short file is not spent on evaluation
        return {"eval_size": min(64, sum(1 for _ in lines) // 10)}


def main(config: Config) -> None:
    checked = check(config)
    if config.dry_run:
        for line in dry_run_lines(config, checked):
            Console(soft_wrap=True).print(line)
        return
    run_dir = open_run_dir(
        log_path(config),
        chz.asdict(config),
        config.behavior_if_log_dir_exists,
        may_differ=config.may_differ_on_resume(),
    )
    with run_dir:
        try:
            parts = compute_blocking(setup.build_engines, config, checked.models, _resume_folder(run_dir))
            anyio.run(_run, config, checked, parts, run_dir)
        except BaseException:
            run_dir.discard_if_empty()  # an empty folder would only refuse the corrected command
            raise


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
    for row in (*data.train, *data.test):
        if row.teacher not in (None, config.teacher_model):
            raise DataError(
                f"{row.row_id}: its teacher is {row.teacher!r}, this run has only {config.teacher_model!r}. "
                "Remove the key, or give the rows of each teacher to a run of their own"
            )
    models = setup.check_models(config)
    data = setup.check_prompt_lengths(
        data,
        models,
        max_tokens=config.max_tokens,
        max_prompt_tokens=config.max_prompt_tokens,
        drop=config.long_prompts == "drop",
    )
    return Checked(data=data, models=models)


def dry_run_lines(config: Config, checked: Checked) -> list[str | Text]:
    """The resolved configuration, the first prompt by mask, the teacher's alignment, and memory."""
    data, models = checked.data, checked.models
    row = data.train[0]
    ids = models.student_renderer.prompt(row.messages)
    tokens = models.student_renderer.tokenizer.decode(ids)
    prompt = Text.assemble((tokens, "dim"), (" … what the student samples", "bold green"))
    teacher = models.teacher_renderer.prompt(row.teacher_messages or row.messages)
    steps = config.loop(_steps_per_epoch(config, data)).max_steps
    return [
        Text("configuration", "bold"),
        *(
            Text(f"  {name}={value}")
            for name, value in chz.beta_to_blueprint_values(config).items()
            if not isinstance(value, type)
        ),
        Text("data", "bold"),
        Text(f"  {data.name}: {len(data.train)} training rows, {len(data.test)} held out, graded as {data.grader}"),
        Text(f"  {steps} steps of {config.groups_per_batch} prompts x {config.group_size} attempts"),
        Text(f"first prompt, {len(ids)} tokens (dim: not trained on, green: trained on)", "bold"),
        prompt,
        Text("teachers", "bold"),
        *(Text(f"  {line}") for line in models.report.lines()),
        Text(f"  its prompt has {len(teacher)} tokens" + (" (privileged)" if row.teacher_messages else "")),
        Text("memory", "bold"),
        *(Text(f"  {line}") for line in setup.memory_lines(config, models)),
        Text("dry run: no weights were loaded, no run was started", "bold"),
    ]


def log_path(config: Config) -> Path:
    """The run's folder: as given, or named after what is trained, so that the same command finds it again."""
    if config.log_path is not None:
        return Path(config.log_path)
    name = f"{Path(config.dataset).stem}-{Path(config.model_name).name}"
    return Path("runs", "on_policy_distillation-" + re.sub(r"[^\w.-]+", "-", name))


def _steps_per_epoch(config: Config, data: Dataset) -> int:
    return -(-len(data.train) // config.groups_per_batch)


def _resume_folder(run_dir: RunDir) -> Path | None:
    latest = run_dir.latest_checkpoint() if run_dir.resumed else None
    run_dir.rewind(latest[0] if latest else -1)
    return latest[1] if latest else None


# --- the run


async def _run(config: Config, checked: Checked, parts: setup.Engines, run_dir: RunDir) -> None:
    data, renderer = checked.data, checked.models.student_renderer
    await probe_scorer(parts.teacher.scorer, probe_view(checked.models.views))
    name = config.teacher_model
    eval_sets = [setup.eval_set(data, renderer, name, config.max_tokens)] if data.test else []
    loop_config = config.loop(_steps_per_epoch(config, data))
    with Progress(loop_config.max_steps, str(run_dir.path)) as progress:
        loop = Loop(
            config=loop_config,
            plans=[
                DatasetPlan(
                    name=data.name,
                    cursor=Cursor(data.train, seed=config.seed),
                    groups_per_batch=config.groups_per_batch,
                    builder=setup.group_builder(
                        renderer, data.name, name, group_size=config.group_size, max_tokens=config.max_tokens
                    ),
                )
            ],
            eval_sets=eval_sets,
            sampler=parts.sampler,
            teachers={name: parts.teacher},
            learner=parts.learner,
            objective=config.make_objective(),
            renderer=renderer,
            run_dir=run_dir,
            trackers=open_trackers(
                config.trackers, run_dir.path, chz.asdict(config), wandb_project=config.wandb_project
            ),
            progress=progress,
        )
        if (latest := run_dir.latest_checkpoint()) is not None:
            loop.restore(latest[1])
            progress.message(f"resumed at step {loop.step} from {latest[1]}")
        if config.eval_teacher and eval_sets and not _has(run_dir, "eval/teacher_accuracy"):
            await _evaluate_teacher(config, checked, parts, loop)
        try:
            await loop.run()
        finally:
            loop.trackers.close()
    write_report(run_dir.path)
    print_summary(run_dir)


async def _evaluate_teacher(config: Config, checked: Checked, parts: setup.Engines, loop: Loop) -> None:
    """The teacher's own accuracy: what is within the student's reach."""
    renderer = checked.models.teacher_renderer
    sampler = TransformersSampler(parts.teacher_lm, renderer.tokenizer, slots=config.sampler_slots)
    rows = setup.eval_set(checked.data, renderer, config.teacher_model, config.max_tokens)
    async with sampler:
        found = await evaluate(rows, sampler, renderer, temperature=config.temperature, samples=0, seed=config.seed)
    row = {name.replace("eval/", "eval/teacher_"): value for name, value in found.items()}
    if row:  # rows without an expected answer leave nothing to measure
        loop.run_dir.append_metrics({"step": loop.step, **row})


def _has(run_dir: RunDir, name: str) -> bool:
    return any(name in row for row in run_dir.read_metrics())


def print_summary(run_dir: RunDir) -> None:
    """Before and after on the held-out rows, and where everything is."""
    rows = run_dir.read_metrics()
    evaluations = [row for row in rows if any(name.startswith("eval/") for name in row)]
    teacher = next((row["eval/teacher_accuracy"] for row in rows if "eval/teacher_accuracy" in row), None)
    students = [row for row in evaluations if "eval/length" in row]
    lines = []
    if students:
        first, last = students[0], students[-1]
        for label, key in (
            ("exact reverse KL per token", "eval/exact_reverse_kl"),
            ("accuracy, greedy", "eval/accuracy"),
            ("accuracy, sampled", "eval/sampled_accuracy"),
        ):
            if key in first and key in last:
                error = last[f"{key}_se"]  # None: of one row there is no error
                extra = f" ± {error:.4f}" if error is not None else ""
                extra += f"   (teacher: {teacher:.3f})" if key == "eval/accuracy" and teacher is not None else ""
                lines.append(f"  {label}: {first[key]:.4f} -> {last[key]:.4f}{extra}")
    if lines:
        print("held out, before -> after:")
        print("\n".join(lines))
    latest = run_dir.latest_checkpoint()
    print(f"run directory: {run_dir.path}")
    if latest is not None:
        print(f"checkpoint:    {latest[1]}  (loads with from_pretrained)")
    print(f"curves:        open {run_dir.report_path} in a browser; the numbers are in {run_dir.metrics_path.name}")


if __name__ == "__main__":
    run_cli(main, Config, presets=presets, argv=sys.argv[1:])
