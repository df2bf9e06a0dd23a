"""The teachers of a run: what the options say of them, what is checked, and one copy of each distinct checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from envs.rendering import Renderer
from errors import ConfigError, ModelError
from models.checks import PairReport
from models.sources import ModelSource, is_adapter, source_fingerprint
from models.teacher_view import ViewMaker
from recipes.served import Served, ServerOptions

EMA = "ema"
"""As a teacher's model: the exponential moving average of the student."""
DEFAULT_EMA_DECAY = 0.99


@dataclass(frozen=True)
class TeacherSpec:
    """A teacher as the options give it: its weights, and how it reads."""

    name: str  # in metrics, episodes and errors
    model: str | None  # hub id, local folder or .gguf file; EMA; None: what its server says
    checkpoint: str | None = None  # its weights: HF folder or adapter
    system_prompt: str | None = None
    template_kwargs: Mapping[str, Any] | None = None
    ema_decay: float | None = None  # of the student's average; None: weights of its own
    server: ServerOptions = field(default_factory=ServerOptions)  # without a url: its weights are loaded here
    server_option: str = field(default="teacher.", compare=False)  # what the options of `server` begin with

    def __post_init__(self) -> None:
        if self.ema_decay is not None and self.checkpoint is not None:
            raise ConfigError(
                f"teacher_checkpoint={self.checkpoint}: teacher_model={EMA} is the student's average and has no "
                f"checkpoint of its own. Leave one out; a folder of that name is ./{EMA}"
            )
        if self.ema_decay is not None and self.server.url:
            raise ConfigError(
                f"teacher_model={EMA} is the average of the student that is trained here: no server has it. Leave "
                f"{self.server_option}url out, or give the model that is served"
            )

    def reads_alike(self, other: TeacherSpec) -> bool:
        """Equal but for the name."""
        return replace(self, name=other.name) == other


@dataclass(frozen=True)
class CheckedTeacher:
    """A teacher that was found to fit the student, with nothing loaded but its tokenizer."""

    name: str
    source: ModelSource
    weights: str  # equal for teachers whose weights are the same
    renderer: Renderer
    views: ViewMaker
    report: PairReport
    base: str  # equal for teachers that one model in memory can serve, by adapters that are switched
    adapter_bytes: int | None = None  # of the adapter that makes its weights of the base
    ema_decay: float | None = None
    served: Served | None = None  # None: its weights are loaded here

    @property
    def exact(self) -> bool:
        """Whether it can give whole distributions, which are over the student's vocabulary."""
        return not self.report.by_bytes and (self.served is None or self.served.exact)

    @property
    def base_source(self) -> ModelSource:
        """Of a teacher whose weights are an adapter, where its base is."""
        return self.source if self.adapter_bytes is None else ModelSource(self.source.name)


def weights_fingerprint(source: ModelSource) -> str:
    """Equal for two routes to one checkpoint: a folder, a copy of it, or the same weights under a base's name."""
    if source.checkpoint is not None and not is_adapter(source.checkpoint):
        with suppress(ModelError):  # a checkpoint without a tokenizer is known by its base as well
            return source_fingerprint(ModelSource(source.checkpoint))
    return source_fingerprint(source)


def by_weights(teachers: Mapping[str, CheckedTeacher]) -> dict[str, list[CheckedTeacher]]:
    """The teachers of each distinct checkpoint, in order."""
    groups: dict[str, list[CheckedTeacher]] = {}
    for teacher in teachers.values():
        where = "" if teacher.served is None else f" at {teacher.served.urls}"
        groups.setdefault(teacher.weights + where, []).append(teacher)
    return groups


def by_base(teachers: Mapping[str, CheckedTeacher]) -> dict[str, list[list[CheckedTeacher]]]:
    """The teachers of each distinct checkpoint that is loaded here, together with those that lie on the same base, in
    order."""
    bases: dict[str, list[list[CheckedTeacher]]] = {}
    for same in by_weights({name: teacher for name, teacher in teachers.items() if teacher.served is None}).values():
        bases.setdefault(same[0].base, []).append(same)
    return bases


def refuse_ema(model: str | None) -> None:
    """Raises `ConfigError` where nothing is trained that could have an average."""
    if model == EMA:
        raise ConfigError(
            f"teacher_model={EMA} is the average of a student in training, and nothing is trained here: "
            f"give a model, or a checkpoint of the run (a folder of that name is ./{EMA})"
        )


def ema_decay_of(model: str | None, given: float | None) -> float | None:
    """The decay of a teacher that is the student's average; None for any other. Raises `ConfigError`."""
    if model != EMA:
        return None
    decay = DEFAULT_EMA_DECAY if given is None else given
    if not 0 <= decay < 1:
        raise ConfigError(
            f"teacher_ema_decay={decay}: expected 0 or more, and less than 1 (for the student as it was at the start, "
            "give its own name as teacher_model)"
        )
    return decay


def distinct(specs: Sequence[TeacherSpec]) -> list[TeacherSpec]:
    """Each name once. Raises `ConfigError` where one name stands for two readings."""
    found: dict[str, TeacherSpec] = {}
    for spec in specs:
        if not found.setdefault(spec.name, spec).reads_alike(spec):
            raise ConfigError(f"two teachers are named {spec.name!r}: give one of them another route_value")
    return list(found.values())
