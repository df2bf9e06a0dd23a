"""What every training recipe does once its options and data are checked: load, go on or begin, train, sum up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import chz
from rich.console import Console
from rich.text import Text

from models.causal_lm import CausalLM
from models.checks import probe_scorer, probe_view
from models.device_thread import compute, compute_blocking
from models.types import Sampler
from recipes import engines, samplers, setup
from recipes.blends import with_blends
from recipes.config import OnPolicyConfig
from recipes.memory import memory_lines
from recipes.student_config import StudentConfig
from recipes.teachers import CheckedTeacher
from training import signals
from training.collect import Teacher
from training.evaluation import EvalSet, evaluate
from training.loop import DatasetPlan, Loop, is_of_a_teacher
from training.objectives import Objective
from training.progress import Progress
from training.report import write_report
from training.run_dir import RunDir, open_run_dir
from training.trackers import open_trackers

SERVED_TEACHERS = "served_teachers"
"""In config.json: what was found out at the start about teachers on servers."""


@dataclass(frozen=True)
class TrainingRun:
    """What a recipe has checked and chosen. `teacher_sets`: by teacher, its held-out rows in its own format."""

    path: Path
    models: setup.CheckedModels
    plans: Sequence[DatasetPlan]
    eval_sets: Sequence[EvalSet]
    teacher_sets: Mapping[str, Sequence[EvalSet]]
    steps_per_epoch: int
    objective: Objective | None = None  # None: the one that the options name
    captured: Mapping[str, Teacher] = field(
        default_factory=dict
    )  # teachers that are files: nothing to load or to probe
    identity: Mapping[str, Any] = field(default_factory=dict)  # what a resumed run must share besides its options


def train(config: StudentConfig, run: TrainingRun) -> None:
    """The whole run, from the last checkpoint of `run.path` or from the beginning."""
    found = {name: teacher.served.line for name, teacher in run.models.teachers.items() if teacher.served is not None}
    run_dir = open_run_dir(
        run.path,
        {**chz.asdict(config), **run.identity, **({SERVED_TEACHERS: found} if found else {})},
        config.behavior_if_log_dir_exists,
        may_differ=config.may_differ_on_resume() | {SERVED_TEACHERS},
    )
    with run_dir:
        try:
            parts = compute_blocking(engines.build_engines, config, run.models, _resume_folder(run_dir), run_dir.path)
            signals.run(_train, config, run, parts, run_dir)
        except BaseException:
            run_dir.discard_if_empty()  # an empty folder would only refuse the corrected command
            raise


def _resume_folder(run_dir: RunDir) -> Path | None:
    latest = run_dir.latest_checkpoint() if run_dir.resumed else None
    run_dir.rewind(latest[0] if latest else -1)
    return latest[1] if latest else None


async def _train(config: StudentConfig, run: TrainingRun, parts: engines.Engines, run_dir: RunDir) -> None:
    for name, teacher in parts.teachers.items():
        if run.models.teachers[name].served is None:  # those of servers were probed before anything was loaded
            await probe_scorer(teacher.scorer, probe_view(teacher.views))
    loop_config = config.loop(run.steps_per_epoch)
    with Progress(loop_config.max_steps, str(run_dir.path)) as progress:
        loop = Loop(
            config=loop_config,
            plans=run.plans,
            eval_sets=run.eval_sets,
            sampler=parts.sampler,
            teachers={**with_blends(parts.teachers, run.models.blends), **run.captured},
            learner=parts.learner,
            objective=_objective(config, run),
            renderer=run.models.student_renderer,
            run_dir=run_dir,
            trackers=open_trackers(
                config.trackers, run_dir.path, chz.asdict(config), wandb_project=config.wandb_project
            ),
            progress=progress,
            exact_eval=parts.exact,
        )
        if (latest := run_dir.latest_checkpoint()) is not None:
            loop.restore(latest[1])
            progress.message(f"resumed at step {loop.step} from {latest[1]}")
        if isinstance(config, OnPolicyConfig) and config.eval_teacher and not _has_evaluated_teachers(run_dir):
            await _evaluate_teachers(config, run, parts, loop)
        try:
            await loop.run()
        finally:
            loop.trackers.close()
    write_report(run_dir.path)
    print_summary(run_dir)


def _objective(config: StudentConfig, run: TrainingRun) -> Objective:
    if run.objective is not None:
        return run.objective
    assert isinstance(config, OnPolicyConfig)
    return config.make_objective()


async def _evaluate_teachers(config: OnPolicyConfig, run: TrainingRun, parts: engines.Engines, loop: Loop) -> None:
    """Each teacher's own accuracy, or reward, on its held-out rows: what is within the student's reach."""
    several = sum(len(sets) for sets in run.teacher_sets.values()) > 1
    for name, sets in run.teacher_sets.items():
        for rows, found in await _evaluate_teacher(config, run, run.models.teachers[name], parts, sets):
            scope = f"eval/{rows.name}/{name}/teacher_" if several else "eval/teacher_"
            row = {key.replace("eval/", scope, 1): value for key, value in found.items()}
            if row:  # rows without an expected answer leave nothing to measure
                loop.run_dir.append_metrics({"step": loop.step, **row})


async def _evaluate_teacher(
    config: OnPolicyConfig, run: TrainingRun, teacher: CheckedTeacher, parts: engines.Engines, sets: Sequence[EvalSet]
) -> list[tuple[EvalSet, dict[str, float]]]:
    """A function of its own, so that nothing holds the model when the next one is loaded."""
    lm = None if teacher.served is not None else await compute(parts.teacher_lm, teacher.name)
    async with samplers.sampling(_teacher_sampler(config, run, teacher.name, lm), lm) as sampler:
        return [
            (
                rows,
                await evaluate(
                    rows,
                    sampler,
                    teacher.renderer,
                    temperature=config.temperature,
                    samples=config.eval_samples if rows.rewarded else 0,
                    seed=config.seed,
                ),
            )
            for rows in sets
        ]


def _teacher_sampler(config: OnPolicyConfig, run: TrainingRun, name: str, lm: CausalLM | None) -> Sampler:
    """In this process as the student's, or where the teacher's server is."""
    tokenizer = run.models.teachers[name].renderer.tokenizer
    if lm is not None:
        return samplers.make_teacher_sampler(config, lm, tokenizer, folder=run.path)
    return samplers.make_serving_sampler(config, run.models.sampled_at[name], tokenizer, folder=run.path)


def _has_evaluated_teachers(run_dir: RunDir) -> bool:
    return any(is_of_a_teacher(name) for row in run_dir.read_metrics() for name in row)


# --- what is said before and after


def print_dry_run(
    config: StudentConfig,
    run: TrainingRun,
    data: Sequence[str],
    prompt: Sequence[int],
    teacher: str | None = None,
    answer: str = "what the student samples",
) -> None:
    """The resolved configuration, the data, the first prompt by mask, the teacher's alignment, and memory."""
    tokens = run.models.student_renderer.tokenizer.decode(prompt)
    steps = config.loop(run.steps_per_epoch).max_steps
    lines: list[str | Text] = [
        Text("configuration", "bold"),
        *(
            Text(f"  {name}={value}")
            for name, value in chz.beta_to_blueprint_values(config).items()
            if not isinstance(value, type)
        ),
        Text("data", "bold"),
        *(Text(f"  {line}") for line in data),
        *(Text(f"  {steps} steps of {plan.groups_per_batch} groups of {plan.name}") for plan in run.plans),
        Text(f"first prompt, {len(prompt)} tokens (dim: not trained on, green: trained on)", "bold"),
        Text.assemble((tokens, "dim"), (f" … {answer}", "bold green")),
        *([Text("teachers", "bold")] if run.models.teachers else []),
        *(Text(f"  {line}") for checked in run.models.teachers.values() for line in checked.report.lines()),
        *([Text(f"  {teacher}")] if teacher else []),
        Text("memory", "bold"),
        *(Text(f"  {line}") for line in memory_lines(config, run.models)),
        Text("dry run: no weights were loaded, no run was started", "bold"),
    ]
    for line in lines:
        Console(soft_wrap=True).print(line)


