"""The teachers of a run: what the options say of them, what is checked, and one copy of each distinct checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from envs.rendering import Renderer
from errors import ConfigError, ModelError
from models.checks import PairReport
from models.sources import ModelSource, is_adapter, source_fingerprint
from models.teacher_view import ViewMaker


@dataclass(frozen=True)
class TeacherSpec:
    """A teacher as the options give it: its weights, and how it reads."""

    name: str  # in metrics, episodes and errors
    model: str  # hub id, local folder or .gguf file
    checkpoint: str | None = None  # its weights: HF folder or adapter
    system_prompt: str | None = None
    template_kwargs: Mapping[str, Any] | None = None

    def reads_alike(self, other: TeacherSpec) -> bool:
        """Equal but for the name."""
        mine, theirs = ((s.model, s.checkpoint, s.system_prompt, s.template_kwargs) for s in (self, other))
        return mine == theirs


@dataclass(frozen=True)
class CheckedTeacher:
    """A teacher that was found to fit the student, with nothing loaded but its tokenizer."""

    name: str
    source: ModelSource
    weights: str  # equal for teachers whose weights are the same
    renderer: Renderer
    views: ViewMaker
    report: PairReport


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
        groups.setdefault(teacher.weights, []).append(teacher)
    return groups


def distinct(specs: Sequence[TeacherSpec]) -> list[TeacherSpec]:
    """Each name once. Raises `ConfigError` where one name stands for two readings."""
    found: dict[str, TeacherSpec] = {}
    for spec in specs:
        if not found.setdefault(spec.name, spec).reads_alike(spec):
            raise ConfigError(f"two teachers are named {spec.name!r}: give one of them another route_value")
    return list(found.values())
