"""The training loop: rows -> episodes -> signals -> gradient -> new weights, resumable at every step.

Everything random is derived from (seed, step, row, attempt), so a resumed run draws what the
uninterrupted one would have drawn. A step is interrupted between micro-batches until its first optimizer
update, and then never: Ctrl-C undoes it or waits for it, and a checkpoint is written.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import anyio
import anyio.to_thread
import numpy as np

from envs.datasets import Cursor, Row
from envs.given import GivenEpisode
from envs.rendering import Renderer
from envs.rollout import derive_seed
from envs.types import EnvGroupBuilder
from errors import CheckpointError, NoSignalError
from models.device_thread import commit, compute
from models.types import Sampler
from training.collect import Blend, Collected, Teacher, collect
from training.evaluation import EvalSet, Judge, evaluate
from training.learner import ItemMetrics, Learner
from training.metrics import StageTimer, SumMetrics, peak_memory_mb
from training.objectives import Objective
from training.packing import TrainingItem
from training.progress import Progress
from training.report import write_report
from training.run_dir import RunDir
from training.saved_episodes import episode_row
from training.signals import Interruption, cancelled_at_signals
from training.trackers import Trackers

Schedule = Literal["constant", "linear", "cosine"]
GroupT = TypeVar("GroupT")


@dataclass(frozen=True)
class LoopConfig:
    max_steps: int
    learning_rate: float
    schedule: Schedule = "constant"
    warmup_steps: int = 0
    num_substeps: int = 1
    temperature: float = 1.0
    eval_every: int = 0  # 0: at both ends only
    eval_samples: int = 1
    save_every: int = 0  # 0: at the end only
    keep_checkpoints: int = 0  # 0: all
    max_dropped_fraction: float = 0.5
    lmbda: float = 1.0  # probability that a group is what the student samples, and not its row's completion
    train: bool = True  # False: episodes are made and measured, weights stay as they are and are not saved
    seed: int = 0


@dataclass(frozen=True)
class DatasetPlan:
    """One dataset of the mixture: its own rows in its own order, and how a row becomes a group.

    `given` makes the group of the row's completion, where `lmbda` is below 1; `weight` is on its tokens' losses."""

    name: str
    cursor: Cursor
    groups_per_batch: int
    builder: Callable[[Row], EnvGroupBuilder]
    given: Callable[[Row], EnvGroupBuilder] | None = None
    weight: float = 1.0


def learning_rate(config: LoopConfig, step: int) -> float:
    """The rate of step `step` (from 0): a linear warm-up, then constant, or down to 0 after the last step."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    done = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    factor = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.learning_rate * factor


