"""Episodes that nobody samples: answers that a dataset gives, or attempts that were saved."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from envs.datasets import Row
from envs.rendering import Renderer
from envs.text_encoding import Literals, TextEncoder
from envs.types import Env, Episode, Message, StopReason, Turn
from errors import DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GivenGroupBuilder:
    """A group of episodes that are there already: `run_group` takes them as they are."""

    dataset: str
    row_id: str
    teacher: str
    teacher_messages: tuple[Message, ...] | None
    given: tuple[Episode, ...]

    @property
    def group_size(self) -> int:
        return len(self.given)

    async def make_envs(self) -> Sequence[Env]:
        raise TypeError("given episodes have no environments")

    async def cleanup(self) -> None:
        pass


def answered(rows: Sequence[Row], *, strict: bool, why: str) -> list[Row]:
    """The rows that have a completion. Others are left out with a warning, or if `strict` refused. Raises `DataError`,
    also if none is left; `why` says what completions are for."""
    found = [row for row in rows if row.completion is not None]
    missing = next((row for row in rows if row.completion is None), None)
    if missing is not None and (strict or not found):
        raise DataError(f"{missing.place}: has no completion, {why}")
    if missing is not None:
        gone = len(rows) - len(found)
        logger.warning("left out %d rows without a completion, the first is %s", gone, missing.row_id)
    return found


def answer_ids(renderer: Renderer, text: str) -> list[int]:
    """Ids of an answer as the model would have written it, with the token that ends its turn.

    The text of a special token stays text; `<think>` and its like are the model's to write."""
    encoder = TextEncoder(renderer.tokenizer)
    literals = Literals(text)
    (message,) = encoder.hide_messages([{"role": "assistant", "content": text}], literals)
    return [*encoder.encode(message["content"], literals), renderer.end_of_turn_id]


@dataclass(frozen=True, eq=False)
class GivenEpisode(Episode):
    """An answer that was given and not sampled: `sampled` marks its tokens, and nobody knows with which probability
    they were written. Its `sampler_logprobs` are NaN everywhere, so that a loss which reads them is seen to."""

    def _check_logprobs(self) -> None:
        if np.isfinite(self.sampler_logprobs).any():
            raise ValueError("a given episode has no sampler logprobs")


def given_answer(row: Row, renderer: Renderer, *, dataset: str, teacher: str, max_length: int) -> GivenEpisode:
    """A row's completion as the answer to its prompt, both in the renderer's format, cut off at `max_length` tokens.

    Raises `DataError` if there is no completion, or if the prompt leaves it no room."""
    if row.completion is None:
        raise DataError(f"{row.place}: has no completion, which is what there is to learn")
    prompt = list(renderer.prompt(row.messages))
    answer = answer_ids(renderer, row.completion)
    if len(prompt) >= max_length:
        raise DataError(f"{row.place}: its prompt has {len(prompt)} tokens, which leaves no room in {max_length}")
    ids = [*prompt, *answer][:max_length]
    return GivenEpisode(
        dataset=dataset,
        row_id=row.row_id,
        teacher=teacher,
        prompt_messages=row.messages,
        teacher_messages=row.teacher_messages,
        token_ids=np.array(ids, dtype=np.int32),
        sampled=np.arange(len(ids)) >= len(prompt),
        sampler_logprobs=np.full(len(ids), np.nan, dtype=np.float32),
        turns=(Turn(len(prompt), len(ids)),),
        stop_reason=StopReason.COMPLETED if len(ids) == len(prompt) + len(answer) else StopReason.MAX_TOKENS,
    )


def given_builder(
    renderer: Renderer, dataset: str, teacher_of: Callable[[Row], str], *, max_tokens: int
) -> Callable[[Row], GivenGroupBuilder]:
    """How a row's completion becomes an episode in place of attempts, cut off where an attempt would be."""

    def builder(row: Row) -> GivenGroupBuilder:
        teacher, longest = teacher_of(row), len(renderer.prompt(row.messages)) + max_tokens
        episode = given_answer(row, renderer, dataset=dataset, teacher=teacher, max_length=longest)
        return GivenGroupBuilder(dataset, row.row_id, teacher, row.teacher_messages, (episode,))

    return builder
