"""Rollouts and their scores: what one step of training, or one evaluation, has to work with.

Scoring starts as soon as enough groups have ended, while others still run. Batches of views are cut by
the order in which groups end and by a token budget, never by the clock, so that a seed gives the same
batches, and with them the same rounding, every time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio

from envs.rollout import derive_seed, run_group
from envs.types import EnvGroupBuilder, Episode, EpisodeGroup
from errors import TeacherError
from models.teacher_view import ViewMaker
from models.types import Sampler, Scorer, Signal, SignalKind, SignalSpec, TeacherView
from training.metrics import StageTimer
from training.packing import TrainingItem

SCORE_TOKENS = 4096  # views are handed to a scorer in batches of about this many tokens


@dataclass(frozen=True)
class Teacher:
    """A scorer, and how it reads what the student wrote."""

    scorer: Scorer
    views: ViewMaker


@dataclass
class Collected:
    """Groups in the order of their builders. `items` holds the surviving episodes, group by group."""

    groups: list[EpisodeGroup]
    items: list[list[TrainingItem]]
    dropped: Counter[str] = field(default_factory=Counter)
    causes: dict[str, str] = field(default_factory=dict)  # by reason, what happened to one of them

    @property
    def flat(self) -> list[TrainingItem]:
        return [item for group in self.items for item in group]

    @property
    def attempts(self) -> int:
        return len(self.flat) + self.dropped.total()


async def collect(
    builders: Sequence[EnvGroupBuilder],
    sampler: Sampler,
    teachers: Mapping[str, Teacher],
    need: SignalSpec,
    *,
    temperature: float,
    seed: int,
    timer: StageTimer,
) -> Collected:
    """Run every builder's group, and score what survives unless `need` is NONE."""
    scoring = _Scoring(teachers, need, timer)
    groups: dict[int, EpisodeGroup] = {}
    async with anyio.create_task_group() as score_tasks:
        with timer.stage("sampling"):
            async with anyio.create_task_group() as tasks:

                async def one(i: int, builder: EnvGroupBuilder) -> None:
                    seeds = derive_seed(seed, builder.dataset, builder.row_id, i)
                    groups[i] = await run_group(builder, sampler, temperature=temperature, seed=seeds)
                    scoring.add(groups[i], score_tasks)

                for i, builder in enumerate(builders):
                    tasks.start_soon(one, i, builder)
        scoring.flush(score_tasks)
    ordered = [groups[i] for i in range(len(builders))]
    dropped = Counter(reason for group in ordered for reason in group.dropped)
    dropped.update(scoring.dropped)
    items = [
        [
            TrainingItem(episode, scoring.signals.get(id(episode)))
            for episode in group.episodes
            if need is SignalKind.NONE or id(episode) in scoring.signals
        ]
        for group in ordered
    ]
    causes = {r: cause for group in ordered for r, cause in zip(group.dropped, group.causes, strict=True)}
    return Collected(ordered, items, dropped, causes | scoring.causes)


class _Scoring:
    """Collects views per scorer and hands them over in batches."""

    def __init__(self, teachers: Mapping[str, Teacher], need: SignalSpec, timer: StageTimer) -> None:
        self.signals: dict[int, Signal] = {}  # by id() of the episode
        self.dropped: Counter[str] = Counter()
        self.causes: dict[str, str] = {}
        self._teachers, self._need, self._timer = teachers, need, timer
        # By scorer, not by teacher: two names for one model make the same batches as one, and the same rounding.
        self._pending: dict[int, list[tuple[Episode, TeacherView]]] = {}
        self._scorers = {id(teacher.scorer): teacher.scorer for teacher in teachers.values()}

    def add(self, group: EpisodeGroup, tasks: Any) -> None:
        if self._need is SignalKind.NONE:
            return
        teacher = self._teachers[group.teacher]
        key = id(teacher.scorer)
        pending = self._pending.setdefault(key, [])
        pending.extend((e, teacher.views.view(e)) for e in group.episodes)
        if sum(len(view.token_ids) for _, view in pending) >= SCORE_TOKENS:
            tasks.start_soon(self._score, teacher.scorer, self._pending.pop(key))

    def flush(self, tasks: Any) -> None:
        for key, pending in self._pending.items():
            if pending:
                tasks.start_soon(self._score, self._scorers[key], pending)
        self._pending = {}

    async def _score(self, scorer: Scorer, pending: list[tuple[Episode, TeacherView]]) -> None:
        with self._timer.stage("scoring"):
            try:
                signals = await scorer.score([view for _, view in pending], self._need)
            except TeacherError as error:
                if len(pending) == 1:
                    self.dropped[error.reason] += 1
                    self.causes[error.reason] = str(error)
                    return
                for one in pending:  # so that one bad view does not take its neighbours with it
                    await self._score(scorer, [one])
                return
        for (episode, _), signal in zip(pending, signals, strict=True):
            self.signals[id(episode)] = signal