@dataclass
class Loop:
    """Owns one run. `await run()` goes from the last checkpoint to `max_steps`."""

    config: LoopConfig
    plans: Sequence[DatasetPlan]
    eval_sets: Sequence[EvalSet]
    sampler: Sampler
    teachers: Mapping[str, Teacher | Blend]
    learner: Learner
    objective: Objective
    renderer: Renderer
    run_dir: RunDir
    trackers: Trackers
    progress: Progress
    exact_eval: bool = True
    step: int = 0
    _cursor_states: list[dict] = field(default_factory=list)  # as of the last finished step
    _texts: dict[int, str] = field(default_factory=dict)
    _interruption: Interruption = field(default_factory=Interruption)
    _whole: bool = True  # the weights are those of a finished step

    # --- the whole run

    async def run(self) -> None:
        """Train to `max_steps`. On SIGINT or SIGTERM: undo or finish the step, save, raise `Interrupted`.

        However it ends, the last finished step is saved if a checkpoint of it was due."""
        async with cancelled_at_signals(self.progress.message) as self._interruption, self.sampler:
            try:
                await self._train()
            except CheckpointError:
                raise  # it was tried
            except BaseException:
                self._save_what_is_due()  # before engines are closed, which takes its time
                raise

    def _save_what_is_due(self) -> None:
        due = self._interrupted() or self.step == self.config.max_steps or self._due(self.config.save_every)
        if due and self.step and self._whole and self.config.train and self._saved_step() != self.step:
            self.save(final=self.step == self.config.max_steps)

    async def _train(self) -> None:
        await self.sampler.update_weights(self.learner.weights(), self.step)
        at_an_end = self.step in (0, self.config.max_steps)  # stopped in its last evaluation, it owes that one
        if not self._evaluated(self.step) and (at_an_end or self._due(self.config.eval_every)):
            await self.evaluate()
        while self.step < self.config.max_steps:
            await self.train_step()
            last = self.step == self.config.max_steps
            if not self.config.train:
                continue  # nothing has changed since the first evaluation, and there is nothing to save
            if last or self._due(self.config.eval_every):
                await self.evaluate()
            if last or self._due(self.config.save_every):
                self.save(final=last)

    def _interrupted(self) -> bool:
        return self._interruption.number is not None

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _saved_step(self) -> int | None:
        latest = self.run_dir.latest_checkpoint()
        return latest[0] if latest else None

    # --- one step

    async def train_step(self) -> None:
        timer = StageTimer()
        builders = [
            self._builder(plan, i, row)
            for plan in self.plans
            for i, row in enumerate(plan.cursor.next(plan.groups_per_batch))
        ]  # a cancelled step leaves the cursors ahead; `save` writes the state as of the last finished step
        collected = await collect(
            builders, self.sampler, self.teachers, self.objective.need,
            temperature=self.config.temperature,
            seed=derive_seed(self.config.seed, "train", self.step),
            timer=timer,
        )  # fmt: skip
        self._check_signal(collected)
        await self.sampler.sleep()
        with timer.stage("training"):
            measured, updates = await compute(self._update, collected)  # given up, it has changed nothing
        self.step, self._whole = self.step + 1, True
        self._cursor_states = [plan.cursor.state() for plan in self.plans]
        try:
            await self.sampler.update_weights(self.learner.weights(), self.step)
        finally:  # the step is done, whether or not the next can be sampled
            with anyio.CancelScope(shield=True), timer.stage("writing"):
                await anyio.to_thread.run_sync(self._write_episodes, collected, measured)
            row = self._row(collected, measured, updates, timer)
            self.run_dir.append_metrics(row)
            self.trackers.log(row)
            self.progress.update(row)

    def _builder(self, plan: DatasetPlan, place: int, row: Row) -> EnvGroupBuilder:
        """Of the student's attempts, or of the row's completion: drawn for every step and place in it."""
        seed = derive_seed(self.config.seed, "lmbda", self.step, plan.name, place)
        if (seed >> 10) / 2**53 < self.config.lmbda:  # 53 bits: below 1 in a float
            return plan.builder(row)
        assert plan.given is not None  # options that ask for completions were checked to have some
        return plan.given(row)

    def _check_signal(self, collected: Collected) -> None:
        dropped = collected.dropped.total() / collected.attempts
        if not collected.flat or dropped > self.config.max_dropped_fraction:
            reasons = "; ".join(
                f"{count} by {reason}, as: {collected.causes[reason]}" for reason, count in collected.dropped.items()
            )
            raise NoSignalError(
                f"step {self.step + 1}: {collected.dropped.total()} of {collected.attempts} episodes were dropped "
                f"({reasons}), more than max_dropped_fraction={self.config.max_dropped_fraction}. "
                "Nothing was trained on them; the run can be resumed"
            )

    def _update(self, collected: Collected) -> tuple[dict[int, ItemMetrics], dict[str, float]]:
        """`num_substeps` optimizer steps over the groups, in order. Runs on the device thread."""
        measured: dict[int, ItemMetrics] = {}
        updates: dict[str, float] = {}
        if not self.config.train:
            items = collected.flat
            return dict(zip(map(id, items), self.learner.measure(items, self.objective), strict=True)), updates
        rate = learning_rate(self.config, self.step)
        weight = {plan.name: plan.weight for plan in self.plans}
        groups = list(zip(collected.groups, collected.items, strict=True))
        for part in _split(groups, self.config.num_substeps):
            items = [item for _, members in part for item in members]
            if items:
                factors = [weight[group.dataset] for group, members in part for _ in members]
                results = self.learner.forward_backward(items, self.objective, factors)
                measured.update(zip(map(id, items), results, strict=True))
                commit()
                self._whole = False
                updates = self.learner.step(rate)
        self.learner.update_average()
        return measured, updates

    # --- what is written

    def _row(
        self,
        collected: Collected,
        measured: Mapping[int, ItemMetrics],
        updates: Mapping[str, float],
        timer: StageTimer,
    ) -> dict[str, float]:
        sums = SumMetrics()
        for item in collected.flat:
            add_episode(sums, item, measured[id(item)])
            if self.config.lmbda < 1:
                add_origin(sums, item, measured[id(item)])
        for group, items in zip(collected.groups, collected.items, strict=True):
            attempts = len(group.episodes) + len(group.dropped)
            scope = {"dataset": group.dataset, "teacher": group.teacher}
            sums.add("dropped_fraction", attempts - len(items), attempts, **scope)
            if self.config.lmbda < 1:
                own = not any(isinstance(episode, GivenEpisode) for episode in group.episodes)
                sums.add("on_policy_fraction", float(own), 1, **scope)
        times = timer.lap()
        tokens = sum(m.tokens for m in measured.values())
        row = {"step": self.step, **sums.as_dict(), **updates, **times}
        row["trained_tokens"] = tokens
        row["tokens_per_s"] = tokens / times["time/total"]
        row |= {f"dropped/{reason}": count / collected.attempts for reason, count in collected.dropped.items()}
        row["peak_memory_mb"] = peak_memory_mb(self.learner.lm.device)
        row |= {f"dataset/{plan.name}/epoch": plan.cursor.epoch for plan in self.plans}
        return row

    def _write_episodes(self, collected: Collected, measured: Mapping[int, ItemMetrics]) -> None:
        rows = (episode_row(item, measured[id(item)], self.renderer, self._texts) for item in collected.flat)
        self.run_dir.write_episodes(self.step, rows)

    async def evaluate(self) -> dict[str, float]:
        """Evaluate every set, append one row of `eval/…` metrics."""
        judge = Judge(self.learner, self.teachers, self.exact_eval) if self.teachers else None
        row: dict[str, float] = {"step": self.step}
        started = time.perf_counter()
        for eval_set in self.eval_sets:
            metrics = await evaluate(
                eval_set, self.sampler, self.renderer,
                temperature=self.config.temperature, samples=self.config.eval_samples,
                seed=derive_seed(self.config.seed, "eval"),  # the same draws at every evaluation
                judge=judge, learner=self.learner,
            )  # fmt: skip
            scope = f"eval/{eval_set.name}/" if len(self.eval_sets) > 1 else "eval/"
            row |= {name.replace("eval/", scope, 1): value for name, value in metrics.items()}
        if len(row) > 1:
            row["time/evaluation"] = time.perf_counter() - started
            self.run_dir.append_metrics(row)
            self.trackers.log(row)
            self.progress.update(row)
        return row

    def _evaluated(self, step: int) -> bool:
        rows = [row for row in self.run_dir.read_metrics() if row["step"] == step]
        return any(name.startswith("eval/") and not is_of_a_teacher(name) for row in rows for name in row)

    # --- checkpoints

    def save(self, *, final: bool = False) -> Path:
        """Write a checkpoint of the last finished step, and the report."""

        def write(folder: Path) -> None:
            self.learner.save(folder)
            self.renderer.tokenizer.save_pretrained(folder)
            state = {"step": self.step, "seed": self.config.seed, "cursors": self._cursor_states}
            (folder / "trainer_state" / "state.json").write_text(json.dumps(state))

        path = self.run_dir.write_checkpoint(self.step, write, final=final)
        try:
            self.run_dir.prune(self.config.keep_checkpoints)
            write_report(self.run_dir.path)
        except OSError as error:  # the checkpoint is there: what is missing now can be made later
            self.progress.message(f"the report or an old checkpoint could not be written or removed: {error}")
        return path

    def restore(self, folder: Path) -> None:
        """Go on from a checkpoint, whose weights the learner already has. Raises `CheckpointError`."""
        try:
            state = json.loads((folder / "trainer_state" / "state.json").read_text())
            self.learner.load_optimizer(folder)
            for plan, cursor_state in zip(self.plans, state["cursors"], strict=True):
                plan.cursor.load_state(cursor_state)
            self.step, self._cursor_states = state["step"], state["cursors"]
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{folder}: its trainer_state cannot be read: {error!r}") from error


