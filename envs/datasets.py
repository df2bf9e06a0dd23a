"""Rows: the JSONL contract and its checks, held-out splits, and the resumable order rows are drawn in.

One JSON object per line; `messages` is required, the rest is optional:

    {"messages": [{"role": "user", "content": "…"}],   what the student sees
     "teacher_messages": […],                           the teacher scores under this prompt instead
     "teacher_hints": [{"after_turn": 2, "messages": […]}],   and is told this on the way, the student is not
     "teacher": "big", "expected_answer": "72", "completion": "…", "id": "…"}

Other keys are ignored and named once per file, with the nearest known name.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from envs.types import Message, TeacherHint
from errors import DataError

logger = logging.getLogger(__name__)

Record = dict[str, Any]
GraderName = Literal["math", "exact", "arithmetic"]


@dataclass(frozen=True)
class Row:
    """One prompt, and what is known about its answer."""

    row_id: str
    messages: tuple[Message, ...]  # never empty, never ends with the assistant: the student answers
    teacher_messages: tuple[Message, ...] | None = None  # same invariants
    teacher: str | None = None
    expected_answer: str | None = None
    completion: str | None = None  # a reference answer to `messages`
    teacher_hints: tuple[TeacherHint, ...] = ()  # in episodes of several turns
    source: str | None = field(default=None, compare=False)  # file and line, where it comes from a file here

    @property
    def place(self) -> str:
        """Its id, and where it is, for errors."""
        return self.row_id if self.source is None else f"{self.row_id} ({self.source})"


@dataclass(frozen=True)
class Dataset:
    """Named rows, and how their `expected_answer` is checked. No prompt is in both `train` and `test`."""

    name: str
    train: list[Row]
    test: list[Row]
    grader: GraderName


# --- the contract ---------------------------------------------------------------------------------


def _text(content: Any) -> str:
    """A message's content as one string; OpenAI's list of text parts is joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"expected a string or a list of text parts, got {content!r:.40}")
    for part in content:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise ValueError(f'expected parts {{"type": "text", "text": …}}, got {part!r:.60}')
    return "".join(part["text"] for part in content)


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can write half of a surrogate pair; no tokenizer can read it
        raise ValueError("holds half of a surrogate pair (\\ud800…\\udfff), which is no character") from None
    return text


def _number_as_text(value: Any) -> Any:
    if isinstance(value, bool):
        return value
    return str(value) if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)) else value


Text = Annotated[str, AfterValidator(_encodable)]
NonEmpty = Annotated[str, Field(min_length=1), AfterValidator(_encodable)]
NumberOrText = Annotated[NonEmpty, BeforeValidator(_number_as_text)]


class _MessageModel(BaseModel):
    model_config = ConfigDict(extra="allow")  # tool_calls, tool_call_id, name: the template's business

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Text, BeforeValidator(_text)]


class _HintMessageModel(_MessageModel):
    role: Literal["system", "developer", "user"]  # type: ignore[assignment]  # the student's turns are its own


class _HintModel(BaseModel):
    model_config = ConfigDict(extra="forbid")

    after_turn: Annotated[int, Field(ge=1)] | None = None
    messages: Annotated[list[_HintMessageModel], Field(min_length=1)]


class _RowModel(BaseModel):
    id: NumberOrText | None = None
    messages: Annotated[list[_MessageModel], Field(min_length=1)]
    teacher_messages: Annotated[list[_MessageModel], Field(min_length=1)] | None = None
    teacher_hints: list[_HintModel] = []
    teacher: NonEmpty | None = None
    expected_answer: NumberOrText | None = None
    completion: NonEmpty | None = None


