"""Train one student on several datasets at once, each judged by a teacher of its own, or each row by the one it names.

    python -m recipes.on_policy_multi_teacher deepmath_groups_per_batch=256 tulu3_groups_per_batch=256
    python -m recipes.on_policy_multi_teacher model_name=./student \\
        datasets.0.dataset=deepmath datasets.0.teacher_model=./mathematician datasets.0.groups_per_batch=256 \\
        datasets.1.dataset=chats.jsonl datasets.1.teacher_model=./talker datasets.1.groups_per_batch=64
    python -m recipes.on_policy_multi_teacher model_name=./student datasets.0.dataset=mixed.jsonl \\
        teachers.0.model=./mathematician teachers.0.route_value=math \\
        teachers.1.model=./talker teachers.1.route_value=chat
    python -m recipes.on_policy_multi_teacher model_name=./student datasets.0.dataset=prompts.jsonl \\
        objective=topk_forward_kl teachers.0.model=./mathematician teachers.0.blend_weight=0.7 \\
        teachers.1.model=./talker teachers.1.blend_weight=0.3

Every step takes `groups_per_batch` prompts of each dataset. Teachers of the same weights are loaded once.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import chz

from envs.datasets import Cursor, Dataset, Row
from envs.given import given_builder
from envs.rollout import derive_seed
from envs.sources import NAMES, Routing, load_dataset_rows, locate
from errors import ConfigError
from recipes import blends, setup
from recipes.cli import run_cli
from recipes.config import OnPolicyConfig
from recipes.mixture import DatasetOptions, TeacherOptions
from recipes.on_policy_distillation import eval_size_of_file
from recipes.student_config import check_at_least, check_positive, json_object
from recipes.teacher_options import check_server
from recipes.teachers import TeacherSpec, distinct, ema_decay_of
from recipes.training_run import TrainingRun, print_dry_run, train
from training.evaluation import EvalSet
from training.loop import DatasetPlan
from training.trackers import check_trackers


@chz.chz
class Config(OnPolicyConfig):
    """On-policy distillation of single answers from several teachers. Without `datasets`: DeepMath and Tulu 3."""

    datasets: tuple[DatasetOptions, ...] = chz.field(
        default=(), doc="the mixture; a dataset's own teacher judges its rows that name none"
    )
    teachers: tuple[TeacherOptions, ...] = chz.field(default=(), doc="those that rows name under `route_key`")
    route_key: str = chz.field(default="teacher", doc="the key of a row that names its teacher")
    teachers_in_memory: int | None = chz.field(
        default=None,
        doc="at most this many teachers' models at a time: each is read from disk when it is its turn to score, once a "
        "step or less; default: all stay",
    )
    deepmath_groups_per_batch: int | None = chz.field(
        default=None, doc="short for datasets.0.groups_per_batch of the mixture that is taken without `datasets`"
    )
    tulu3_groups_per_batch: int | None = chz.field(default=None, doc="short for its datasets.1.groups_per_batch")
    max_prompt_tokens: int | None = chz.field(default=None, doc="longest prompt; default: what the context leaves")
    long_prompts: Literal["error", "drop"] = chz.field(default="error", doc="what to do with longer ones")

    @chz.validate
    def _mixture(self) -> None:
        check_at_least(self, {"teachers_in_memory": 1})
        if not self.datasets:
            raise ConfigError("there is no dataset: give datasets.0.dataset=")
        for i, data in enumerate(self.datasets):
            try:
                check_at_least(data, {"group_size": 1, "groups_per_batch": 1, "eval_size": 0, "max_rows": 1})
                check_positive("weight", data.weight)
            except ConfigError as error:
                raise ConfigError(f"datasets.{i}.{error}") from None
            if data.teacher_model == "":
                raise ConfigError(f"datasets.{i}.teacher_model is empty: give a model, or leave it out")
            if not data.has_teacher and not self.teachers:
                raise ConfigError(
                    f"datasets.{i} has no teacher: give datasets.{i}.teacher_model=, datasets.{i}.teacher.url=, or "
                    "teachers.0.model="
                )
            data.check_teacher(f"datasets.{i}.")
        for i, teacher in enumerate(self.teachers):
            if teacher.model is None and not teacher.url:
                raise ConfigError(f"teachers.{i} has neither model nor url: give teachers.{i}.model=")
            check_server(teacher, teacher.checkpoint, f"teachers.{i}.checkpoint")
        titles = [data.title for data in self.datasets]
        for i, name in enumerate(titles):
            if name in titles[:i]:
                first = titles.index(name)
                raise ConfigError(
                    f"datasets.{first}.name and datasets.{i}.name are both {name!r}: give one of them another"
                )
        blends.check_blends(self.teachers)
        for option, place in (("deepmath_groups_per_batch", 0), ("tulu3_groups_per_batch", 1)):
            value = getattr(self, option)
            sizes = [data.groups_per_batch for data in self.datasets if data.title == option.split("_")[0]]
            if value is not None and value not in sizes:
                raise ConfigError(f"{option} is of the mixture without datasets: use datasets.{place}.groups_per_batch")
        groups = sum(data.groups_per_batch for data in self.datasets)
        if self.num_substeps > groups:
            raise ConfigError(f"num_substeps={self.num_substeps}: there are only {groups} groups to split")
        self.teacher_specs()

    def teacher_specs(self) -> Sequence[TeacherSpec]:
        return distinct([*self._listed, *filter(None, self._own)])

    def teachers_at_a_time(self) -> int | None:
        return self.teachers_in_memory

    def blends(self) -> Mapping[str, Mapping[str, float]]:
        return blends.blends(self.teachers)

    def own_teacher(self, index: int) -> str | None:
        """The name of who judges a dataset's rows that name none."""
        spec = self._own[index]
        return blends.default(self.teachers) if spec is None else spec.name

    @property
    def _listed(self) -> list[TeacherSpec]:
        return [_listed(self, i, name) for i, name in blends.names(self.teachers).items()]

    @property
    def _own(self) -> list[TeacherSpec | None]:
        """Each dataset's teacher. One whose name stands for another reading already is named by its dataset too."""
        taken = {spec.name: spec for spec in self._listed}
        found: list[TeacherSpec | None] = []
        for i, data in enumerate(self.datasets):
            spec = _of_dataset(self, i)
            if spec is not None:
                if spec.name in self.blends() or not taken.get(spec.name, spec).reads_alike(spec):
                    spec = replace(spec, name=f"{spec.name} ({data.title})")
                taken[spec.name] = spec
            found.append(spec)
        return found