def _split(groups: Sequence[GroupT], parts: int) -> list[Sequence[GroupT]]:
    bounds = [round(i * len(groups) / parts) for i in range(parts + 1)]
    return [groups[a:b] for a, b in itertools.pairwise(bounds)]


def is_of_a_teacher(metric: str) -> bool:
    """Whether an evaluation's metric is about what a teacher answers, as `eval/teacher_accuracy`."""
    return metric.startswith("eval/") and metric.rpartition("/")[2].startswith("teacher_")


def add_episode(sums: SumMetrics, item: TrainingItem, measured: ItemMetrics) -> None:
    """One episode's share of a step's metrics: in total, of its dataset, and of its teacher."""
    episode = item.episode
    scope = {"dataset": episode.dataset, "teacher": episode.teacher}
    for name, values in measured.values.items():
        known = values[~np.isnan(values)]  # NaN: of a token that the teacher could not score
        sums.add(_METRIC_NAMES.get(name, name), float(known.sum()), len(known), **scope)
    for name, opinion in item.signal.opinions.items() if item.signal else ():
        own = measured.values["kl"] + measured.values["teacher_logprob"]  # the student's logprob
        sums.add(f"teacher/{name}/kl", float((own - opinion.logprobs.numpy()).sum()), measured.tokens)
        if opinion.topk_mass is not None:
            sums.add(f"teacher/{name}/topk_mass", float(opinion.topk_mass.sum()), measured.tokens)
    if "ratio" in measured.values:
        sums.add_max("ratio/max", float(measured.values["ratio"].max()), **scope)
    if "sampler_gap" in measured.values:
        sums.add_max("sampler_gap/max", float(measured.values["sampler_gap"].max()), **scope)
    sums.add("completion_tokens_mean", episode.num_sampled, 1, **scope)
    sums.add("prompt_tokens_mean", len(episode) - episode.num_sampled, 1, **scope)
    sums.add("truncated_fraction", float(episode.truncated), 1, **scope)
    sums.add("reward", episode.reward, 1, **scope)
    for name, value in episode.metrics.items():
        sums.add(f"env/{name}", value, 1, **scope)
    sums.add_count("trained_episodes", 1, **scope)


def add_origin(sums: SumMetrics, item: TrainingItem, measured: ItemMetrics) -> None:
    """The KL on what the student sampled and on given answers, apart: only on its own samples is it one."""
    if "kl" not in measured.values:  # of an objective without a teacher
        return
    episode = item.episode
    name = "given/kl" if isinstance(episode, GivenEpisode) else "on_policy/kl"
    total = float(measured.values["kl"].sum())
    sums.add(name, total, measured.tokens, dataset=episode.dataset, teacher=episode.teacher)


_METRIC_NAMES = {
    "ratio": "ratio/mean",
    "ratio_truncated": "ratio/truncated_fraction",
    "sampler_gap": "sampler_gap/mean",
}
