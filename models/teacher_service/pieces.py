"""Views cut into requests so that each of them, and its answer, is as large as a service takes and no larger."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from models.teacher_service.messages import MAX_VIEWS, Reading
from models.types import TeacherView


@dataclass(frozen=True)
class Piece:
    """Some positions of one view. What comes after them has no say in a causal model, and is read with the last."""

    view: int  # its place among the views
    reading: Reading


def cut(views: Sequence[TeacherView], *, tokens: int, scored: int) -> list[list[Piece]]:
    """Pieces in the views' order, for one request each: of up to `tokens` tokens unless a single piece has more, of up
    to `scored` positions, and never more than `MAX_VIEWS`. A view that is cut has its beginning read once for every
    piece."""
    requests: list[list[Piece]] = []
    held_tokens = held_scored = 0
    for piece in _pieces(views, scored):
        size, count = len(piece.reading.ids), len(piece.reading.positions)
        full = not requests or len(requests[-1]) == MAX_VIEWS
        if full or held_tokens + size > tokens or held_scored + count > scored:
            requests.append([])
            held_tokens = held_scored = 0
        requests[-1].append(piece)
        held_tokens += size
        held_scored += count
    return requests


def _pieces(views: Sequence[TeacherView], scored: int) -> Iterator[Piece]:
    for i, view in enumerate(views):
        positions = np.unique(view.positions)  # the wire knows a set of them
        for start in range(0, max(1, len(positions)), scored):
            some = positions[start : start + scored]
            end = some[-1] + 1 if start + scored < len(positions) else len(view.token_ids)
            yield Piece(i, Reading(view.token_ids[:end], some))


def join(
    views: Sequence[TeacherView],
    requests: Sequence[Sequence[Piece]],
    answers: Sequence[Mapping[str, np.ndarray]],
) -> list[dict[str, np.ndarray]]:
    """Of each view, a row for each of its positions, which may name one twice and in any order. `answers` holds one for
    each request, with a row for each of its positions."""
    found: list[dict[str, list[np.ndarray]]] = [{} for _ in views]
    for pieces, answer in zip(requests, answers, strict=True):
        start = 0
        for piece in pieces:
            end = start + len(piece.reading.positions)
            for name, rows in answer.items():
                found[piece.view].setdefault(name, []).append(rows[start:end])
            start = end
    return [
        {name: _in_order(view, parts) for name, parts in arrays.items()}
        for view, arrays in zip(views, found, strict=True)
    ]


def _in_order(view: TeacherView, parts: Sequence[np.ndarray]) -> np.ndarray:
    rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
    _, order = np.unique(view.positions, return_inverse=True)
    return rows if np.array_equal(order, np.arange(len(rows))) else rows[order]
