"""Bytes to and from a program in a container: the engine's framed stream, cut at tokens, kept as head and tail."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Callable
from typing import Any, BinaryIO, Protocol

import anyio

READ_BYTES = 256 * 1024
REST_BYTES = 2**20  # kept of what comes after the last token
FRAME_HEADER = 8  # stream number, three zeros, length as four bytes big-endian
STDOUT, STDERR = 1, 2
WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class ExecSocket:
    """The connected standard streams of one program in a container. Not for concurrent readers."""

    def __init__(self, raw: Any, close: Callable[[], None]) -> None:
        self._close = close
        self._socket = getattr(raw, "_sock", raw)
        self._socket.setblocking(False)
        self._buffer = bytearray(read_ahead(raw))
        self._waiting = False
        self._closed = False

    async def send(self, data: bytes) -> None:
        """Raises OSError if the other end is gone."""
        view = memoryview(data)
        while view:
            try:
                view = view[self._socket.send(view) :]
            except WOULD_BLOCK:
                await anyio.wait_writable(self._socket)

    async def receive(self) -> list[tuple[int, bytes]]:
        """What has come in: (STDOUT or STDERR, bytes) in order. Empty at the end of the stream."""
        while True:
            if frames := self._frames():
                return frames
            try:
                data = self._socket.recv(READ_BYTES)
            except WOULD_BLOCK:
                await self._until_readable()
                continue
            except OSError:
                return []
            if not data:
                return []
            self._buffer += data

    async def _until_readable(self) -> None:
        self._waiting = True
        try:
            await anyio.wait_readable(self._socket)
        finally:
            self._waiting = False
            if self._closed:
                self._close()

    def _frames(self) -> list[tuple[int, bytes]]:
        """Complete frames, and as much as is there of an incomplete one."""
        frames, at, buffer = [], 0, self._buffer
        while len(buffer) - at > FRAME_HEADER:
            size = int.from_bytes(buffer[at + 4 : at + FRAME_HEADER], "big")
            content = bytes(buffer[at + FRAME_HEADER : at + FRAME_HEADER + size])
            if content:
                frames.append((buffer[at], content))
            if len(content) < size:  # what is missing comes as a frame of its own
                header = bytes([buffer[at], 0, 0, 0]) + (size - len(content)).to_bytes(4, "big")
                self._buffer = bytearray(header)
                return frames
            at += FRAME_HEADER + size
        del buffer[:at]
        return frames

    def close(self) -> None:
        """Also under a reader: it is told of the end, and closes then. Its descriptor must not be another's before."""
        self._closed = True
        if self._waiting:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        else:
            self._close()


def read_ahead(raw: Any) -> bytes:
    """Bytes of the stream that the SDK's HTTP client has read along with the answer's head."""
    response = getattr(raw, "_response", None)
    reader = getattr(getattr(getattr(response, "raw", None), "_fp", None), "fp", None)
    return bytes(reader.peek()) if reader is not None else b""


class Sink(Protocol):
    """Takes a stream's bytes as they come; never fails and never holds more than it promised."""

    total: int

    def write(self, data: bytes) -> None: ...


class HeadTail:
    """The first and the last bytes of a stream, together at most `limit`."""

    def __init__(self, limit: int) -> None:
        self.total = 0
        self._tail_limit = limit // 2
        self._head_limit = limit - self._tail_limit
        self._head = bytearray()
        self._tail = bytearray()

    def write(self, data: bytes) -> None:
        self.total += len(data)
        room = self._head_limit - len(self._head)
        if room > 0:
            self._head += data[:room]
            data = data[room:]
        if data and self._tail_limit:
            self._tail += data[-self._tail_limit :]
            if len(self._tail) > 4 * self._tail_limit + READ_BYTES:  # now and then, not for every piece
                del self._tail[: -self._tail_limit]

    def content(self) -> bytes:
        return bytes(self._head + (self._tail[-self._tail_limit :] if self._tail_limit else b""))


class FileSink:
    """A file that takes up to `limit` bytes; `total` counts what came. A full disk is told at the end."""

    def __init__(self, file: BinaryIO, limit: int) -> None:
        self.total = 0
        self.error: OSError | None = None
        self._file = file
        self._limit = limit

    def write(self, data: bytes) -> None:
        room = max(0, self._limit - self.total)
        self.total += len(data)
        if self.error is None:
            try:
                self._file.write(data[:room])
            except OSError as error:
                self.error = error


class Splitter:
    """Cuts a stream at each occurrence of a token, however reads fall, into one sink after the other."""

    def __init__(self, token: bytes, sinks: list[Sink]) -> None:
        self._token = token
        self._sinks = sinks
        self._held = b""  # may be the beginning of a token
        self.passed = 0  # tokens found
        self.rest = b""  # what came after the last one

    @property
    def done(self) -> bool:
        return self.passed == len(self._sinks)

    def feed(self, data: bytes) -> None:
        data = self._held + data if self._held else data
        while not self.done:
            at = data.find(self._token)
            if at < 0:
                keep = held_at_end(data, self._token)
                self._sinks[self.passed].write(data[: len(data) - keep])
                self._held = data[len(data) - keep :]
                return
            self._sinks[self.passed].write(data[:at])
            self.passed += 1
            data = data[at + len(self._token) :]
        self._held = b""
        self.rest = (self.rest + data)[-REST_BYTES:]

    def flush(self) -> None:
        """The stream has ended: nothing will complete a token."""
        if self._held and not self.done:
            self._sinks[self.passed].write(self._held)
            self._held = b""


def held_at_end(data: bytes, token: bytes) -> int:
    """The length of the longest end of `data` that `token` begins with."""
    for length in range(min(len(token) - 1, len(data)), 0, -1):
        if data.endswith(token[:length]):
            return length
    return 0
