"""What a teacher answers itself, and whether a server that answered in its place was that teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import anyio
import numpy as np

from envs.datasets import Row
from envs.given import GivenGroupBuilder
from envs.rollout import derive_seed
from envs.types import Episode, EpisodeLog, Observation, SamplingParams, StopReason
from errors import ConfigError
from models.types import Sampler, Signal, TeacherView
from models.vllm.handover import ALLOWED
from models.vllm.preflight import Asked
from recipes.setup import CheckedModels


async def sampled_answers(
    rows: Sequence[Row],
    sampler: Sampler,
    models: CheckedModels,
    *,
    dataset: str,
    max_tokens: int,
    temperature: float,
    seed: int,
) -> list[Episode]:
    """The teacher's answers to its own prompts, after the student's prompts and with the student's end of turn."""
    teacher, student = models.only_teacher, models.student_renderer
    swap = teacher.views.swap
    mine = {} if swap is None else {swap[0]: swap[1], swap[1]: swap[0]}
    episodes: dict[int, Episode] = {}

    async def one(i: int, row: Row) -> None:
        params = SamplingParams(
            max_tokens=max_tokens,
            stop=teacher.renderer.stop,
            temperature=temperature,
            seed=derive_seed(seed, row.row_id),
        )
        sampled = await sampler.sample(teacher.renderer.prompt(row.teacher_messages or row.messages), params)
        log = EpisodeLog(Observation(student.prompt(row.messages), row.messages))
        log.append_sampled(replace(sampled, token_ids=[mine.get(token, token) for token in sampled.token_ids]))
        builder = GivenGroupBuilder(dataset, row.row_id, teacher.name, row.teacher_messages, ())
        ended = StopReason.COMPLETED if sampled.stopped else StopReason.MAX_TOKENS
        episodes[i] = log.finish(builder, ended, 0.0, {}, {})

    async with anyio.create_task_group() as tasks:
        for i, row in enumerate(rows):
            tasks.start_soon(one, i, row)
    return [episodes[i] for i in range(len(rows))]


def check_who_answered(
    asked: Asked, episodes: Sequence[Episode], views: Sequence[TeacherView], signals: Sequence[Signal]
) -> None:
    """Raises `ConfigError` if the answers are not as likely to the teacher as to what sampled them."""
    gaps = []
    for episode, view, signal in zip(episodes, views, signals, strict=True):
        assert signal.logprobs is not None
        gaps.append(np.abs(episode.sampler_logprobs[view.student_positions] - signal.logprobs.numpy()))
    if not (gap := float(np.concatenate(gaps).mean())) <= (allowed := ALLOWED["bfloat16"]):
        raise ConfigError(
            f"{asked.option}={','.join(asked.urls)}: the logprobs of its answers differ from the teacher's by "
            f"{gap:.2g} nats a token, more than {allowed}: it serves another model, or other weights. Nothing of these "
            "answers was written. Start it with the teacher's folder or hub id"
        )
