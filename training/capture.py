"""What a teacher said, in a file: written once, one example a line, and read instead of the teacher.

The first line is the header, every other an example: ids, which spans of them train, and per position the
teacher's likeliest ids with their logprobs, empty where nothing trains. As everywhere, what stands at a
position is about its own token.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError

from envs.given import GivenEpisode
from envs.types import Episode, StopReason, Turn
from errors import ConfigError, DataError, ProtegeError, TeacherError
from models.types import Signal, SignalKind, SignalSpec, TeacherTopK, TeacherView

VERSION = 1
_ROUNDING = 1e-3  # of probabilities that sum to 1


@dataclass(frozen=True)
class CaptureHeader:
    """Who said it of what, and how. A capture goes on only where all of this is the same."""

    teacher: str
    weights: str  # fingerprint of the teacher's
    tokenizer: str  # fingerprint of the tokenizer that gives the ids their meaning
    format: str  # fingerprint of the chat format that the ids are written in
    top_k: int
    temperature: float
    dtype: str  # that the teacher computed in
    dataset: str
    examples: int  # lines that a complete file has after this one
    made_from: str  # fingerprint of the rows and of what turned them into ids


_HEADER = TypeAdapter(CaptureHeader)


@dataclass(frozen=True)
class Example:
    """One captured sequence of T tokens, n of which train."""

    row_id: str
    input_ids: np.ndarray  # int32 [T]
    spans: tuple[tuple[int, int], ...]  # [start, end) of what trains, in order
    logprobs: np.ndarray  # float32 [n], of the tokens themselves
    topk_ids: np.ndarray  # int32 [n, k]
    topk_logprobs: np.ndarray  # float32 [n, k]

    def signal(self) -> Signal:
        return Signal(
            logprobs=torch.from_numpy(self.logprobs),
            topk_ids=torch.from_numpy(self.topk_ids.astype(np.int64)),
            topk_logprobs=torch.from_numpy(self.topk_logprobs),
        )

    def episode(self, dataset: str, teacher: str) -> GivenEpisode:
        """The sequence as an answer that was given."""
        sampled = np.zeros(len(self.input_ids), dtype=bool)
        for start, end in self.spans:
            sampled[start:end] = True
        return GivenEpisode(
            dataset=dataset,
            row_id=self.row_id,
            teacher=teacher,
            prompt_messages=(),
            teacher_messages=None,
            token_ids=self.input_ids,
            sampled=sampled,
            sampler_logprobs=np.full(len(sampled), np.nan, dtype=np.float32),
            turns=tuple(Turn(start, end) for start, end in self.spans),
            stop_reason=StopReason.COMPLETED,
        )


def captured(episode: Episode, signal: Signal) -> Example:
    assert signal.topk_ids is not None and signal.topk_logprobs is not None and signal.logprobs is not None
    return Example(
        row_id=episode.row_id,
        input_ids=episode.token_ids,
        spans=tuple((turn.start, turn.end) for turn in episode.turns),
        logprobs=signal.logprobs.numpy(),
        topk_ids=signal.topk_ids.numpy().astype(np.int32),
        topk_logprobs=signal.topk_logprobs.numpy(),
    )


# --- writing


class CaptureWriter:
    """Appends examples to a file. `done`: the ids of those that are there."""

    def __init__(self, file: IO[bytes] | None, done: frozenset[str]) -> None:  # no file: all are done
        self._file = file
        self.done = done

    def append(self, examples: Sequence[Example]) -> None:
        """Returns when they are on the disk. Raises `ProtegeError` if that fails."""
        assert self._file is not None
        _append(self._file, b"".join(_line(_to_json(example)) for example in examples))


def _append(file: IO[bytes], data: bytes) -> None:
    """Not through the file's buffer: what that could not write it would try again when it is closed."""
    with failing_with_what_to_do(file.name):
        while data:
            data = data[os.write(file.fileno(), data) :]
        os.fsync(file.fileno())


