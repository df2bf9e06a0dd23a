"""What every request to the service passes first, and how bodies come in and go out: never more than is allowed,
never for longer."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import anyio

from models.teacher_service.messages import SERVICE
from models.teacher_service.token import is_token
from models.teacher_service.wire import MEDIA_TYPE, Refused

Asgi = Callable[[dict, Callable[[], Awaitable[dict]], Callable[[dict], Awaitable[None]]], Awaitable[None]]
MARK = b"protege-teacher"
"""A header of every answer, by which a client knows this service."""
OPEN_PATHS = frozenset({"/health"})
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
GONE = 499
"""The status, which nobody reads, of a request whose client went away."""
_PIECE_BYTES = 1 << 20


class Gate:
    """ASGI middleware: the bearer token before anything else is looked at.

    Without a token, which is allowed on loopback only, the request must name loopback as its host: a web page
    that has its name resolve to 127.0.0.1 does not.
    """

    def __init__(self, app: Asgi, *, token: str | None, answered: Callable[[str, int], None]) -> None:
        self._app = app
        self._token = token
        self._answered = answered

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def marked(message: dict) -> None:
            if message["type"] == "http.response.start":
                self._answered(scope["path"], message["status"])
                message = {**message, "headers": [*message["headers"], (MARK, b"1")]}
            await send(message)

        refusal = self._refusal(scope)
        if refusal is None:
            await self._app(scope, receive, marked)
        else:
            await send_refusal(refusal, marked)

    def _refusal(self, scope: dict) -> Refused | None:
        headers = dict(scope["headers"])
        if self._token is None:
            host = headers.get(b"host", b"").decode("latin-1").lower()
            name = host if host.endswith("]") else host.rpartition(":")[0] or host
            return (
                None if name in LOOPBACK_NAMES else Refused(403, "without a token this service answers loopback only")
            )
        if scope["path"] in OPEN_PATHS:
            return None
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not is_token(given.strip(), self._token):
            return Refused(401, "the token is missing or wrong: send it as `Authorization: Bearer TOKEN`")
        return None


async def send_refusal(refusal: Refused, send: Any) -> None:
    """As JSON with one key, `error`."""
    headers = [(b"content-type", b"application/json")]
    if refusal.status == 401:
        headers.append((b"www-authenticate", f'Bearer realm="{SERVICE}"'.encode()))
    if refusal.retry_after_s is not None:
        headers.append((b"retry-after", str(int(refusal.retry_after_s)).encode()))
    body = json.dumps({"error": str(refusal)}).encode()
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def read_body(request: Any, *, max_bytes: int, timeout_s: float) -> bytearray:
    """The body of a Starlette request. Raises `Refused` for another media type, a length over the limit, announced or
    sent, and a sender that takes too long or goes away."""
    from starlette.requests import ClientDisconnect  # pyright: ignore[reportMissingImports]

    if request.headers.get("content-type") != MEDIA_TYPE:
        raise Refused(415, f"send {MEDIA_TYPE}")
    announced = request.headers.get("content-length", "0")
    if not announced.isdecimal() or int(announced) > max_bytes:
        raise Refused(413, f"the request has {announced[:20]} bytes, at most {max_bytes} are taken")
    body = bytearray()
    try:
        with anyio.fail_after(timeout_s):
            async for piece in request.stream():
                if len(body) + len(piece) > max_bytes:
                    raise Refused(413, f"the request goes on after {max_bytes} bytes, which is the limit")
                body += piece
    except TimeoutError:
        raise Refused(408, f"the request was not there after {timeout_s:g} s") from None
    except ClientDisconnect:
        raise Refused(GONE, "the client is gone") from None
    return body


async def send_body(body: bytes, send: Any, *, timeout_s: float) -> None:
    """In pieces, each in its time, so that a client that stops reading cannot hold an answer in memory."""
    headers = [(b"content-type", MEDIA_TYPE.encode()), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    view = memoryview(body)
    for start in range(0, max(1, len(view)), _PIECE_BYTES):
        piece = bytes(view[start : start + _PIECE_BYTES])
        with anyio.fail_after(timeout_s):
            await send({"type": "http.response.body", "body": piece, "more_body": start + _PIECE_BYTES < len(view)})


async def unless_disconnected(receive: Any, work: Awaitable[Any]) -> Any:
    """What `work` gives, or None where the client goes away first: then `work` is cancelled."""
    found: list[Any] = []
    failed: list[Exception] = []

    async def finish() -> None:
        try:
            found.append(await work)
        except Exception as error:  # raised below, out of the task group, which would wrap it
            failed.append(error)
        tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(finish)
        with suppress(RuntimeError):
            while (await receive())["type"] != "http.disconnect":
                pass
        tasks.cancel_scope.cancel()
    if failed:
        raise failed[0]
    return found[0] if found else None
