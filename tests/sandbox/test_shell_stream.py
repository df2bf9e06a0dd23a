"""Bytes from the engine: frames in any pieces, tokens across them, heads and tails."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.shell_stream import ExecSocket, HeadTail, Splitter

pytestmark = pytest.mark.anyio


def pieces(data: bytes, sizes: list[int]) -> Iterator[bytes]:
    for size in sizes:
        yield data[:size]
        data = data[size:]
    yield data


SIZES = st.lists(st.integers(1, 9), max_size=30)


@given(st.binary(max_size=60), st.integers(0, 50), SIZES)
def test_a_head_and_a_tail_are_the_ends_of_the_whole(data: bytes, limit: int, sizes: list[int]):
    kept = HeadTail(limit)
    for piece in pieces(data, sizes):
        kept.write(piece)
    head, tail = limit - limit // 2, limit // 2
    assert kept.total == len(data)
    assert kept.content() == (data if len(data) <= limit else data[:head] + data[len(data) - tail :])


def test_a_flood_is_not_kept():
    kept = HeadTail(1000)
    for _ in range(1000):
        kept.write(bytes(100_000))
    assert len(kept._head) + len(kept._tail) < 10**6


@given(st.lists(st.binary(max_size=12).map(lambda b: b.replace(b"T", b"TO")), min_size=4, max_size=4), SIZES)
def test_a_token_cuts_the_stream_wherever_reads_fall(parts: list[bytes], sizes: list[int]):
    token = b"TOKTOKEN"  # begins as it goes on
    parts = [part for part in parts if token not in part]
    stream = token.join(parts)
    if stream.count(token) != len(parts) - 1:  # parts and tokens made another token together
        return
    sinks = [HeadTail(100) for _ in parts[1:]]
    splitter = Splitter(token, list(sinks))
    for piece in pieces(stream, sizes):
        splitter.feed(piece)
    assert [sink.content() for sink in sinks] == parts[:-1]
    assert splitter.done and splitter.rest == parts[-1]


def test_at_the_end_of_the_stream_half_a_token_is_output():
    sink = HeadTail(100)
    splitter = Splitter(b"TOKEN", [sink])
    splitter.feed(b"outTOK")
    assert sink.content() == b"out"
    splitter.flush()
    assert sink.content() == b"outTOK" and not splitter.done


def frame(stream: int, content: bytes) -> bytes:
    return bytes([stream, 0, 0, 0]) + len(content).to_bytes(4, "big") + content


async def test_frames_arrive_in_any_pieces():
    ours, theirs = socket.socketpair()
    there = ExecSocket(ours, ours.close)
    data = frame(1, b"out") + frame(2, b"error") + frame(1, bytes(70_000)) + frame(2, b"!")
    got: dict[int, bytes] = {1: b"", 2: b""}
    for start in range(0, len(data), 7001):
        theirs.sendall(data[start : start + 7001])
        for stream, content in await there.receive():
            got[stream] += content
    for start in range(0, 30):
        theirs.sendall(frame(1, b"x" * 30)[start : start + 1] if start < 30 else b"")
    theirs.sendall(frame(1, b"x" * 30)[30:])
    theirs.close()
    while frames := await there.receive():
        for stream, content in frames:
            got[stream] += content
    there.close()
    assert got == {1: b"out" + bytes(70_000) + b"x" * 30, 2: b"error!"}


async def test_what_is_sent_arrives_whole_and_a_closed_end_is_told():
    ours, theirs = socket.socketpair()
    there = ExecSocket(ours, ours.close)
    await there.send(b"abc")
    assert theirs.recv(10) == b"abc"
    theirs.close()
    assert await there.receive() == []
    with pytest.raises(OSError):
        await there.send(b"abc")
    there.close()
