"""Requests to a service until they are answered: what is safe is tried again, and everything ends in time."""

from __future__ import annotations

import random
import re
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import anyio
import httpx2

from errors import ConfigError, TeacherError
from models.http_clients import certificates, may_use_proxy, reason_of, token_header
from models.teacher_service.gate import MARK
from models.teacher_service.wire import MEDIA_TYPE

CONNECT_S = 10.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 10.0
LOOK_S, LOOK_AGAIN_S = 5.0, 30.0
_TRY_AGAIN = frozenset({408, 429, 502, 503, 504})


@dataclass(frozen=True)
class Answer:
    status: int
    ours: bool  # it came from a Protege teacher, not from something else at that address
    body: bytearray


class Connection:
    """One service, as one client sees it. Scoring changes nothing there, so any request may be sent again.

    `wait_s` is how long a service that cannot be reached, as one that restarts, is waited for; `deadline_s` is how long
    a request may take in all. A service that used up one of them is looked after before it is asked again, and no more
    often than every `LOOK_AGAIN_S`, so that a run with many requests left hears of it once and not once for each.
    """

    def __init__(self, url: str, token: str | None, *, wait_s: float, deadline_s: float) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url}: expected http://HOST:PORT or https://HOST:PORT")
        if parts.username or parts.password:
            raise ConfigError("a teacher's URL holds no user or password: give the token by file or environment")
        if token is not None and not re.fullmatch(r"[!-~]+", token):  # an HTTP library would show it in its complaint
            raise ConfigError("a token is one word of printable ASCII characters")
        self.url = url.rstrip("/")
        self._token = token
        self._wait_s, self._deadline_s = wait_s, deadline_s
        self._unreachable_since: float | None = None
        self._was_silent = False
        self._look_at = 0.0  # not before, if it was silent

    @asynccontextmanager
    async def open(self) -> AsyncIterator[httpx2.AsyncClient]:
        """Connections for some requests. They are of this event loop, and closed when the block ends."""
        timeout = httpx2.Timeout(self._deadline_s, connect=CONNECT_S)
        async with httpx2.AsyncClient(
            headers=token_header(self._token), timeout=timeout, verify=certificates(), trust_env=may_use_proxy(self.url)
        ) as client:
            yield client

    async def ask(
        self,
        client: httpx2.AsyncClient,
        method: str,
        path: str,
        *,
        max_bytes: int,
        content: bytes | None = None,
        params: Mapping[str, str] | None = None,
    ) -> Answer:
        """The first answer that is not a request to come back later. Raises `TeacherError`."""
        if self._was_silent and not await self._answers_again(client):
            raise TeacherError(f"{self.url} has not answered since it did not answer within {self._deadline_s:g} s")
        limit_s = self._deadline_s
        ends, pause_s, problem = time.monotonic() + limit_s, _FIRST_PAUSE_S, "no answer"
        while True:
            try:
                with anyio.fail_after(max(0.0, ends - time.monotonic())):
                    answer, retry_after_s = await self._once(client, method, path, max_bytes, content, params)
            except TimeoutError:
                self._was_silent = True
                raise TeacherError(f"{self.url} did not answer within {limit_s:g} s ({problem})") from None
            except httpx2.TransportError as error:
                problem = f"{type(error).__name__}: {error}"[:200].rstrip(": ")
                now = time.monotonic()
                self._unreachable_since = self._unreachable_since or now
                waited = now + pause_s > self._unreachable_since + self._wait_s
                # why: a long request that breaks off is no sign that nothing answered all the while
                if now + pause_s > ends or (waited and not await self._answers_again(client)):
                    raise TeacherError(
                        f"{self.url} cannot be reached, and was waited for {now - self._unreachable_since:.0f} s "
                        f"({problem}). Start the service again, and the same command goes on from the last checkpoint"
                    ) from error
                retry_after_s = 0.0
            else:
                self._unreachable_since = None
                if answer.status not in _TRY_AGAIN:
                    self._was_silent = False
                    return answer
                problem = f"status {answer.status}: {sentence(answer.body)}"
                if time.monotonic() + max(pause_s, retry_after_s) > ends:
                    raise TeacherError(f"{self.url} was busy for {limit_s:g} s ({problem})")
            await anyio.sleep(max(retry_after_s, pause_s) * random.uniform(0.8, 1.2))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _answers_again(self, client: httpx2.AsyncClient) -> bool:
        """Whether it is alive, which it says at once, however much it has to do. A frozen one says nothing."""
        if time.monotonic() < self._look_at:
            return False
        try:
            with anyio.fail_after(LOOK_S):
                await self._once(client, "GET", "/health", 1 << 10, None, None)
        except (TimeoutError, TeacherError, httpx2.TransportError):
            self._look_at = time.monotonic() + LOOK_AGAIN_S
            return False
        self._was_silent, self._unreachable_since = False, None
        return True

    async def _once(
        self,
        client: httpx2.AsyncClient,
        method: str,
        path: str,
        max_bytes: int,
        content: bytes | None,
        params: Mapping[str, str] | None,
    ) -> tuple[Answer, float]:
        headers = {"accept-encoding": "identity"} | ({} if content is None else {"content-type": MEDIA_TYPE})
        request: Any = client.stream(method, self.url + path, content=content, params=params, headers=headers)
        async with request as response:
            body = bytearray()
            async for piece in response.aiter_raw():
                if len(body) + len(piece) > max_bytes:
                    raise TeacherError(f"{self.url} answers more than the {max_bytes} bytes that were asked for")
                body += piece
            wait = response.headers.get("retry-after", "0")
            retry_after_s = min(float(wait), 60.0) if re.fullmatch(r"[0-9]{1,9}", wait) else 0.0
            return Answer(response.status_code, MARK.decode() in response.headers, body), retry_after_s


def sentence(body: bytearray) -> str:
    """What a refusal says, as one short line."""
    return reason_of(httpx2.Response(200, content=bytes(body[:2000])))