def _listed(config: Config, index: int, name: str) -> TeacherSpec:
    options = config.teachers[index]
    kwargs = options.chat_template_kwargs
    return TeacherSpec(
        name=name,
        model=options.model,
        checkpoint=options.checkpoint,
        system_prompt=options.system_prompt,
        template_kwargs=None if kwargs is None else json_object(f"teachers.{index}.chat_template_kwargs", kwargs),
        ema_decay=ema_decay_of(options.model, config.teacher_ema_decay),
        server=options.server(),
        server_option=f"teachers.{index}.",
    )


def _of_dataset(config: Config, index: int) -> TeacherSpec | None:
    options = config.datasets[index]
    if not options.has_teacher:
        return None
    name = options.teacher_checkpoint or options.teacher_model or options.teacher.url[0]
    return options.teacher_spec(name, config.teacher_ema_decay, f"datasets.{index}.")


DEFAULT_MIXTURE: dict[str, Any] = {
    "model_name": "Qwen/Qwen3-8B-Base",
    "lora_rank": 128,
    "learning_rate": 1e-4,
    "max_tokens": 4096,
    "datasets.0.dataset": "deepmath",
    "datasets.0.teacher_model": "Qwen/Qwen3-32B",
    "datasets.0.group_size": 4,
    "datasets.0.groups_per_batch": 256,
    "datasets.1.dataset": "tulu3",
    "datasets.1.teacher_model": "Qwen/Qwen3-8B",
    "datasets.1.group_size": 4,
    "datasets.1.groups_per_batch": 256,
}


def presets(given: dict[str, str]) -> dict[str, Any]:
    named = {key: value for key, value in given.items() if re.fullmatch(r"datasets\.\d+\.dataset", key)}
    if not named:
        short = {
            f"datasets.{i}.groups_per_batch": int(given[f"{name}_groups_per_batch"])
            for i, name in enumerate(("deepmath", "tulu3"))
            if re.fullmatch(r"-?\d+", given.get(f"{name}_groups_per_batch", ""))
        }
        return DEFAULT_MIXTURE | short
    sizes = {}
    for key, dataset in named.items():
        locate(dataset, given.get(f"{key}_path"))  # a typo is named here, not what it did not bring
        if (size := eval_size_of_file(dataset)) is not None:
            sizes[key.replace(".dataset", ".eval_size")] = size
    return sizes


# --- what is checked before anything is loaded


@dataclass(frozen=True)
class Part:
    """One dataset's rows, and which teacher, or blend of them, judges each."""

    options: DatasetOptions
    data: Dataset
    own_teacher: str | None
    routes: Mapping[str, str]  # from what a row says to the teacher's name, or the blend's

    def teacher_of(self, row: Row) -> str:
        teacher = self.own_teacher if row.teacher is None else self.routes[row.teacher]
        assert teacher is not None  # `Routing` refuses rows that name none where the dataset has none
        return teacher

    @cached_property
    def rows_of(self) -> Counter[str]:
        return Counter(self.teacher_of(row) for row in self.data.train)


@dataclass(frozen=True)
class Checked:
    parts: list[Part]
    models: setup.CheckedModels


