"""The binary form of what client and service say to each other: a small JSON header, then raw arrays.

    "PRTG" | version uint16 | header bytes uint32 | header | array 0 | array 1 | …      all little-endian

The header is an object of plain fields; its `arrays` lists, in order, each array's name, dtype, shape, codec and
bytes. Nothing in it is executable, and every length is checked before memory is taken for it. Integers
are sent as byte planes through zlib (two fifths of the bytes on token ids); floats are sent raw, because what zlib or
zstd take off them costs more time than a gigabit line does (benchmarks/LOG.md).
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

VERSION = 1
MEDIA_TYPE = "application/x-protege-teacher"
MAX_HEADER_BYTES = 16 << 10
_MAGIC = b"PRTG"
_PREFIX = struct.Struct("<4sHI")
OVERHEAD_BYTES = _PREFIX.size + MAX_HEADER_BYTES
_MAX_ARRAYS = 8
_SMALLEST_COMPRESSED = 256  # bytes; below, zlib's own header eats what it saves
DTYPES = {
    "int32": np.dtype("<i4"),
    "uint8": np.dtype("u1"),
    "float32": np.dtype("<f4"),
    "bfloat16": np.dtype("<u2"),  # numpy has none: its bits
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Refused(Exception):
    """Why a message is not taken, in one sentence, and the HTTP status that says so."""

    def __init__(self, status: int, sentence: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(sentence)
        self.status = status
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class Message:
    fields: dict[str, Any]
    arrays: dict[str, np.ndarray]  # bfloat16 as uint16


def encode(fields: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bytes:
    """`arrays` have one of `DTYPES`, uint16 standing for bfloat16."""
    described, parts = [], []
    for name, array in arrays.items():
        dtype = array.dtype.newbyteorder("<")
        codec, data = _packed(np.ascontiguousarray(array, dtype))
        described.append([name, _NAMES[dtype], list(array.shape), codec, len(data)])
        parts.append(data)
    header = json.dumps({**fields, "arrays": described}, separators=(",", ":")).encode()
    header += b" " * (-(_PREFIX.size + len(header)) % 16)  # the first array, the largest, is read where it lies
    return b"".join([_PREFIX.pack(_MAGIC, VERSION, len(header)), header, *parts])


def decode(data: bytearray, *, max_array_bytes: int) -> Message:
    """The message in `data`. Arrays that were sent raw are views of it. Raises `Refused`."""
    header, start = _header(data)
    described = header.pop("arrays", None)
    if not isinstance(described, list) or len(described) > _MAX_ARRAYS:
        raise Refused(400, f"the header lists no arrays, or more than {_MAX_ARRAYS}")
    checked = [_checked(entry) for entry in described]
    total = sum(array.nbytes for array in checked)
    if total > max_array_bytes:
        raise Refused(413, f"the arrays hold {total} bytes, at most {max_array_bytes} are taken")
    if (expected := start + sum(array.sent_bytes for array in checked)) != len(data):
        raise Refused(400, f"the message has {len(data)} bytes, its header announces {expected}")
    arrays: dict[str, np.ndarray] = {}
    for array in checked:
        arrays[array.name] = _unpacked(array, memoryview(data)[start : start + array.sent_bytes])
        start += array.sent_bytes
    return Message(header, arrays)


def _header(data: bytearray) -> tuple[dict[str, Any], int]:
    if len(data) < _PREFIX.size:
        raise Refused(400, f"the message has {len(data)} bytes, the prefix alone has {_PREFIX.size}")
    magic, version, size = _PREFIX.unpack_from(data)
    if magic != _MAGIC:
        raise Refused(400, "this is no message of a Protege teacher: its first bytes are others")
    if version != VERSION:
        raise Refused(400, f"the message is of protocol version {version}, spoken here is {VERSION}")
    if size > MAX_HEADER_BYTES:
        raise Refused(413, f"the header has {size} bytes, at most {MAX_HEADER_BYTES} are taken")
    start = _PREFIX.size + size
    if start > len(data):
        raise Refused(400, f"the message ends within its header: {len(data)} of {start} bytes")
    try:
        header = json.loads(bytes(data[_PREFIX.size : start]))
    except (ValueError, RecursionError) as error:
        raise Refused(400, "the header is not JSON") from error
    if not isinstance(header, dict):
        raise Refused(400, "the header is not a JSON object")
    return header, start


@dataclass(frozen=True)
class _Array:
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    codec: str
    sent_bytes: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _checked(entry: Any) -> _Array:
    try:
        name, dtype, shape, codec, sent = entry
        array = _Array(name, DTYPES[dtype], tuple(shape), codec, sent)
    except (TypeError, ValueError, KeyError) as error:
        raise Refused(400, "the header describes an array in a way that is not understood") from error
    sizes = [*array.shape, sent]
    if not all(type(n) is int and 0 <= n < 2**40 for n in sizes) or len(array.shape) > 2 or type(name) is not str:
        raise Refused(400, "an array's name, shape or size makes no sense")
    if codec not in ("raw", "planes"):
        raise Refused(400, "an array has a codec other than raw and planes")
    # zlib never makes its input more than a little larger
    if sent != array.nbytes if codec == "raw" else sent > array.nbytes + 64:
        raise Refused(400, f"an array of {array.nbytes} bytes is said to be sent as {sent}")
    return array


def _packed(array: np.ndarray) -> tuple[str, bytes | memoryview]:
    if array.dtype.kind in "iu" and array.nbytes >= _SMALLEST_COMPRESSED and array.dtype != DTYPES["bfloat16"]:
        planes = array.reshape(-1).view(np.uint8).reshape(-1, array.dtype.itemsize).T
        compressed = zlib.compress(planes.tobytes(), 1)
        if len(compressed) < array.nbytes:
            return "planes", compressed
    return "raw", array.reshape(-1).view(np.uint8).data


def _unpacked(array: _Array, data: memoryview) -> np.ndarray:
    if array.codec == "raw":
        return np.require(np.frombuffer(data, array.dtype), requirements="A").reshape(array.shape)
    stream = zlib.decompressobj()
    try:
        plain = stream.decompress(data, array.nbytes + 1)  # never more, whatever the stream says
    except zlib.error as error:
        raise Refused(400, "an array cannot be decompressed") from error
    if len(plain) != array.nbytes or not stream.eof or stream.unused_data:
        raise Refused(400, f"an array decompresses to something else than its {array.nbytes} bytes")
    planes = np.frombuffer(plain, np.uint8).reshape(array.dtype.itemsize, -1)
    return np.ascontiguousarray(planes.T).reshape(-1).view(array.dtype).reshape(array.shape)
