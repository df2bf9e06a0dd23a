"""uvicorn with an end to everything: to connections that never come to a request, and to itself."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

from uvicorn import Config, Server  # pyright: ignore[reportMissingImports]
from uvicorn.protocols.http.h11_impl import H11Protocol  # pyright: ignore[reportMissingImports]

from models.exiting import exit_now
from models.teacher_service.server import Service, ServiceLimits

CUT_SHORT = b"ended with work that was not finished in time\n"


class BoundedProtocol(H11Protocol):
    """One connection. uvicorn waits for a request's first lines for ever; here it is closed if they are not there in
    time. One too many is closed at once: uvicorn answers those up to twice `connections` with status 503."""

    def __init__(self, limits: ServiceLimits, **options: Any) -> None:
        super().__init__(**options)
        self._limits = limits
        self._waits: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > 2 * self._limits.connections:
            transport.abort()
        else:
            self._expect_a_request()

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self._expect_nothing()
        else:
            self._expect_a_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect_nothing()
        super().connection_lost(exc)

    def _expect_a_request(self) -> None:
        if self._waits is None and not self.transport.is_closing():
            self._waits = self.loop.call_later(self._limits.head_timeout_s, self.transport.abort)

    def _expect_nothing(self) -> None:
        if self._waits is not None:
            self._waits.cancel()
            self._waits = None


class BoundedServer(Server):
    """Serves until `stop`, or until SIGTERM or SIGINT once `end_at_signals` was called."""

    def __init__(self, service: Service) -> None:
        limits = service.limits
        super().__init__(
            Config(
                service.app,  # type: ignore[arg-type]
                http=partial(BoundedProtocol, limits),  # type: ignore[arg-type]
                ws="none",
                lifespan="on",
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=limits.connections,
            )
        )
        self._service = service
        self.exit_code = 0
        self._signalled = threading.Event()

    def end_at_signals(self, grace_s: float) -> None:
        """From now on the first signal lets what is being scored be answered, and the process is over `grace_s` later
        whatever still computes; a second one ends it at once. For the main thread."""

        def end(number: int, frame: object) -> None:
            # why: another thread that is started here could wait for ever for a lock that this one holds
            self.exit_code = 130 if number == signal.SIGINT else 0
            if self._signalled.is_set():
                os._exit(self.exit_code)
            self.should_exit = True
            self._signalled.set()

        def watch() -> None:
            self._signalled.wait()
            threading.Event().wait(grace_s)
            exit_now(self.exit_code, (2, CUT_SHORT))

        threading.Thread(target=watch, name="grace", daemon=True).start()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, end)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # uvicorn's own handlers come late, and raise what they caught once more

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.queue.close()  # clients that wait are sent away to try again; what is being scored is finished
        await super().shutdown(sockets)
