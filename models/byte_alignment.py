"""A teacher of another tokenizer: the student's text in its tokens, and the spans that both cut alike.

Tokens of the two sides cannot be compared one by one. But wherever a token of the student and one of the teacher end at
the same byte of the text, both have written the same bytes since the last such place: that is a span, and of a span
each side has one log-probability, the sum over its tokens. What it estimates, and its biases: `docs/formulas.md`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np

from envs.rendering import Renderer, control_tokens
from errors import TokenizerMismatchError
from models.types import Spans

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_NO_TEXT = b"\xff"  # no UTF-8 has this byte


@dataclass(frozen=True)
class Reading:
    """One sampled turn as the teacher reads it. Spans count from 0; -1 is a token in none."""

    token_ids: list[int]
    teacher_spans: list[int]  # of every one of `token_ids`
    student_spans: list[int]  # of every sampled token
    spans: int


def one_by_one(token_ids: list[int]) -> Reading:
    """A turn whose tokens are the student's."""
    spans = [*range(len(token_ids))]
    return Reading(token_ids, spans, spans, len(spans))


def joined(readings: Sequence[tuple[int, Reading]]) -> tuple[np.ndarray, Spans]:
    """Turns that start at these positions: where the teacher's scored tokens are, and the spans of all turns."""
    positions: list[int] = []
    teacher: list[int] = []
    student: list[int] = []
    count = 0
    for start, reading in readings:
        positions += [start + i for i, span in enumerate(reading.teacher_spans) if span >= 0]
        teacher += [count + span for span in reading.teacher_spans if span >= 0]
        student += [count + span if span >= 0 else -1 for span in reading.student_spans]
        count += reading.spans
    spans = Spans(np.array(teacher, dtype=np.int64), np.array(student, dtype=np.int64), count)
    return np.array(positions, dtype=np.int64), spans


@dataclass(frozen=True)
class ByteAlignment:
    """Reads turns that `student` wrote with the tokenizer of `teacher`.

    The token that ended the turn is the teacher's end of turn; other control tokens are the teacher's of the same
    text, if it has one. All else is text, and text forges no control token. What is no UTF-8 is U+FFFD, as everybody
    reads it, but for half a character at the end of a turn that was cut: that is in no span. Where the teacher's tokens
    are other text (a character that its tokenizer does not know), the rest of the turn is in none either. Raises
    `TokenizerMismatchError` for a tokenizer whose tokens cannot be read as bytes.
    """

    student: Renderer
    teacher: Renderer

    def read(self, sampled: Sequence[int]) -> Reading:
        ids = [int(i) for i in sampled]
        ended = ids[-1] in self.student.stop.token_ids
        read: list[int] = []
        teacher: list[int] = []
        student: list[int] = []
        spans, whole = 0, True
        for control, group in groupby(ids[:-1] if ended else ids, key=self._controls.get):
            run = list(group)
            if control is None:
                mine = self._mine(run, first=not student)
                cut = not ended and len(student) + len(run) == len(ids)
                theirs = self.teacher.encode_text(readable(b"".join(mine), cut=cut)[0])
                s, t, count, same = align(mine, self._their_bytes.of(theirs), cut=cut)
            else:
                theirs, s, t, count, same = [control] * len(run), [*range(len(run))], [*range(len(run))], len(run), True
            read += theirs
            student += [spans + k if whole and k >= 0 else -1 for k in s]
            teacher += [spans + k if whole and k >= 0 else -1 for k in t]
            spans, whole = spans + count * whole, whole and same
        if ended:
            read.append(self.teacher.end_of_turn_id)
            student.append(spans if whole else -1)
            teacher.append(spans if whole else -1)
            spans += whole
        return Reading(read, teacher, student, spans)

    @cached_property
    def _my_bytes(self) -> TokenBytes:
        return TokenBytes(self.student)

    @cached_property
    def _their_bytes(self) -> TokenBytes:
        return TokenBytes(self.teacher)

    @cached_property
    def _controls(self) -> dict[int, int]:
        """Control tokens of both sides that have the same text, from the student's id to the teacher's. Not what ends
        the teacher's turns: a student that writes it in the midst of a turn has not ended it."""
        theirs = {text: i for i, text in control_tokens(self.teacher.tokenizer).items()}
        shared = {i: theirs[text] for i, text in control_tokens(self.student.tokenizer).items() if text in theirs}
        return {i: there for i, there in shared.items() if there != self.teacher.end_of_turn_id}

    def _mine(self, run: list[int], *, first: bool) -> list[bytes]:
        pieces = self._my_bytes.of(run)
        # SentencePiece opens a text with a space that nobody wrote, and takes it away when it decodes
        if first and pieces[0].startswith(b" ") and not self.student.tokenizer.decode(run).startswith(" "):
            pieces[0] = pieces[0][1:]
        return pieces


