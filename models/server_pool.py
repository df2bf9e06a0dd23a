"""Requests to one or several HTTP servers that do the same work: balanced, bounded, retried, never waited for for ever.

Only for requests that may be asked twice. A server that does not answer is left alone for a while, then tried by
one request; if it answers, it is used again.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import anyio
import httpx2

from models.http_clients import certificates, may_use_proxy, reason_of, token_header

CONNECT_S = 10.0
IN_FLIGHT = 16  # requests at a time for every server; further ones wait here
LOOK_S = 5.0  # for a server that failed to show that it is back
TRIES = 4  # of a request that servers took and failed at
LONGEST_PAUSE_S = 30.0
_BUSY = {429, 502, 503, 504}  # the server's state, not the request's fault: leave it alone for a while
_RETRIED = {408, 500, *_BUSY}


@dataclass(frozen=True)
class Access:
    """How servers are reached. The token is sent as a bearer token, and never shown."""

    urls: tuple[str, ...]
    token: str | None = field(default=None, repr=False)
    timeout_s: float = 300.0  # of one request
    patience_s: float = 60.0  # how long all servers may be silent before requests fail


class Refused(Exception):
    """A server understood the request and will not do it: asking again is of no use."""

    def __init__(self, url: str, status: int, reason: str) -> None:
        super().__init__(f"{url} answers {status}: {reason}")
        self.url, self.status, self.reason = url, status, reason


class Unanswered(Exception):
    """No server answered in time, or all tries of a request failed."""


@dataclass
class _Server:
    url: str
    load: int = 0  # requests on their way
    failures: int = 0  # since it last answered
    silent_since: float = math.inf
    retry_at: float = -math.inf
    reason: str = ""

    def answered(self) -> None:
        self.failures, self.silent_since, self.retry_at = 0, math.inf, -math.inf

    def failed(self, reason: str, now: float) -> None:
        self.failures += 1
        self.silent_since, self.reason = min(self.silent_since, now), reason
        pause = min(LONGEST_PAUSE_S, 0.5 * 2 ** (self.failures - 1)) * random.uniform(0.7, 1.0)
        self.retry_at = now + pause


class ServerPool:
    def __init__(
        self,
        access: Access,
        *,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
    ) -> None:
        self.access = access
        self._servers = [_Server(url.rstrip("/")) for url in access.urls]
        self._now, self._sleep = now, sleep
        self._slots = anyio.Semaphore(IN_FLIGHT * len(self._servers))

    def client(self) -> httpx2.AsyncClient:
        """For some requests, to be closed after them: connections belong to the event loop that made them."""
        timeout = httpx2.Timeout(self.access.timeout_s, connect=min(CONNECT_S, self.access.timeout_s))
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=IN_FLIGHT)
        proxies = all(map(may_use_proxy, self.access.urls))
        return httpx2.AsyncClient(
            headers=token_header(self.access.token),
            timeout=timeout,
            limits=limits,
            verify=certificates(),
            trust_env=proxies,
        )

    async def ask(self, client: httpx2.AsyncClient, path: str, body: Mapping[str, Any] | None = None) -> bytes:
        """POST `body`, or GET: the answer of whichever server gives one. Raises `Refused`, `Unanswered`."""
        async with self._slots:
            for attempt in range(1, TRIES + 1):
                try:
                    return await self._from_any(client, path, body)
                except _Failed as error:
                    if attempt == TRIES:
                        raise Unanswered(f"{error}, {TRIES} times") from None
                    await self._sleep(min(LONGEST_PAUSE_S, 0.5 * 2 ** (attempt - 1)))
        raise AssertionError

    async def _from_any(self, client: httpx2.AsyncClient, path: str, body: Mapping[str, Any] | None) -> bytes:
        while True:
            server = await self._ready()
            server.load += 1
            try:
                if server.failures:
                    server.retry_at = math.inf  # one request finds out whether it is back; the others wait
                    await self._look_at(client, server)
                    server.answered()  # this request may take long, and the others need not wait for its end
                with anyio.fail_after(self.access.timeout_s):
                    response = await client.request("GET" if body is None else "POST", server.url + path, json=body)
            except _Silent as error:
                server.failed(str(error), self._now())
                continue
            except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:  # it never had the request
                server.failed(f"{server.url}: {_named(error)}", self._now())
                continue
            except (httpx2.RequestError, TimeoutError) as error:
                server.failed(f"{server.url}: {_named(error)}", self._now())
                raise _Failed(server.reason) from error
            finally:
                server.load -= 1
                if server.retry_at == math.inf:  # cancelled, or it has answered
                    server.retry_at = -math.inf
            if response.status_code in _BUSY:
                server.failed(f"{server.url} answers {response.status_code}: {reason_of(response)}", self._now())
            else:
                server.answered()
            if response.status_code in _RETRIED:
                raise _Failed(f"{server.url} answers {response.status_code}: {reason_of(response)}")
            if response.status_code != 200:
                raise Refused(server.url, response.status_code, reason_of(response))
            return response.content

    async def _look_at(self, client: httpx2.AsyncClient, server: _Server) -> None:
        """Any answer will do: a server that is alive says something at once, and a frozen one would take up a whole
        timeout. Raises `_Silent`, and `httpx2.ConnectError`s."""
        try:
            with anyio.fail_after(min(LOOK_S, self.access.timeout_s)):
                await client.get(server.url + "/health")
        except (httpx2.ConnectError, httpx2.ConnectTimeout):
            raise
        except (httpx2.RequestError, TimeoutError) as error:
            raise _Silent(f"{server.url} does not answer /health ({_named(error)})") from error

    async def _ready(self) -> _Server:
        """The server with the least to do. Raises `Unanswered` once all have been silent for too long."""
        while True:
            now = self._now()
            if ready := [server for server in self._servers if server.retry_at <= now]:
                return min(ready, key=lambda server: server.load)
            silent_s = min(now - server.silent_since for server in self._servers)
            looked_at = any(server.retry_at == math.inf for server in self._servers)  # known within LOOK_S
            if silent_s >= self.access.patience_s and not looked_at:
                reasons = "; ".join(server.reason for server in self._servers)
                raise Unanswered(f"no answer for {silent_s:.0f} s ({reasons})")
            next_try = min(server.retry_at for server in self._servers) - now
            await self._sleep(min(max(next_try, 0.01), 0.5))


class _Silent(Exception):
    """A server that failed before is not back."""


class _Failed(Exception):
    """One try of a request, at a server that took it."""


def _named(error: Exception) -> str:
    return f"{type(error).__name__} {error}".strip()
