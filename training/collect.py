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
from models.blending import blended
from models.device_thread import compute
from models.teacher_view import ViewMaker
from models.types import Sampler, Scorer, Signal, SignalKind, SignalSpec, TeacherView
from training.metrics import StageTimer
from training.packing import TrainingItem

UNALIGNED = "unaligned"  # why an episode is dropped that a teacher of another tokenizer cannot score at all
SCORE_TOKENS = 4096  # views are handed to a scorer in batches of about this many tokens


@dataclass(frozen=True)
class Teacher:
    """A scorer, and how it reads what the student wrote."""

    scorer: Scorer
    views: ViewMaker
    waits: bool = False  # until all episodes have ended: its weights may have to be loaded


@dataclass(frozen=True)
class Blend:
    """Teachers who all score an episode, each as it reads it: what counts is the mixture of their distributions."""

    members: Mapping[str, Teacher]
    weights: tuple[float, ...]  # above 0, in the members' order, their sum is 1


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
    teachers: Mapping[str, Teacher | Blend],
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
    signals = await scoring.signals([episode for group in ordered for episode in group.episodes])
    dropped = Counter(reason for group in ordered for reason in group.dropped)
    dropped.update(scoring.dropped)
    items = [
        [
            TrainingItem(episode, signals.get(id(episode)))
            for episode in group.episodes
            if need is SignalKind.NONE or id(episode) in signals
        ]
        for group in ordered
    ]
    causes = {r: cause for group in ordered for r, cause in zip(group.dropped, group.causes, strict=True)}
    return Collected(ordered, items, dropped, causes | scoring.causes)


@dataclass(frozen=True)
class _Question:
    """What one teacher is asked of one episode; `member`: its place in a blend."""

    episode: Episode
    member: int
    view: TeacherView


class _Scoring:
    """Collects views per scorer and hands them over in batches."""

    def __init__(self, teachers: Mapping[str, Teacher | Blend], need: SignalSpec, timer: StageTimer) -> None:
        self.causes: dict[str, str] = {}
        self._failed: dict[int, str] = {}  # by id() of the episode, the reason
        self._answers: dict[tuple[int, int], Signal] = {}  # by id() of the episode and member
        self._teachers, self._need, self._timer = teachers, need, timer
        # By scorer, not by teacher: two names for one model make the same batches as one, and the same rounding.
        self._pending: dict[int, list[_Question]] = {}
        self._waiting: dict[int, list[list[_Question]]] = {}  # batches of those that wait; also by scorer
        self._scorers = {id(member.scorer): member.scorer for t in teachers.values() for member in _members(t)}

    @property
    def dropped(self) -> Counter[str]:
        return Counter(self._failed.values())

    def add(self, group: EpisodeGroup, tasks: Any) -> None:
        if self._need is SignalKind.NONE:
            return
        for i, teacher in enumerate(_members(self._teachers[group.teacher])):
            key = id(teacher.scorer)
            pending = self._pending.setdefault(key, [])
            for episode in group.episodes:
                view = teacher.views.view(episode)
                if len(view.positions):
                    pending.append(_Question(episode, i, view))
                else:
                    self._failed[id(episode)] = UNALIGNED
                    self.causes[UNALIGNED] = f"{episode.row_id}: student and teacher have no span of its text in common"
            if sum(len(question.view.token_ids) for question in pending) >= SCORE_TOKENS:
                batch = self._pending.pop(key)
                if teacher.waits:
                    self._waiting.setdefault(key, []).append(batch)
                else:
                    tasks.start_soon(self._score, teacher.scorer, batch)

    def flush(self, tasks: Any) -> None:
        for key, scorer in self._scorers.items():  # scorer by scorer, so that each has to be loaded once
            for batch in (*self._waiting.pop(key, ()), self._pending.pop(key, ())):
                if batch:
                    tasks.start_soon(self._score, scorer, batch)

    async def _score(self, scorer: Scorer, pending: list[_Question]) -> None:
        with self._timer.stage("scoring"):
            try:
                signals = await scorer.score([question.view for question in pending], self._need)
            except TeacherError as error:
                if len(pending) == 1:
                    self._failed[id(pending[0].episode)] = error.reason
                    self.causes[error.reason] = str(error)
                    return
                for one in pending:  # so that one bad view does not take its neighbours with it
                    await self._score(scorer, [one])
                return
        for question, signal in zip(pending, signals, strict=True):
            spans = question.view.spans
            self._answers[id(question.episode), question.member] = signal if spans is None else signal.of_spans(spans)

    async def signals(self, episodes: Sequence[Episode]) -> dict[int, Signal]:
        """By id() of the episode, of those that every teacher asked could score."""
        if self._need is SignalKind.NONE:
            return {}
        scored = [episode for episode in episodes if id(episode) not in self._failed]
        blends = [episode for episode in scored if isinstance(self._teachers[episode.teacher], Blend)]
        found = {id(episode): self._answers[id(episode), 0] for episode in scored}
        return found | (await compute(self._blend, blends) if blends else {})

    def _blend(self, episodes: Sequence[Episode]) -> dict[int, Signal]:
        found = {}
        for episode in episodes:
            blend = self._teachers[episode.teacher]
            assert isinstance(blend, Blend)
            said = {name: self._answers[id(episode), i] for i, name in enumerate(blend.members)}
            found[id(episode)] = blended(said, blend.weights, self._need)
        return found


def _members(teacher: Teacher | Blend) -> Sequence[Teacher]:
    return list(teacher.members.values()) if isinstance(teacher, Blend) else [teacher]