def check(config: Config) -> Checked:
    """Every check that needs no weights. Raises `UserError`s."""
    check_trackers([*config.trackers, *(["wandb"] if config.wandb_project else [])])
    parts = [_part(config, i) for i in range(len(config.datasets))]
    models = setup.check_models(config)
    checked = []
    for part in parts:
        data = setup.check_prompt_lengths(
            part.data,
            models,
            teacher_of=part.teacher_of,
            max_tokens=config.max_tokens,
            asked=(config.max_prompt_tokens, f"max_prompt_tokens={config.max_prompt_tokens}"),
            drop=config.long_prompts == "drop",
        )
        checked.append(replace(part, data=data))
    return Checked(checked, models)


def _part(config: Config, index: int) -> Part:
    options, own = config.datasets[index], config.own_teacher(index)
    routes = {config.teachers[i].route: config.teachers[i].route for i in blends.asked(config.teachers)}
    if own is not None and options.has_teacher:
        routes = {options.teacher_model or own: own, own: own} | routes
    data = load_dataset_rows(
        options.dataset,
        options.dataset_path,
        eval_size=options.eval_size,
        seed=config.seed,
        max_rows=options.max_rows,
        routing=Routing(config.route_key, tuple(routes), required=own is None),
    )
    data = config.answered(data, strict=options.dataset not in NAMES)
    return Part(options, replace(data, name=options.title), own, routes)


def main(config: Config) -> None:
    checked = check(config)
    run = training_run(config, checked)
    if not config.dry_run:
        train(config, run)
        return
    first = checked.parts[0]
    row = first.data.train[0]
    readers = checked.models.readers(first.teacher_of(row))
    read = [len(reader.renderer.prompt(row.teacher_messages or row.messages)) for reader in readers]
    print_dry_run(
        config,
        run,
        data=[line for part in checked.parts for line in _lines(part, checked.models)],
        prompt=checked.models.student_renderer.prompt(row.messages),
        teacher=", ".join(
            f"{reader.name} reads {tokens} tokens of this prompt" for reader, tokens in zip(readers, read, strict=True)
        )
        + (" (privileged)" if row.teacher_messages else ""),
    )


def _lines(part: Part, models: setup.CheckedModels) -> list[str]:
    data, options = part.data, part.options
    return [
        f"{data.name}: {len(data.train)} training rows, {len(data.test)} held out, graded as {data.grader}; "
        f"{options.groups_per_batch} prompts x {options.group_size} attempts a step",
        *(f"  {count} rows are judged by {_judge(teacher, models)}" for teacher, count in part.rows_of.items()),
    ]


def _judge(teacher: str, models: setup.CheckedModels) -> str:
    weights = models.blends.get(teacher, {})
    return teacher + (f": {', '.join(f'{w:.3g} of {name}' for name, w in weights.items())}" if weights else "")


def log_path(config: Config) -> Path:
    """The run's folder: as given, or named after what is trained, so that the same command finds it again."""
    if config.log_path is not None:
        return Path(config.log_path)
    name = "-".join([*(data.title for data in config.datasets), Path(config.model_name).name])
    return Path("runs", "on_policy_multi_teacher-" + re.sub(r"[^\w.-]+", "-", name))


def training_run(config: Config, checked: Checked) -> TrainingRun:
    parts, models = checked.parts, checked.models
    student = models.student_renderer
    plans = [
        DatasetPlan(
            name=part.data.name,
            # not the run's seed alone: two datasets of one length would be shuffled alike
            cursor=Cursor(part.data.train, seed=derive_seed(config.seed, part.data.name)),
            groups_per_batch=part.options.groups_per_batch,
            builder=setup.group_builder(
                student,
                part.data.name,
                part.teacher_of,
                group_size=part.options.group_size,
                max_tokens=config.max_tokens,
            ),
            given=given_builder(student, part.data.name, part.teacher_of, max_tokens=config.max_tokens),
            weight=part.options.weight,
        )
        for part in parts
    ]
    held_out = [part for part in parts if part.data.test]
    return TrainingRun(
        path=log_path(config),
        models=models,
        plans=plans,
        eval_sets=[setup.eval_set(part.data, student, part.teacher_of, config.max_tokens) for part in held_out],
        teacher_sets={name: _sets_of(name, config, held_out, models) for name in models.teachers},
        steps_per_epoch=max(-(-len(part.data.train) // part.options.groups_per_batch) for part in parts),
    )


def _sets_of(teacher: str, config: Config, parts: Sequence[Part], models: setup.CheckedModels) -> list[EvalSet]:
    """The held-out rows that one teacher judges, alone or in a blend, in its own format."""
    renderer = models.teachers[teacher].renderer
    found = []
    for part in parts:
        rows = [row for row in part.data.test if teacher in {r.name for r in models.readers(part.teacher_of(row))}]
        if rows:
            data = replace(part.data, test=rows)
            found.append(setup.eval_set(data, renderer, part.teacher_of, config.max_tokens))
    return found


if __name__ == "__main__":
    run_cli(main, Config, presets=presets, argv=sys.argv[1:])
