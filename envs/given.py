"""Episodes that nobody samples: answers that a dataset gives, or attempts that were saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from envs.rendering import Renderer
from envs.text_encoding import Literals, TextEncoder
from envs.types import Env, Episode, Message


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