@contextmanager
def failing_with_what_to_do(path: str | Path) -> Iterator[None]:
    """Raises `ProtegeError` where the disk fails, or is full."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors report a full disk as an error of their own
        raise ProtegeError(
            f"cannot write {path}: {error}. Make room, if the disk is full; the same command then goes on"
        ) from error


@contextmanager
def capture_writer(path: Path, header: CaptureHeader) -> Iterator[CaptureWriter]:
    """A new capture at `path`, or the one there, without a last line that a kill cut off. Raises `ConfigError` if that
    is another capture, or if another process is writing it."""
    try:
        file = open(path, "ab+")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise ConfigError(f"output_path={path}: cannot write there ({error.strerror})") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # why: two writers would mix their lines
        except BlockingIOError:
            raise ConfigError(f"output_path={path}: another process is capturing into this file") from None
        file.seek(0)
        done, whole, ours = [], 0, _line(_header_json(header))
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                if not (whole or ours.startswith(line)):
                    raise ConfigError(f"output_path={path} is not a capture: give another path")
                break
            if number == 1:
                refuse_other(path, parse_header(path, line), header)
            else:
                done.append(_example(path, number, line, header).row_id)
            whole += len(line)
        file.truncate(whole)  # what a kill cut off
        if not whole:
            _append(file, ours)
        yield CaptureWriter(file, frozenset(done))


def refuse_other(path: Path, there: CaptureHeader, now: CaptureHeader) -> None:
    """Raises `ConfigError` unless both are the same."""
    different = [field.name for field in fields(now) if getattr(there, field.name) != getattr(now, field.name)]
    if different:
        name = different[0]
        what = _OF_FINGERPRINTS.get(
            name, f"its {name} is {getattr(there, name)!r}, now it would be {getattr(now, name)!r}"
        )
        raise ConfigError(f"output_path={path} holds another capture: {what}. Give another path, or delete the file")


_OF_FINGERPRINTS = {
    "weights": "the teacher had other weights",
    "tokenizer": "it is in the ids of another tokenizer",
    "format": "it is in another chat format (model_name, system_prompt, chat_template_kwargs)",
    "made_from": "it is of other rows, or made of them in another way (completions, max_tokens, seed, formats)",
}


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, allow_nan=False).encode() + b"\n"


def _header_json(header: CaptureHeader) -> dict[str, Any]:
    return {"protege_capture": VERSION, **asdict(header)}


def _to_json(example: Example) -> dict[str, Any]:
    length = len(example.input_ids)
    ids: list[list[int]] = [[] for _ in range(length)]
    topk: list[list[float]] = [[] for _ in range(length)]
    own: list[float | None] = [None] * length
    positions = [i for start, end in example.spans for i in range(start, end)]
    rows = zip(positions, _shortest(example.logprobs), example.topk_ids.tolist(), strict=True)
    for i, logprob, row in rows:
        own[i], ids[i] = logprob, row
    for i, row in zip(positions, example.topk_logprobs, strict=True):
        topk[i] = _shortest(row)
    return {
        "id": example.row_id,
        "input_ids": example.input_ids.tolist(),
        "trained": [list(span) for span in example.spans],
        "logprobs": own,
        "topk_ids": ids,
        "topk_logprobs": topk,
    }


def _shortest(values: np.ndarray) -> list[float]:
    """The shortest decimals that read back as the same float32: half the size of float64's."""
    return values.astype(str).astype(np.float64).tolist()


# --- reading


@dataclass(frozen=True)
class Capture:
    header: CaptureHeader
    examples: tuple[Example, ...]


def read_jsonl_header(path: str | Path) -> CaptureHeader:
    """Raises `DataError`."""
    try:
        with open(path, "rb") as file:
            return parse_header(path, file.readline())
    except OSError as error:
        raise DataError(f"capture_path={path}: cannot be read ({error.strerror})") from error


def read_jsonl(path: str | Path) -> Capture:
    """A complete capture. Raises `DataError`, naming the line, for one that is not."""
    header = read_jsonl_header(path)
    examples = []
    with open(path, "rb") as file:
        file.readline()
        for number, line in enumerate(file, 2):
            if not line.endswith(b"\n"):
                raise DataError(f"{path}:{number}: the last line is cut off. {_GO_ON}")
            examples.append(_example(path, number, line, header))
    if len(examples) < header.examples:
        raise DataError(f"{path}: holds {len(examples)} of {header.examples} examples. {_GO_ON}")
    if len(examples) > header.examples:
        raise DataError(f"{path}: holds {len(examples)} examples, and its header says {header.examples}. Capture anew")
    ids = {example.row_id for example in examples}
    if len(ids) != len(examples):
        raise DataError(f"{path}: {len(examples) - len(ids)} examples are there twice. Capture anew")
    return Capture(header, tuple(examples))


_GO_ON = "Run the command that captured it once more: it goes on where it stopped"


