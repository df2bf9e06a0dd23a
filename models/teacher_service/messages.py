"""What is said in the wire format: requests to score, answers, pieces of a head, and what a service says of itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models.teacher_service.wire import DTYPES, VERSION, Message, Refused, decode, encode
from models.types import SignalKind, SignalSpec, TeacherTopK

SERVICE = "protege-teacher"
HiddenDtype = Literal["bfloat16", "float32"]
MAX_VIEWS = 4096  # of one request
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.:+-]{0,99}$")]


class _Fields(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


FieldsT = TypeVar("FieldsT", bound=_Fields)


# --- what a service says of itself


class ModelInfo(_Fields):
    """A model of a service."""

    name: Name
    weights: str  # fingerprint of its files, as `source_fingerprint` gives it
    tokenizer: str  # `tokenizer_fingerprint`
    vocab_size: int
    context_length: int | None
    hidden_size: int
    dtype: str  # of its computation and its head
    source: str | None = None  # its hub id, where it has one: a path says something of the host, and nothing elsewhere


class Limits(_Fields):
    """What a service takes in one request."""

    request_tokens: int  # read by the teacher, all views together
    answer_bytes: int
    top_k: int
    temperature: tuple[float, float] = (0.01, 100.0)


class ServiceInfo(_Fields):
    models: tuple[ModelInfo, ...]
    limits: Limits
    service: str = SERVICE
    version: int = VERSION


def parse_info(text: bytes) -> ServiceInfo:
    """Raises `Refused`."""
    try:
        return ServiceInfo.model_validate_json(text)
    except ValidationError as error:
        raise _refusal(error) from error


# --- requests


class RequestFields(_Fields):
    """The header of a request. `need` is sampled, topk (with `k`) or full (with `hidden_dtype`)."""

    model: Name
    weights: Annotated[str, Field(max_length=100)]
    need: Literal["sampled", "topk", "full"]
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    k: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    hidden_dtype: HiddenDtype | None = None
    kind: Literal["score"] = "score"

    @property
    def spec(self) -> SignalSpec:
        return TeacherTopK(self.k) if self.k is not None else SignalKind(self.need)


@dataclass(frozen=True)
class Reading:
    """One sequence for a teacher, and the positions whose tokens it judges, in ascending order."""

    ids: np.ndarray  # int64 [T]
    positions: np.ndarray  # int64 [n]


@dataclass(frozen=True)
class ScoreRequest:
    fields: RequestFields
    readings: Sequence[Reading]

    @property
    def tokens(self) -> int:
        return sum(len(reading.ids) for reading in self.readings)

    @property
    def scored(self) -> int:
        return sum(len(reading.positions) for reading in self.readings)


def encode_request(request: ScoreRequest) -> bytes:
    """Positions are sent as one bit per token."""
    wanted = np.zeros(request.tokens, dtype=bool)
    start = 0
    for reading in request.readings:
        wanted[start + reading.positions] = True
        start += len(reading.ids)
    return encode(
        _fields(request.fields),
        {
            "lengths": np.array([len(reading.ids) for reading in request.readings], dtype=np.int32),
            "ids": np.concatenate([reading.ids for reading in request.readings]).astype(np.int32),
            "scored": np.packbits(wanted),
        },
    )


def request_bytes(tokens: int) -> int:
    """The most that the arrays of a request of so many tokens hold: no view is shorter than one of them."""
    return 4 * tokens + 4 * tokens + tokens // 8 + 1


def decode_request(data: bytearray, *, max_tokens: int) -> ScoreRequest:
    """Raises `Refused`."""
    message = decode(data, max_array_bytes=request_bytes(max_tokens))
    fields = _parsed(RequestFields, message.fields)
    if (fields.need == "topk") != (fields.k is not None) or (fields.need == "full") != (
        fields.hidden_dtype is not None
    ):
        raise Refused(400, "k goes with need=topk, hidden_dtype with need=full")
    lengths, ids, scored = (
        _array(message, name, dtype, 1) for name, dtype in (("lengths", "<i4"), ("ids", "<i4"), ("scored", "u1"))
    )
    if not len(lengths) or lengths.min() < 1 or lengths.sum(dtype=np.int64) != len(ids):
        raise Refused(400, f"the lengths of {len(lengths)} views do not make up their {len(ids)} ids")
    if len(lengths) > MAX_VIEWS:
        raise Refused(413, f"the request has {len(lengths)} views, at most {MAX_VIEWS} are taken")
    if len(ids) > max_tokens:
        raise Refused(413, f"the request has {len(ids)} tokens, at most {max_tokens} are taken")
    if len(scored) != (len(ids) + 7) // 8:
        raise Refused(400, f"there are not as many bits as ids: {len(scored)} bytes for {len(ids)}")
    wanted = np.unpackbits(scored, count=len(ids)).astype(bool)
    readings, start = [], 0
    for length in lengths.tolist():
        positions = np.flatnonzero(wanted[start : start + length])
        if len(positions) and positions[0] == 0:
            raise Refused(422, "a view's first token has none before it that predicts it, so it cannot be scored")
        readings.append(Reading(ids[start : start + length].astype(np.int64), positions))
        start += length
    return ScoreRequest(fields, readings)


# --- answers


class AnswerFields(_Fields):
    """The header of an answer. `loaded` says which weights computed it, `head` which head belongs to hidden states."""

    model: str
    weights: str
    loaded: str
    head: str | None = None
    kind: Literal["scores"] = "scores"


def answer_bytes(request: RequestFields, scored: int, *, hidden_size: int, vocab_size: int) -> int:
    """Of the arrays of an answer."""
    if request.need == "full":
        return scored * hidden_size * (2 if request.hidden_dtype == "bfloat16" else 4)
    return scored * (4 + 8 * min(request.k or 0, vocab_size))


@dataclass(frozen=True)
class ScoreAnswer:
    """Rows of all views, end to end: `hidden`, or `logprobs` with or without `topk_ids` and `topk_logprobs`."""

    fields: AnswerFields
    arrays: dict[str, np.ndarray]


def encode_answer(answer: ScoreAnswer) -> bytes:
    return encode(_fields(answer.fields), answer.arrays)


def decode_answer(data: bytearray, request: ScoreRequest, *, hidden_size: int, vocab_size: int) -> ScoreAnswer:
    """The answer, if it is one to `request`. Raises `Refused`."""
    asked = request.fields
    size = answer_bytes(asked, request.scored, hidden_size=hidden_size, vocab_size=vocab_size)
    message = decode(data, max_array_bytes=size)
    fields = _parsed(AnswerFields, message.fields)
    k = min(asked.k or 0, vocab_size)
    expected: _Layout = {"logprobs": ("float32", (request.scored,))}
    if asked.need == "topk":
        expected |= {
            "topk_ids": ("int32", (request.scored, k)),
            "topk_logprobs": ("float32", (request.scored, k)),
        }
    if asked.hidden_dtype is not None:
        expected = {"hidden": (asked.hidden_dtype, (request.scored, hidden_size))}
    _check_layout("answer", message, expected)
    ids = message.arrays.get("topk_ids")
    if ids is not None and ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise Refused(400, f"the answer names ids from {ids.min()} to {ids.max()}, there are {vocab_size}")
    return ScoreAnswer(fields, message.arrays)


# --- heads


class HeadFields(_Fields):
    """The header of some rows of a language-model head; `digest` is of the whole of it."""

    model: str
    weights: str
    loaded: str
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    rows: int  # in all
    width: int
    dtype: HiddenDtype
    has_bias: bool
    scale: float
    softcap: float | None = None
    kind: Literal["head"] = "head"


def encode_head(fields: HeadFields, weight: np.ndarray, bias: np.ndarray | None) -> bytes:
    return encode(_fields(fields), {"weight": weight} | ({} if bias is None else {"bias": bias}))


def decode_head(data: bytearray, *, rows: int, max_bytes: int) -> tuple[HeadFields, dict[str, np.ndarray]]:
    """Fields, and `weight` [rows, width] and `bias` [rows] if it has one. Raises `Refused`."""
    message = decode(data, max_array_bytes=max_bytes)
    fields = _parsed(HeadFields, message.fields)
    expected: _Layout = {"weight": (fields.dtype, (rows, fields.width))}
    if fields.has_bias:
        expected["bias"] = (fields.dtype, (rows,))
    _check_layout("piece of the head", message, expected)
    return fields, message.arrays


# --- all of them

_Layout = dict[str, tuple[str, tuple[int, ...]]]  # by an array's name, its dtype and shape


def _check_layout(what: str, message: Message, expected: _Layout) -> None:
    """Raises `Refused`."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    got = {name: (names[array.dtype], array.shape) for name, array in message.arrays.items()}
    if got != expected:
        raise Refused(400, f"the {what} holds {got}, asked for was {expected}")


def _fields(fields: _Fields) -> dict[str, Any]:
    return fields.model_dump(exclude_none=True)


def _parsed(fields_class: type[FieldsT], fields: Any) -> FieldsT:
    try:
        return fields_class.model_validate(fields)
    except ValidationError as error:
        raise _refusal(error) from error


def _refusal(error: ValidationError) -> Refused:
    first = error.errors(include_input=False, include_url=False)[0]
    where = ".".join(map(str, first["loc"])) or "the header"
    return Refused(400, f"{where[:100]}: {first['msg'][:200]}")


def _array(message: Message, name: str, dtype: str, dimensions: int) -> np.ndarray:
    array = message.arrays.get(name)
    if array is None or array.dtype != np.dtype(dtype) or array.ndim != dimensions:
        raise Refused(400, f"the request has no array {name} of dtype {np.dtype(dtype).name}")
    return array