def align(
    student: Sequence[bytes], teacher: Sequence[bytes], *, cut: bool = False
) -> tuple[list[int], list[int], int, bool]:
    """Each token's span on both sides, how many there are, and whether both sides are the same text to the end.

    Both are cut at every byte of the text where a token of each ends, up to the first byte that differs."""
    text, places, clean = readable(b"".join(student), cut=cut)
    whole = [text.encode(), b"".join(teacher)]
    shared = next((i for i, (a, b) in enumerate(zip(*whole, strict=False)) if a != b), min(map(len, whole)))
    ends = np.cumsum([len(piece) for piece in student], dtype=np.int64)
    mine, theirs = places[ends], np.cumsum([len(piece) for piece in teacher], dtype=np.int64)
    cuts = np.intersect1d(mine[clean[ends]], theirs)
    cuts = cuts[(cuts > 0) & (cuts <= shared)]
    spans = [[int(k) if k < len(cuts) else -1 for k in np.searchsorted(cuts, side)] for side in (mine, theirs)]
    return spans[0], spans[1], len(cuts), whole[0] == whole[1] and bool(clean[-1])


def readable(written: bytes, *, cut: bool) -> tuple[str, np.ndarray, np.ndarray]:
    """The text of bytes, U+FFFD for what is none; for every place between two bytes (int64 [length + 1]) where it is in
    the text's bytes; and whether it is there exactly, or within something that U+FFFD stands for. `cut`: half a
    character at the end has no exact place."""
    text, done, at = "", 0, 0
    places, clean = np.zeros(len(written) + 1, dtype=np.int64), np.ones(len(written) + 1, dtype=bool)
    while done < len(written):
        try:
            good, bad, half = written[done:].decode(), 0, False
        except UnicodeDecodeError as error:
            good, bad = written[done : done + error.start].decode(), error.end - error.start
            half = cut and error.reason == "unexpected end of data"
        size = len(good.encode())
        places[done : done + size + 1] = np.arange(at, at + size + 1)
        text, done, at = text + good, done + size, at + size
        if bad:
            places[done + 1 : done + bad] = at + 1
            clean[done + 1 : done + bad] = False
            places[done + bad], clean[done + bad] = at + len("\ufffd".encode()), not half
            text, done, at = text + "\ufffd", done + bad, at + len("\ufffd".encode())
    return text, places, clean


class TokenBytes:
    """The bytes that each token of a tokenizer writes. Raises `TokenizerMismatchError` where that cannot be known."""

    def __init__(self, renderer: Renderer) -> None:
        self._tokenizer = renderer.tokenizer
        self._added = control_tokens(renderer.tokenizer)
        self._known: dict[int, bytes] = {}
        backend = getattr(renderer.tokenizer, "backend_tokenizer", None)
        decoders = [] if backend is None else list(_flat(json.loads(backend.to_str())["decoder"] or {}))
        kinds = {decoder["type"] for decoder in decoders}
        self._byte_level = "ByteLevel" in kinds
        self._byte_fallback = "ByteFallback" in kinds
        self._space = next(filter(None, map(_stands_for_space, decoders)), None)
        probe = renderer.encode_text(PROBE_TEXT) if self._byte_level or self._space or self._byte_fallback else []
        said = renderer.tokenizer.decode(probe, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if not probe or b"".join(self.of(probe)).decode(errors="replace").removeprefix(" ") != said.removeprefix(" "):
            raise TokenizerMismatchError(
                f"the tokenizer of {renderer.name} cannot be aligned by bytes: which bytes its tokens write is not "
                f"known (decoder: {', '.join(sorted(kinds)) or 'none'}). Byte-level and SentencePiece tokenizers can"
            )

    def of(self, ids: Sequence[int]) -> list[bytes]:
        return [self._of(i) for i in ids]

    def _of(self, token: int) -> bytes:
        if token not in self._known:
            self._known[token] = self._written(token)
        return self._known[token]

    def _written(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # a padded embedding
            return _NO_TEXT
        if self._byte_level:
            return b"".join(_BYTE_OF.get(character) or character.encode() for character in piece)
        if self._byte_fallback and (found := _BYTE.fullmatch(piece)):
            return bytes.fromhex(found[1])
        return (piece.replace(self._space, " ") if self._space else piece).encode()


PROBE_TEXT = "Ünïcode, 3.14159 + 2 = 5?\n\n\tdef f(x):  return x**2  # ok\r\n漢字 🙂"


def _flat(decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if decoder.get("type") == "Sequence":
        for inner in decoder["decoders"]:
            yield from _flat(inner)
    elif decoder:
        yield decoder


def _stands_for_space(decoder: dict[str, Any]) -> str | None:
    if decoder["type"] == "Metaspace":
        return decoder["replacement"]
    if decoder["type"] == "Replace" and decoder["content"] == " ":
        return decoder["pattern"].get("String")
    return None


def _byte_alphabet() -> dict[str, bytes]:
    """GPT-2's characters for bytes: those that print stand for themselves, the others for 256 and up, in order."""
    printing = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(b): bytes([b]) for b in printing} | {chr(256 + i): bytes([b]) for i, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()
