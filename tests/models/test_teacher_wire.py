"""The binary form: what goes in comes out, and nothing that is not a whole, sound message is taken."""

from __future__ import annotations

import json
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import torch

from models.heads import from_raw, raw
from models.teacher_service import wire
from models.teacher_service.messages import (
    AnswerFields,
    HeadFields,
    Reading,
    RequestFields,
    ScoreAnswer,
    ScoreRequest,
    answer_bytes,
    decode_answer,
    decode_head,
    decode_request,
    encode_answer,
    encode_head,
    encode_request,
)
from models.teacher_service.wire import Refused, decode, encode

LIMIT = 1 << 20
OTHER_DTYPES = {"float32": ["int32"], "int32": ["float32"], "uint16": ["uint8"]}  # uint16 stands for bfloat16
FIELDS = {"kind": "score", "model": "m", "weights": "w", "need": "sampled", "temperature": 1.0}


def sequences() -> dict[str, Any]:
    return {
        "lengths": np.array([3, 2], np.int32),
        "ids": np.array([5, 6, 7, 8, 9], np.int32),
        "scored": np.packbits([0, 1, 1, 0, 1]),
    }


def message(header: Any, body: bytes = b"", *, version: int = wire.VERSION, magic: bytes = b"PRTG") -> bytearray:
    """Anything, put together by hand."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return bytearray(struct.pack("<4sHI", magic, version, len(text)) + text + body)


def one_array(*described: Any, body: bytes = b"") -> bytearray:
    return message({"arrays": [list(described)]}, body)


def test_what_goes_in_comes_out():
    generator = np.random.default_rng(0)
    arrays = {
        "hidden": raw(torch.randn(7, 5, dtype=torch.bfloat16)),
        "floats": generator.standard_normal((3, 4)).astype(np.float32),
        "ids": generator.integers(0, 150_000, (40, 20)).astype(np.int32),
        "bits": generator.integers(0, 256, 1000).astype(np.uint8),
        "nothing": np.zeros((0, 9), np.float32),
    }
    found = decode(bytearray(encode({"a": 1, "b": "ü"}, arrays)), max_array_bytes=LIMIT)
    assert found.fields == {"a": 1, "b": "ü"}
    for name, array in arrays.items():
        np.testing.assert_array_equal(found.arrays[name], array)
        assert found.arrays[name].dtype == array.dtype and found.arrays[name].flags.aligned


def test_bfloat16_is_sent_bit_by_bit():
    values = torch.tensor([1.0, -2.5, 3e38, 1e-38, float("inf")], dtype=torch.bfloat16)
    found = decode(bytearray(encode({}, {"x": raw(values)})), max_array_bytes=LIMIT).arrays["x"]
    assert torch.equal(from_raw(found), values) and found.nbytes == 10


def test_ids_are_compressed_and_floats_are_not():
    ids = np.random.default_rng(0).integers(0, 150_000, 5000).astype(np.int32)
    assert len(encode({}, {"x": ids})) < 0.7 * ids.nbytes
    floats = np.zeros(5000, np.float32)
    assert len(encode({}, {"x": floats})) >= floats.nbytes


def test_a_message_that_is_cut_anywhere_is_refused():
    whole = encode(FIELDS, {"ids": np.arange(500, dtype=np.int32), "x": np.ones(3, np.float32)})
    for length in range(0, len(whole), 7):
        with pytest.raises(Refused):
            decode(bytearray(whole[:length]), max_array_bytes=LIMIT)
    with pytest.raises(Refused, match="announces"):
        decode(bytearray(whole + b"x"), max_array_bytes=LIMIT)


def test_random_damage_is_refused_or_decodes_but_never_breaks():
    whole = encode(FIELDS, sequences())
    generator = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for at in generator.integers(0, len(damaged), 3):
            damaged[at] = generator.integers(256)
        try:
            decode_request(damaged, max_tokens=100)
        except Refused as error:
            assert 400 <= error.status < 500


@pytest.mark.parametrize(
    ("data", "status", "says"),
    [
        (bytearray(b"PK\x03\x04" + b"x" * 40), 400, "no message of a Protege teacher"),
        (message({}, version=2), 400, "version 2, spoken here is 1"),
        (bytearray(struct.pack("<4sHI", b"PRTG", 1, 1 << 30)), 413, "header has"),
        (message(b"[" * 16_000), 400, "not JSON"),
        (message(b"\xff\xfe"), 400, "not JSON"),
        (message([1]), 400, "not a JSON object"),
        (message({}), 400, "lists no arrays"),
        (message({"arrays": [["a", "uint8", [0], "raw", 0]] * 9}), 400, "more than 8"),
        (message({"arrays": [7]}), 400, "not understood"),
        (one_array("a", "object", [1], "raw", 8), 400, "not understood"),
        (one_array("a", "float64", [1], "raw", 8, body=b"x" * 8), 400, "not understood"),
        (one_array("a", "uint8", [-1], "raw", 1), 400, "makes no sense"),
        (one_array("a", "uint8", [1.5], "raw", 1), 400, "makes no sense"),
        (one_array("a", "uint8", [1, 1, 1], "raw", 1, body=b"x"), 400, "makes no sense"),
        (one_array("a", "uint8", [2], "pickle", 2, body=b"xx"), 400, "codec"),
        (one_array("a", "float32", [2**39, 2**39], "planes", 100), 413, "at most"),
        (one_array("a", "uint8", [10], "raw", 4, body=b"xxxx"), 400, "said to be sent as"),
        (one_array("a", "uint8", [10], "planes", 3, body=b"xxx"), 400, "cannot be decompressed"),
    ],
)
def test_what_is_no_message_is_refused_in_one_sentence(data: bytearray, status: int, says: str):
    with pytest.raises(Refused, match=says) as found:
        decode(data, max_array_bytes=LIMIT)
    assert found.value.status == status and "\n" not in str(found.value)


def test_a_decompression_bomb_takes_no_more_memory_than_it_says():
    bomb = zlib.compress(bytes(50 << 20))
    data = one_array("a", "uint8", [100_000], "planes", len(bomb), body=bomb)
    with pytest.raises(Refused, match="something else"):
        decode(data, max_array_bytes=LIMIT)


# --- requests and answers


def test_a_request_survives_the_way():
    readings = [Reading(np.arange(1, 300), np.arange(100, 299)), Reading(np.array([4, 5]), np.array([], np.int64))]
    fields = RequestFields(model="m", weights="w", need="topk", k=3, temperature=0.7)
    found = decode_request(bytearray(encode_request(ScoreRequest(fields, readings))), max_tokens=400)
    assert found.fields == fields
    for a, b in zip(found.readings, readings, strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_array_equal(a.positions, b.positions)


@pytest.mark.parametrize(
    ("fields", "arrays", "status", "says"),
    [
        ({"model": "../../etc"}, {}, 400, "model: "),
        ({"model": 3}, {}, 400, "model: "),
        ({"temperature": 0.0}, {}, 400, "temperature: "),
        ({"temperature": float("nan")}, {}, 400, "temperature: "),
        ({"temperature": "1"}, {}, 400, "temperature: "),
        ({"need": "everything"}, {}, 400, "need: "),
        ({"need": "topk"}, {}, 400, "k goes with"),
        ({"k": 5}, {}, 400, "k goes with"),
        ({"need": "topk", "k": 0}, {}, 400, "k: "),
        ({"need": "full"}, {}, 400, "hidden_dtype with"),
        ({"need": "full", "hidden_dtype": "float64"}, {}, 400, "hidden_dtype: "),
        ({"code": "import os"}, {}, 400, "code: "),
        ({}, {"ids": np.zeros(5, np.float32)}, 400, "no array ids"),
        ({}, {"ids": np.zeros((5, 1), np.int32)}, 400, "no array ids"),
        ({}, {"lengths": np.array([3, 3], np.int32)}, 400, "do not make up"),
        ({}, {"lengths": np.array([7, -2], np.int32)}, 400, "do not make up"),
        ({}, {"lengths": np.array([], np.int32), "ids": np.array([], np.int32)}, 400, "do not make up"),
        ({}, {"scored": np.zeros(2, np.uint8)}, 400, "as many bits"),
        ({}, {"scored": np.packbits([1, 0, 0, 0, 0])}, 422, "first token"),
        ({}, {"scored": np.packbits([0, 0, 0, 1, 0])}, 422, "first token"),
        ({}, {"ids": np.zeros(60, np.int32), "lengths": np.array([60], np.int32)}, 413, "at most 50"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(fields: dict, arrays: dict, status: int, says: str):
    data = bytearray(encode({**FIELDS, **fields}, {**sequences(), **arrays}))
    with pytest.raises(Refused, match=says) as found:
        decode_request(data, max_tokens=50)
    assert found.value.status == status and "\n" not in str(found.value)


@pytest.mark.parametrize("id_", [-1, 61])
def test_an_answer_that_names_no_token_is_refused(id_: int):
    asked = RequestFields(model="m", weights="w", need="topk", temperature=1.0, k=1)
    request = ScoreRequest(asked, [Reading(np.arange(1, 3), np.arange(1, 2))])
    arrays = {"logprobs": np.zeros(1, np.float32), "topk_logprobs": np.zeros((1, 1), np.float32)}
    arrays["topk_ids"] = np.array([[id_]], np.int32)
    answer = encode_answer(ScoreAnswer(AnswerFields(model="m", weights="w", loaded="l"), arrays))
    with pytest.raises(Refused, match=f"names ids from {id_} to {id_}, there are 61"):
        decode_answer(bytearray(answer), request, hidden_size=16, vocab_size=61)


def test_a_head_of_another_dtype_or_a_strange_digest_is_refused():
    fields = HeadFields(
        model="m", weights="w", loaded="l", digest="0" * 64, rows=5, width=3, dtype="float32", has_bias=False, scale=1.0
    )
    size = {"rows": 2, "max_bytes": 1000}
    good = encode_head(fields, np.zeros((2, 3), np.float32), None)
    assert decode_head(bytearray(good), **size)[0] == fields
    with pytest.raises(Refused, match="asked for was"):
        decode_head(bytearray(encode_head(fields, np.zeros((2, 3), np.uint16), None)), **size)
    for digest in ("../../x", "0" * 63, "F" * 64, ""):
        strange = fields.model_copy(update={"digest": digest})
        with pytest.raises(Refused, match="digest"):
            decode_head(bytearray(encode_head(strange, np.zeros((2, 3), np.float32), None)), **size)


@pytest.mark.parametrize("need", ["sampled", "topk", "full"])
def test_an_answer_to_another_request_is_refused(need: Any):
    asked = RequestFields(
        model="m",
        weights="w",
        need=need,
        temperature=1.0,
        k=4 if need == "topk" else None,
        hidden_dtype="bfloat16" if need == "full" else None,
    )
    request = ScoreRequest(asked, [Reading(np.arange(1, 10), np.arange(1, 9))])
    arrays: dict[str, np.ndarray] = {"logprobs": np.zeros(8, np.float32)}
    if need == "topk":
        arrays |= {"topk_ids": np.zeros((8, 4), np.int32), "topk_logprobs": np.zeros((8, 4), np.float32)}
    if need == "full":
        arrays = {"hidden": np.zeros((8, 16), np.uint16)}
    sizes: dict[str, Any] = {"hidden_size": 16, "vocab_size": 61}
    fields = AnswerFields(model="m", weights="w", loaded="l")
    good = encode_answer(ScoreAnswer(fields, arrays))
    assert sum(a.nbytes for a in arrays.values()) == answer_bytes(asked, 8, **sizes)
    assert decode_answer(bytearray(good), request, **sizes).arrays.keys() == arrays.keys()
    for name in arrays:
        short = {**arrays, name: arrays[name][:-1]}
        less = {k: v for k, v in arrays.items() if k != name}
        others = [{**arrays, name: arrays[name].astype(dtype)} for dtype in OTHER_DTYPES[arrays[name].dtype.name]]
        for wrong in (short, less, *others, {**arrays, "more": np.zeros(1, np.uint8)}):
            with pytest.raises(Refused):
                decode_answer(bytearray(encode_answer(ScoreAnswer(fields, wrong))), request, **sizes)