SUMMED_UP = (
    ("loss on given answers per token", "nll"),
    ("exact reverse KL per token", "exact_reverse_kl"),
    ("sampled reverse KL per token", "reverse_kl"),  # of teachers that give no whole distributions
    ("accuracy, greedy", "accuracy"),
    ("accuracy, sampled", "sampled_accuracy"),
    ("reward", "reward"),
)


def print_summary(run_dir: RunDir) -> None:
    """Before and after on the held-out rows, and where everything is."""
    rows = run_dir.read_metrics()
    scopes = dict.fromkeys(scope for row in rows for name in row if (scope := _scope(name)) is not None)
    lines = [line for scope in scopes for line in _before_and_after(rows, scope)]
    if lines:
        print("held out, before -> after:")
        print("\n".join(lines))
    latest = run_dir.latest_checkpoint()
    print(f"run directory: {run_dir.path}")
    if latest is not None:
        print(f"checkpoint:    {latest[1]}  (loads with from_pretrained)")
    print(f"curves:        open {run_dir.report_path} in a browser; the numbers are in {run_dir.metrics_path.name}")


def _scope(name: str) -> str | None:
    """Of a metric that every evaluation of a dataset has: its name and a slash, or nothing if it is the only one."""
    for measure in ("length", "nll"):
        if name == f"eval/{measure}" or (name.startswith("eval/") and name.endswith(f"/{measure}")):
            return name.removeprefix("eval/").removesuffix(measure)
    return None


def _before_and_after(rows: Sequence[Mapping[str, Any]], scope: str) -> list[str]:
    """One line per measure of the held-out rows of one dataset; `scope` is its name and a slash, or nothing."""
    students = [row for row in rows if row.keys() & {f"eval/{scope}length", f"eval/{scope}nll"}]
    first, last = students[0], students[-1]
    lines = []
    for label, measure in SUMMED_UP:
        key = f"eval/{scope}{measure}"
        if measure == "reverse_kl" and f"eval/{scope}exact_reverse_kl" in first:
            continue  # the exact one has less noise
        if key in first and key in last:
            error = last[f"{key}_se"]  # None: of one row there is no error
            extra = f" ± {error:.4f}" if error is not None else ""
            taught = [
                value
                for row in rows
                for name, value in row.items()
                if is_of_a_teacher(name) and name.startswith(f"eval/{scope}") and name.endswith(f"/teacher_{measure}")
            ]
            extra += f"   (teacher: {', '.join(f'{value:.3f}' for value in taught)})" if taught else ""
            lines.append(f"  {scope.replace('/', ': ')}{label}: {first[key]:.4f} -> {last[key]:.4f}{extra}")
    return lines
