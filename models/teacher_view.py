"""What a teacher reads: the student's tokens verbatim, everything around them in the teacher's own format."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from envs.rendering import Renderer
from envs.types import Episode
from models.byte_alignment import ByteAlignment, Reading, joined, one_by_one
from models.types import TeacherView


@dataclass(frozen=True)
class ViewMaker:
    """Makes `TeacherView`s for one student-teacher pair.

    Where both formats are the same and nothing privileged is given, the view is the episode itself.
    Otherwise the prompt and the environment's messages, with the teacher's hints after them, are rendered anew in
    the teacher's format and the sampled ids copied. Where the formats end a turn with different tokens, these two
    ids trade places, so that the student's end-of-turn is judged as the teacher's. With an `alignment` the sampled
    text is written in the teacher's tokens, and the view has spans.
    """

    student: Renderer
    teacher: Renderer
    alignment: ByteAlignment | None = None  # for a teacher of another tokenizer

    @property
    def swap(self) -> tuple[int, int] | None:
        pair = (self.student.end_of_turn_id, self.teacher.end_of_turn_id)
        return None if pair[0] == pair[1] or self.alignment is not None else pair

    def view(self, episode: Episode) -> TeacherView:
        own = np.flatnonzero(episode.sampled)
        privileged = episode.teacher_messages is not None or episode.teacher_hints
        if self.student.fingerprint == self.teacher.fingerprint and not privileged:
            return TeacherView(episode.token_ids.astype(np.int64), own, own, row_id=episode.row_id)
        messages = episode.teacher_messages or episode.prompt_messages
        ids = list(self.teacher.prompt(messages, episode.tools))
        readings: list[tuple[int, Reading]] = []
        for number, turn in enumerate(episode.turns, start=1):
            sampled = episode.token_ids[turn.start : turn.end]
            reading = self._read(sampled)
            readings.append((len(ids), reading))
            ids.extend(reading.token_ids)
            if turn.observation:
                ended = int(sampled[-1]) in self.student.stop.token_ids
                hints = [m for hint in episode.teacher_hints if hint.follows(number) for m in hint.messages]
                said = [*turn.observation, *hints]
                ids.extend(self.teacher.continuation(said, ended=ended, tool_calls=turn.tool_calls))
        positions, spans = joined(readings)
        whole = np.array(ids, dtype=np.int64)
        if self.alignment is None:
            return TeacherView(whole, positions, own, self.swap, row_id=episode.row_id)
        return TeacherView(whole, positions, own, spans=spans, row_id=episode.row_id)

    def _read(self, sampled: np.ndarray) -> Reading:
        if self.alignment is not None:
            return self.alignment.read(sampled.tolist())
        return one_by_one(self._mapped(sampled))

    def _mapped(self, sampled: np.ndarray) -> list[int]:
        if self.swap is None:
            return sampled.tolist()
        a, b = self.swap
        return [b if token == a else a if token == b else token for token in sampled.tolist()]


def exchanged(ids: Int[Tensor, "n k"], swap: tuple[int, int] | None) -> Int[Tensor, "n k"]:
    """The teacher's ids as the student's: the two end-of-turn tokens trade places."""
    if swap is None:
        return ids
    a, b = swap
    return torch.where(ids == a, b, torch.where(ids == b, a, ids))