def parse_row(obj: Any, where: str, *, default_id: str | None = None) -> Row:
    """Check one JSON object against the contract. Keys it does not know are left to the caller.

    A trailing assistant message is the reference answer: it moves to `completion`. `expected_answer`
    and `id` may be JSON numbers. The id falls back to `default_id`, then to `where`.

    Raises:
        DataError: "{where}: {reason}".
    """
    if not isinstance(obj, dict):
        raise DataError(f"{where}: expected an object with 'messages', got {obj!r:.60}")
    try:
        row = _RowModel.model_validate(_plain(obj))
    except ValidationError as error:
        raise DataError(f"{where}: {_reason(error)}") from None
    messages, completion = [_dump(m) for m in row.messages], row.completion
    if messages[-1]["role"] == "assistant":
        if completion is not None:
            raise DataError(f"{where}: messages ends with the assistant and there is a completion; keep one")
        answer = messages.pop()
        if not messages:
            raise DataError(f"{where}: messages: nothing before the assistant's answer")
        if not answer["content"]:
            raise DataError(f"{where}: messages: the assistant's final message is empty")
        completion = answer["content"]
    teacher_messages = None
    if row.teacher_messages is not None:
        teacher_messages = tuple(_dump(m) for m in row.teacher_messages)
        if teacher_messages[-1]["role"] == "assistant":
            raise DataError(
                f"{where}: teacher_messages must not end with the assistant: the student's answer follows it"
            )
    return Row(
        row_id=row.id or default_id or where,
        messages=tuple(messages),
        teacher_messages=teacher_messages,
        teacher=row.teacher,
        expected_answer=row.expected_answer,
        completion=completion,
        teacher_hints=tuple(TeacherHint(tuple(map(_dump, h.messages)), h.after_turn) for h in row.teacher_hints),
    )


def _plain(obj: dict[str, Any]) -> dict[str, Any]:
    """A copy without the Nones that Arrow writes for absent keys; a tool call's null content is ''."""

    def message(m: Any) -> Any:
        if not isinstance(m, dict):
            return m
        calls = {"content": ""} if m.get("tool_calls") else {}
        return calls | {k: v for k, v in m.items() if v is not None}

    kept = {k: v for k, v in obj.items() if v is not None}
    for key in ("messages", "teacher_messages"):
        if isinstance(kept.get(key), list | tuple):
            kept[key] = [message(m) for m in kept[key]]
    if isinstance(kept.get("teacher_hints"), list | tuple):
        kept["teacher_hints"] = [_plain(hint) if isinstance(hint, dict) else hint for hint in kept["teacher_hints"]]
    return kept


def _dump(message: _MessageModel) -> Message:
    return message.model_dump()


def _reason(error: ValidationError) -> str:
    first = error.errors()[0]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    said = first["msg"].removeprefix("Value error, ")
    got = first["input"]
    shown = f", got {got!r:.60}" if first["type"] != "missing" and " got " not in said else ""
    return f"{place}: {said}{shown}"


def read_jsonl(path: str | Path, to_contract: Callable[[Record], Record | None] | None = None) -> list[Row]:
    """Every row of a JSONL file, checked. Blank lines are skipped; repeated prompts are kept.

    `to_contract` maps a foreign record to the contract first: None leaves it out (counted in a
    warning), ValueError says what is wrong with it.

    Raises:
        DataError: naming the file, the line and the reason.
    """
    path = Path(path)
    rows, line_of_id, unknown, left_out = [], {}, Counter(), 0
    for line, record in _json_lines(path):
        where = f"{path}:{line}"
        if to_contract and isinstance(record, dict):
            try:
                record = to_contract(record)
            except ValueError as error:
                raise DataError(f"{where}: {error}") from None
            if record is None:
                left_out += 1
                continue
        row = replace(parse_row(record, where, default_id=f"{path.stem}:{line}"), source=where)
        if row.row_id in line_of_id:
            raise DataError(f"{where}: id {row.row_id!r} was used on line {line_of_id[row.row_id]}")
        line_of_id[row.row_id] = line
        unknown.update(record.keys() - _RowModel.model_fields.keys())
        rows.append(row)
    if not rows:
        raise DataError(f"{path}: has no rows; expected one JSON object with 'messages' per line")
    if left_out:
        logger.warning("%s: left out %d records without a prompt", path, left_out)
    if unknown:
        logger.warning("%s: ignored keys: %s", path, ", ".join(map(_unknown_key, unknown.items())))
    return rows


