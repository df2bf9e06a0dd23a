"""Which of the teachers that rows may name are blended, and how much each counts.

Teachers that share a `route_value` are blended for the rows that name it. If every teacher has a `blend_weight`, all
of them are blended for the rows that name none. A weight of 0 leaves a teacher out altogether.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol

from errors import ConfigError
from training.collect import Blend, Teacher

ALL = "blend"
"""The name of the blend of all teachers."""


class Listed(Protocol):
    """One entry of the option `teachers`."""

    @property
    def model(self) -> str | None: ...

    @property
    def checkpoint(self) -> str | None: ...

    @property
    def route(self) -> str: ...

    @property
    def blend_weight(self) -> float | None: ...


def check_blends(teachers: Sequence[Listed]) -> None:
    """Raises `ConfigError` for weights that do not make up blends, and for teachers nobody could tell apart."""
    routes = [teacher.route for teacher in teachers]
    weighted = all(teacher.blend_weight is not None for teacher in teachers)
    for i, teacher in enumerate(teachers):
        weight, name, first = teacher.blend_weight, f"teachers.{i}.blend_weight", routes.index(teacher.route)
        if weight is None:
            continue
        if not 0 <= weight < math.inf:
            raise ConfigError(f"{name}={weight}: expected a number from 0")
        if not weighted and routes.count(teacher.route) == 1:
            other = next(j for j, t in enumerate(teachers) if t.blend_weight is None)
            raise ConfigError(
                f"{name}: no other teacher has its route_value, and teachers.{other} has no blend_weight, so that "
                "there is nothing to blend. Give every teacher a weight, or this one none"
            )
    for i, teacher in enumerate(teachers):
        first = routes.index(teacher.route)
        if first < i and None in (teacher.blend_weight, teachers[first].blend_weight):
            raise ConfigError(
                f"teachers.{first}.route_value and teachers.{i}.route_value are both {teacher.route!r}: give one of "
                "them another, or each a blend_weight"
            )
        if weighted and teacher.route == ALL:
            raise ConfigError(f"teachers.{i}.route_value={ALL}: so the blend of all is called; choose another")
        if (
            not any(t.blend_weight != 0 for t in teachers if t.route == teacher.route)
            and routes.count(teacher.route) > 1
        ):
            raise ConfigError(f"the blend_weights of route {teacher.route!r} are all 0: nobody is left to ask")
    if teachers and not asked(teachers):
        raise ConfigError("every teacher's blend_weight is 0: nobody is left to ask")
    for name, weights in blends(teachers).items():
        if not all(0 < weight <= 1 for weight in weights.values()):
            raise ConfigError(f"the blend_weights of {name!r} are too far apart to be told from 0 and 1")


def asked(teachers: Sequence[Listed]) -> list[int]:
    """The places of those that are not left out."""
    return [i for i, teacher in enumerate(teachers) if teacher.blend_weight != 0]


def names(teachers: Sequence[Listed]) -> dict[int, str]:
    """What each that is asked is called in metrics: its route, or where several share one, its weights."""
    count = Counter(teachers[i].route for i in asked(teachers))
    taken, found = {*count, ALL}, {}
    for i in asked(teachers):
        teacher = teachers[i]
        name = teacher.route
        if count[name] > 1:
            name = teacher.checkpoint or teacher.model or name
            name = f"{name} (teachers.{i})" if name in taken else name
            taken.add(name)
        found[i] = name
    return found


def blends(teachers: Sequence[Listed]) -> dict[str, dict[str, float]]:
    """By name, the weights of a blend's members, which sum to 1. One that has a single member is not among them."""
    named = names(teachers)
    members: dict[str, dict[str, float]] = {}
    for i, name in named.items():
        weight = teachers[i].blend_weight
        if weight is not None:
            members.setdefault(teachers[i].route, {})[name] = weight
    if default(teachers) == ALL:
        members[ALL] = {name: teachers[i].blend_weight or 0.0 for i, name in named.items()}
    return {
        blend: {name: weight / sum(weights.values()) for name, weight in weights.items()}
        for blend, weights in members.items()
        if len(weights) > 1
    }


def default(teachers: Sequence[Listed]) -> str | None:
    """Who judges rows that name nobody: the blend of all, or who is left of it; None: nobody."""
    if not teachers or any(teacher.blend_weight is None for teacher in teachers):
        return None
    named = list(names(teachers).values())
    return named[0] if len(named) == 1 else ALL


def with_blends(
    teachers: Mapping[str, Teacher], blends: Mapping[str, Mapping[str, float]]
) -> dict[str, Teacher | Blend]:
    """The teachers, and their blends, by name."""
    made = {
        name: Blend({member: teachers[member] for member in weights}, tuple(weights.values()))
        for name, weights in blends.items()
    }
    return {**teachers, **made}
