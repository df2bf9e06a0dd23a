"""Episodes that nobody samples: answers that a dataset gives, or attempts that were saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from envs.datasets import Row
from envs.rendering import Renderer
from envs.text_encoding import Literals, TextEncoder
from envs.types import Env, Episode, Message, StopReason, Turn
from errors import DataError


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
        raise DataError(f"{row.row_id}: has no completion, which is what there is to learn")
    prompt = list(renderer.prompt(row.messages))
    answer = answer_ids(renderer, row.completion)
    if len(prompt) >= max_length:
        raise DataError(f"{row.row_id}: its prompt has {len(prompt)} tokens, which leaves no room in {max_length}")
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
