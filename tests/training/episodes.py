"""Small episodes and training items, made through `EpisodeLog` as a rollout would make them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from envs.types import Env, Episode, EpisodeLog, Message, Observation, Sampled, StopReason
from models.types import Signal
from training.packing import TrainingItem


@dataclass
class Row:
    """The names that an episode carries; makes no environments."""

    dataset: str = "data"
    row_id: str = "row"
    teacher: str = "teacher"
    teacher_messages: tuple[Message, ...] | None = None

    async def make_envs(self) -> Sequence[Env]:
        raise NotImplementedError

    async def cleanup(self) -> None:
        raise NotImplementedError


def make_episode(
    prompt: Sequence[int],
    turns: Sequence[tuple[Sequence[int], Sequence[int]]],
    logprobs: Sequence[float] | None = None,
    row: Row | None = None,
) -> Episode:
    """An episode of `turns` = (sampled ids, ids the environment appended). `logprobs` is one number per sampled
    token over all turns, -1 where not given."""
    log = EpisodeLog(Observation(list(prompt), ({"role": "user", "content": "?"},)))
    count = sum(len(sampled) for sampled, _ in turns)
    left = list(logprobs if logprobs is not None else [-1.0] * count)
    assert len(left) == count
    for sampled, appended in turns:
        log.append_sampled(Sampled(list(sampled), [left.pop(0) for _ in sampled], stopped=True))
        if appended:
            log.append_observation(Observation(list(appended), ({"role": "tool", "content": "!"},)))
    return log.finish(row or Row(), StopReason.COMPLETED, 0.0, {}, {})


def random_episode(generator: np.random.Generator, vocab_size: int, turns: int, longest_turn: int = 4) -> Episode:
    """A prompt and `turns` turns with one to three tokens of the environment between them."""

    def draw(low: int, high: int) -> list[int]:
        return generator.integers(0, vocab_size, generator.integers(low, high + 1)).tolist()

    body = [(draw(1, longest_turn), draw(1, 3) if t < turns - 1 else []) for t in range(turns)]
    count = sum(len(sampled) for sampled, _ in body)
    return make_episode(draw(2, 6), body, generator.uniform(-4.0, -0.5, count).tolist())


def item_of_length(length: int, sampled: int = 1) -> TrainingItem:
    """An item of `length` tokens, the last `sampled` of which train. No signal."""
    return TrainingItem(make_episode([1] * (length - sampled), [([2] * sampled, [])]), None)


def sampled_item(episode: Episode, teacher_logprobs: Sequence[float] | torch.Tensor) -> TrainingItem:
    return TrainingItem(episode, Signal(logprobs=torch.as_tensor(teacher_logprobs, dtype=torch.float32)))
