"""What a teacher answers itself, and whether a server that answered in its place was that teacher."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import anyio
import numpy as np

from envs.datasets import Row
from envs.given import GivenGroupBuilder
from envs.rendering import Renderer
from envs.rollout import derive_seed
from envs.types import Episode, EpisodeLog, Observation, Sampled, SamplingParams, StopReason
from errors import ConfigError, DataError
from models.types import Sampler, Signal, TeacherView
from models.vllm.handover import ALLOWED
from models.vllm.preflight import Asked
from recipes.setup import CheckedModels

logger = logging.getLogger(__name__)


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
    theirs, ours = (renderer.tokenizer.get_vocab().values() for renderer in (teacher.renderer, student))
    foreign = frozenset(theirs) - frozenset(ours)
    episodes: dict[int, Episode] = {}

    async def one(i: int, row: Row) -> None:
        params = SamplingParams(
            max_tokens=max_tokens,
            stop=teacher.renderer.stop,
            temperature=temperature,
            seed=derive_seed(seed, row.row_id),
        )
        sampled = await sampler.sample(teacher.renderer.prompt(row.teacher_messages or row.messages), params)
        sampled = replace(sampled, token_ids=[mine.get(token, token) for token in sampled.token_ids])
        sampled = without_foreign_tokens(row, sampled, foreign, teacher.renderer)
        log = EpisodeLog(Observation(student.prompt(row.messages), row.messages))
        log.append_sampled(sampled)
        builder = GivenGroupBuilder(dataset, row.row_id, teacher.name, row.teacher_messages, ())
        ended = StopReason.COMPLETED if sampled.stopped else StopReason.MAX_TOKENS
        episodes[i] = log.finish(builder, ended, 0.0, {}, {})

    async with anyio.create_task_group() as tasks:
        for i, row in enumerate(rows):
            tasks.start_soon(one, i, row)
    return [episodes[i] for i in range(len(rows))]


def without_foreign_tokens(row: Row, sampled: Sampled, foreign: frozenset[int], teacher: Renderer) -> Sampled:
    """The answer up to the first token that the student does not have. Raises `DataError` where nothing is left."""
    length = next((i for i, token in enumerate(sampled.token_ids) if token in foreign), len(sampled.token_ids))
    if length == len(sampled.token_ids):
        return sampled
    text = teacher.tokenizer.decode([sampled.token_ids[length]])
    if length == 0:
        raise DataError(
            f"{row.place}: the teacher's answer begins with {text!r}, a token that the student does not have. Have "
            "the teacher answer otherwise (teacher_chat_template_kwargs, e.g. without thinking; teacher_messages), or "
            "capture given completions"
        )
    logger.warning("%s: the answer is cut before %r, a token that the student does not have", row.row_id, text)
    return replace(sampled, token_ids=sampled.token_ids[:length], logprobs=sampled.logprobs[:length], stopped=False)


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
