"""Held-out evaluation: accuracy, length, truncation, and the reverse KL to the teacher, with errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import anyio.to_thread
import numpy as np

from envs.datasets import GraderName, Row
from envs.grading import accuracy_with_error, grade
from envs.rendering import Renderer
from envs.types import EnvGroupBuilder, Episode
from errors import NoSignalError
from models.device_thread import compute
from models.types import Sampler, SignalKind
from training.collect import Blend, Collected, Teacher, collect
from training.distribution_losses import JSD
from training.learner import ItemMetrics, Learner
from training.metrics import StageTimer
from training.objectives import SFT, Objective, ReverseKL
from training.packing import TrainingItem


@dataclass(frozen=True)
class EvalSet:
    """Held-out rows of one dataset. `builder(row, samples)` makes the attempts at a row. Without a `grader`
    the episodes bring their own reward."""

    name: str
    rows: Sequence[Row]
    grader: GraderName | None
    builder: Callable[[Row, int], EnvGroupBuilder]
    answers: Sequence[Episode] = ()  # given ones to the rows: how unlikely they are to the student is measured

    @property
    def rewarded(self) -> bool:
        return self.grader is None


@dataclass(frozen=True)
class Judge:
    """What is needed to measure the student's reverse KL to its teacher. `exact`: over the whole
    vocabulary, for teachers that can give it."""

    learner: Learner
    teachers: Mapping[str, Teacher | Blend]
    exact: bool = True


async def evaluate(
    eval_set: EvalSet,
    sampler: Sampler,
    renderer: Renderer,
    *,
    temperature: float,
    samples: int,
    seed: int,
    judge: Judge | None = None,
    learner: Learner | None = None,
) -> dict[str, float]:
    """Greedy and sampled attempts at every row, as a flat dict of `eval/…` metrics.

    Accuracy is over rows with an `expected_answer`; rows that bring a reward are attempted by sampling
    alone. With a `learner`, the loss on given answers is measured too. Standard errors are over rows:
    attempts at one row are not independent. Raises `NoSignalError` if every attempt was dropped.
    """
    graded = [row for row in eval_set.rows if row.expected_answer is not None and not eval_set.rewarded]
    timer = StageTimer()
    metrics: dict[str, float] = {}
    if graded:
        greedy = await collect(
            [eval_set.builder(row, 1) for row in graded], sampler, {}, SignalKind.NONE,
            temperature=0.0, seed=seed, timer=timer,
        )  # fmt: skip
        metrics |= await _accuracy(eval_set, greedy, renderer, "eval/accuracy")
        metrics |= _shape(greedy, "eval/greedy_")
    if eval_set.answers and learner is not None:
        await sampler.sleep()
        items = [TrainingItem(answer, None) for answer in eval_set.answers]
        measured = await compute(learner.measure, items, SFT())
        metrics |= _token_mean(measured, [answer.row_id for answer in eval_set.answers], "nll", "eval/nll")
    if samples:
        exact = judge is not None and judge.exact
        need = SignalKind.NONE if judge is None else SignalKind.FULL if exact else SignalKind.SAMPLED
        teachers = {} if judge is None else judge.teachers
        sampled = await collect(
            [eval_set.builder(row, samples) for row in eval_set.rows], sampler, teachers, need,
            temperature=temperature, seed=seed, timer=timer,
        )  # fmt: skip
        if graded:
            metrics |= await _accuracy(eval_set, sampled, renderer, "eval/sampled_accuracy")
        if eval_set.rewarded:
            metrics |= _reward(sampled)
        metrics |= _shape(sampled, "eval/")
        if judge is not None:
            objective: Objective = JSD(beta=1.0) if exact else ReverseKL()
            await sampler.sleep()
            measured = await compute(judge.learner.measure, sampled.flat, objective)
            rows = [item.episode.row_id for item in sampled.flat]
            metrics |= _token_mean(measured, rows, "kl", "eval/reverse_kl")
            if exact:
                metrics |= _token_mean(measured, rows, "exact_kl", "eval/exact_reverse_kl")
    return metrics


def _episodes(collected: Collected) -> list[Episode]:
    episodes = [item.episode for item in collected.flat]
    if not episodes:
        raise NoSignalError(f"evaluation: every attempt was dropped ({dict(collected.dropped)})")
    return episodes


async def _accuracy(eval_set: EvalSet, collected: Collected, renderer: Renderer, name: str) -> dict[str, float]:
    answers = {row.row_id: row.expected_answer for row in eval_set.rows}
    episodes = [e for e in _episodes(collected) if answers[e.row_id] is not None]

    assert eval_set.grader is not None
    correct = []
    for episode in episodes:  # one by one: a thread cannot be stopped
        text = renderer.decode(episode.token_ids[episode.sampled].tolist())
        expected = answers[episode.row_id] or ""
        correct.append(await anyio.to_thread.run_sync(grade, eval_set.grader, text, expected))
    mean, error = accuracy_with_error(correct, [e.row_id for e in episodes])
    return {name: mean, f"{name}_se": error}


def _reward(collected: Collected) -> dict[str, float]:
    episodes = _episodes(collected)
    rewards = [e.reward for e in episodes]
    mean, error = accuracy_with_error(rewards, [e.row_id for e in episodes])  # type: ignore[arg-type]
    return {"eval/reward": mean, "eval/reward_se": error}


def _shape(collected: Collected, prefix: str) -> dict[str, float]:
    episodes = _episodes(collected)
    return {
        f"{prefix}length": sum(e.num_sampled for e in episodes) / len(episodes),
        f"{prefix}truncated_fraction": sum(e.truncated for e in episodes) / len(episodes),
        f"{prefix}dropped_fraction": collected.dropped.total() / collected.attempts,
    }


def _token_mean(measured: Sequence[ItemMetrics], rows: Sequence[str], key: str, name: str) -> dict[str, float]:
    """Mean per token over all episodes, with the error of that ratio taken over rows."""
    _, row = np.unique(rows, return_inverse=True)
    sums = np.bincount(row, [np.nansum(m.values[key]) for m in measured])
    counts = np.bincount(row, [np.isfinite(m.values[key]).sum() for m in measured])  # NaN: not scored
    mean = sums.sum() / counts.sum()
    n = len(sums)
    spread = ((sums - mean * counts) ** 2).sum() * (n / (n - 1)) if n > 1 else math.nan
    return {name: float(mean), f"{name}_se": float(math.sqrt(spread) / counts.sum())}