def _unknown_key(item: tuple[str, int]) -> str:
    key, count = item
    near = difflib.get_close_matches(key, _RowModel.model_fields, n=1)
    return f"{key!r} in {count} row(s)" + (f" (did you mean {near[0]!r}?)" if near else "")


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, parsed value) of each non-blank line."""
    try:
        # Binary: iterating text, or str.splitlines, would also split at U+2028 inside a JSON string.
        with path.open("rb") as file:
            for line, raw in enumerate(file, 1):
                if raw.strip():
                    yield line, _parse_line(raw, line, f"{path}:{line}")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _parse_line(raw: bytes, line: int, where: str) -> Any:
    try:
        text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
        value = json.loads(text)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 (byte {error.start + 1} of the line)") from None
    except (ValueError, RecursionError) as error:  # Python reads no whole number of thousands of digits either
        hint = "; is the file one JSON array? Write one object per line" if raw.lstrip()[:1] == b"[" else ""
        raise DataError(f"{where}: not JSON: {error}{hint}") from None
    return value


# --- splits ---------------------------------------------------------------------------------------


def prompt_key(row: Row) -> str:
    """Equal for prompts that differ in case or white space only."""
    return json.dumps([(m["role"], " ".join(m["content"].casefold().split())) for m in row.messages])


def split_held_out(
    rows: Sequence[Row], n: int, seed: int, key: Callable[[Row], Hashable] = prompt_key
) -> tuple[list[Row], list[Row]]:
    """(train, test): `test` has n rows, and rows with equal keys are all on one side.

    Both keep the order of `rows`. Test may be shorter than n when groups of equal rows do not fit.

    Raises:
        DataError: nothing would be left to train on.
    """
    if n < 0:
        raise ValueError(f"n={n}: expected 0 or more")
    groups: dict[Hashable, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(key(row), []).append(i)
    members, held_out = list(groups.values()), set()
    for g in np.random.default_rng(seed).permutation(len(members)):
        if len(held_out) + len(members[g]) <= n:
            held_out.update(members[g])
    if len(held_out) == len(rows):
        raise DataError(
            f"holding out {n} of {len(rows)} rows leaves none to train on; lower eval_size (0: no evaluation)"
        )
    train = [row for i, row in enumerate(rows) if i not in held_out]
    return train, [rows[i] for i in sorted(held_out)]


# --- the order in which rows are drawn ------------------------------------------------------------


def fingerprint(rows: Sequence[Row]) -> str:
    """sha256 over everything in the rows that training reads, in order; not `expected_answer`."""
    digest = hashlib.sha256()
    for row in rows:
        read: list[Any] = [row.row_id, row.messages, row.teacher_messages, row.teacher, row.completion]
        read += [[hint.after_turn, hint.messages] for hint in row.teacher_hints]
        digest.update(json.dumps(read, sort_keys=True, default=str).encode())
    return digest.hexdigest()


class Cursor:
    """An endless, deterministic order of rows: every epoch is a permutation of its own.

    `state()` is JSON-able; a cursor over the same rows that loads it draws exactly what this one
    would have drawn.
    """

    def __init__(self, rows: Sequence[Row], seed: int, shuffle: bool = True) -> None:
        if not rows:
            raise DataError("no rows to draw from")
        self._rows = rows
        self._seed = seed
        self._shuffle = shuffle
        self._fingerprint = fingerprint(rows)
        self._start_epoch(0, position=0)

    def next(self, n: int) -> list[Row]:
        """The next n rows; wraps into the next epoch, several times if n asks for it."""
        drawn = []
        while len(drawn) < n:
            if self._position == len(self._order):
                self._start_epoch(self._epoch + 1, position=0)
            upto = min(self._position + n - len(drawn), len(self._order))
            drawn += [self._rows[i] for i in self._order[self._position : upto]]
            self._position = upto
        return drawn

    def _start_epoch(self, epoch: int, position: int) -> None:
        self._epoch, self._position = epoch, position
        self._order = np.arange(len(self._rows))
        if self._shuffle:
            # Both numbers, not their sum: seed 0's second epoch must not be seed 1's first.
            self._order = np.random.default_rng((self._seed, epoch)).permutation(len(self._rows))

    @property
    def epoch(self) -> int:
        return self._epoch

    def state(self) -> dict[str, Any]:
        return {**self._identity(), "epoch": self._epoch, "position": self._position}

    def _identity(self) -> dict[str, Any]:
        return {
            "rows": len(self._rows),
            "fingerprint": self._fingerprint,
            "seed": self._seed,
            "shuffle": self._shuffle,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Raises DataError if the rows, the seed or `shuffle` are not those of the saved cursor."""
        for name, now in self._identity().items():
            if state.get(name) != now:
                raise DataError(
                    f"this run drew its rows with {name}={state.get(name)!r}, now {name}={now!r}: "
                    "the data must be the same to continue; restore it or start a new run directory"
                )
        if not (0 <= state["position"] <= len(self._rows) and state["epoch"] >= 0):
            raise DataError(f"cursor state is damaged: epoch={state['epoch']} position={state['position']}")
        self._start_epoch(state["epoch"], position=state["position"])