def parse_header(path: str | Path, line: bytes) -> CaptureHeader:
    """Raises `DataError`."""
    try:
        value = json.loads(line)
        if value.pop("protege_capture") != VERSION:
            raise DataError(f"{path}: a capture of another version of Protege. Capture anew")
        header = _HEADER.validate_json(json.dumps(value), strict=True)
        if value.keys() != asdict(header).keys() or not (
            0 < header.temperature < math.inf and header.top_k > 0 and header.examples > 0
        ):
            raise ValueError("out of range")
        return header
    except (ValueError, KeyError, TypeError, AttributeError):  # pydantic's errors are ValueErrors
        raise DataError(
            f"{path}: its first line is not the header of a capture. Expected a file that recipes.capture_teacher wrote"
        ) from None


def _parsed(path: str | Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
        if isinstance(value, dict) and isinstance(value.get("id"), str):
            return value
    except ValueError:
        pass
    raise DataError(f"{path}:{number}: not an example of a capture. Capture anew")


def _example(path: str | Path, number: int, line: bytes, header: CaptureHeader) -> Example:
    row = _parsed(path, number, line)
    try:
        input_ids = _ids(row["input_ids"])
        spans = tuple((int(start), int(end)) for start, end in row["trained"])
        _check_spans(spans, len(input_ids))  # first: a span of a billion tokens is not to be counted out
        positions = [i for start, end in spans for i in range(start, end)]
        example = Example(
            row_id=row["id"],
            input_ids=input_ids,
            spans=spans,
            logprobs=np.array([row["logprobs"][i] for i in positions], dtype=np.float32),
            topk_ids=_ids([row["topk_ids"][i] for i in positions]),
            topk_logprobs=np.array([row["topk_logprobs"][i] for i in positions], dtype=np.float32),
        )
        if {len(row[name]) for name in ("logprobs", "topk_ids", "topk_logprobs")} != {len(example.input_ids)}:
            raise ValueError("its streams are not as long as its ids")
        check_example(example, header)
    except (ValueError, KeyError, TypeError, IndexError, OverflowError) as error:
        raise DataError(f"{path}:{number}: a broken example ({error}). Capture anew") from error
    return example


def _ids(values: list) -> np.ndarray:
    ids = np.array(values)
    if ids.dtype.kind != "i" or (ids != (found := ids.astype(np.int32))).any():
        raise ValueError("ids are whole numbers of 32 bits")
    return found


def _check_spans(spans: Sequence[tuple[int, int]], length: int) -> None:
    edges = [edge for span in spans for edge in span]
    if not edges or edges[0] < 1 or edges != sorted(set(edges)) or edges[-1] > length:
        raise ValueError("what trains is not spans of its tokens, in order")


def check_example(example: Example, header: CaptureHeader) -> None:
    """Raises `ValueError` for what could not be trained on."""
    _check_spans(example.spans, len(example.input_ids))
    trained, k = sum(end - start for start, end in example.spans), example.topk_ids.shape[-1]
    if example.topk_ids.shape != (trained, k) or not 1 <= k <= header.top_k:  # fewer: a smaller vocabulary
        raise ValueError(f"expected up to {header.top_k} ids at every trained position")
    ids = np.sort(example.topk_ids, axis=-1)
    if example.input_ids.min() < 0 or ids.min() < 0 or (ids[:, 1:] == ids[:, :-1]).any():
        raise ValueError("an id is negative, or twice among the likeliest")
    mass = np.exp(example.topk_logprobs.astype(np.float64)).sum(-1)
    if not (example.logprobs <= _ROUNDING).all() or not (mass <= 1 + _ROUNDING).all():
        raise ValueError("probabilities are above 1")
    example.signal()
    example.episode("", "")


# --- in place of a teacher


class CapturedScorer:
    """`Scorer` that looks up what was captured: the teacher is never loaded."""

    def __init__(self, capture: Capture) -> None:
        self.name = capture.header.teacher
        self.temperature = capture.header.temperature
        self._top_k = capture.header.top_k
        # The ids alone do not name an example: another may have the same, and another teacher's prompt.
        self._examples = {(e.row_id, e.input_ids.tobytes()): e for e in capture.examples}

    async def score(self, views: Sequence[TeacherView], need: SignalSpec) -> list[Signal]:
        """Raises `TeacherError` for a sequence, or a signal, that was not captured."""
        if need is SignalKind.FULL or (isinstance(need, TeacherTopK) and need.k > self._top_k):
            raise TeacherError(f"the capture of {self.name} holds its top {self._top_k}, not {need}")
        return [self._signal(view) for view in views]

    def _signal(self, view: TeacherView) -> Signal:
        example = self._examples.get((view.row_id, view.token_ids.astype(np.int32).tobytes()))
        if example is None or view.swap is not None:
            raise TeacherError(f"the capture of {self.name} does not hold this sequence")
        return example.signal()
