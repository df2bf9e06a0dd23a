"""One container engine: calls to it run in threads under a bound of their own, containers start under another.

Speaks the Docker API through the docker SDK and honours DOCKER_HOST, so Podman's socket works, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ParamSpec, TypeVar

import anyio
import anyio.lowlevel
import docker
import docker.errors
import docker.utils
import requests
import urllib3.exceptions
from anyio import CancelScope, CapacityLimiter

from errors import SandboxError, SandboxUnavailableError
from sandbox.calls import call_in_thread
from sandbox.shell_stream import ExecSocket

P = ParamSpec("P")
T = TypeVar("T")
C = TypeVar("C", bound=docker.APIClient)

ENGINE_ERRORS = (docker.errors.DockerException, requests.RequestException, urllib3.exceptions.HTTPError, OSError)
CALL_TIMEOUT_S = 120  # of one answer of the engine; 32 containers starting at once take seconds each
CONNECT_S = 30.0  # of the first answer: systemd starts an engine when somebody comes, who waits for it meanwhile
SLOW_S = 10.0  # an engine that takes longer over a call is looked at, and again whenever as much has passed
PING_S = 10.0  # an engine that lives answers a ping at once, whatever else it does
CALLS_AT_ONCE = 16
STARTS_PER_CORE = 2  # more than this only makes every start slower
REMOVAL_TRIES = 5
REMOVAL_S = 60.0  # no further try after this: an engine that is stuck over a container answers no call about it
RETURN_POLL_S = 0.5
RETURN_S = 120.0  # an engine that restarts is back within this
BEGINNINGS = 3  # of work over which it goes away; after that it is there, and hangs over the work


def connect(client_type: type[C] = docker.APIClient) -> C:
    """A client of the engine that DOCKER_HOST names, or of the local one. Raises `SandboxUnavailableError`."""
    where = os.environ.get("DOCKER_HOST") or "the local socket"
    if where.startswith("ssh://"):
        raise SandboxUnavailableError(
            f"DOCKER_HOST={where}: ssh is not supported, since commands run over plain sockets. Forward the engine's"
            " socket (ssh -L ./docker.sock:/var/run/docker.sock host) and set DOCKER_HOST=unix://$PWD/docker.sock"
        )
    try:
        client = client_type(**docker.utils.kwargs_from_env(), version="auto", timeout=int(CONNECT_S))
        client.ping()
        client.timeout = CALL_TIMEOUT_S
    except ENGINE_ERRORS as error:
        raise SandboxUnavailableError(
            f"no container engine answers at {where} ({error}). Start Docker (as root: .ci/docker-engine), or point"
            " DOCKER_HOST at Docker's or Podman's socket (unix://…, tcp://…)"
        ) from error
    return client


def said_by(error: Exception) -> str:
    """What an engine's refusal says, without the request that it refused."""
    return error.explanation if isinstance(error, docker.errors.APIError) and error.explanation else str(error)


@contextmanager
def as_sandbox_errors(what: str) -> Iterator[None]:
    """Whatever the engine or the way to it says becomes a `SandboxError` that names what was being done."""
    try:
        yield
    except ENGINE_ERRORS as error:
        text = said_by(error)
        raise SandboxError(f"{what}: {text}") from error


@dataclass(frozen=True)
class Process:
    """Whether a process that was started inside a container still runs, and its exit code if not."""

    running: bool
    exit_code: int | None
    pid: int  # on the engine's machine


def remove_container(client: docker.APIClient, container: str) -> None:
    """Kill and remove, also what is frozen, which an engine can wait for for ever. Blocks; raises as the SDK does."""
    frozen = client.inspect_container(container)["State"].get("Paused")
    if frozen:
        with contextlib.suppress(docker.errors.APIError):  # thawed or gone meanwhile
            client.unpause(container)
    try:
        client.remove_container(container, force=True, v=True)
    except docker.errors.APIError as error:
        if not frozen or error.status_code not in (404, 409):
            raise
        with contextlib.suppress(docker.errors.NotFound):  # thawed, it saw its owner's end before we came
            client.wait(container, timeout=int(REMOVAL_S), condition="removed")


class Lifeline:
    """An attached stdin of a container: its keeper ends when this closes, with this process at the latest."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    def close(self) -> None:
        close_raw(self._raw)


def close_raw(raw: Any) -> None:
    """Close a hijacked connection, its half-open side first: the engine then sees the end at once."""
    sock = getattr(raw, "_sock", raw)
    with suppress_os_errors():
        sock.shutdown(socket.SHUT_RDWR)
    with suppress_os_errors():
        sock.close()
    response = getattr(raw, "_response", None)
    if response is not None:
        with suppress_os_errors():
            response.close()


@contextmanager
def suppress_os_errors() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, AttributeError):  # closed already, by the engine or by us
        return


class Engine:
    """An engine and the two bounds on its use. Belongs to one event loop."""

    def __init__(self, client: docker.APIClient) -> None:
        self.client = client
        self.cores = os.cpu_count() or 1
        self.starts = CapacityLimiter(STARTS_PER_CORE * self.cores)
        self._calls = CapacityLimiter(CALLS_AT_ONCE)
        self._looking = anyio.Lock()
        self._looked_at = 0.0
        self._silence = ""  # what the last look found; empty: it answers

    @classmethod
    async def connect(cls) -> Engine:
        """Raises `SandboxUnavailableError`."""
        connecting = call_in_thread(connect)
        await asyncio.wait([connecting])
        engine = cls(connecting.result())
        engine.cores = int((await engine.call("asking the engine about itself", engine.client.info))["NCPU"])
        engine.starts.total_tokens = STARTS_PER_CORE * engine.cores
        return engine

    async def in_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """A call, when its turn comes. A cancelled caller still learns what the engine did. Raises as the SDK does, and
        `SandboxError` for an engine that answers nothing at all: then the call is left behind."""
        return await self.in_turn(self._calls, partial(function, *args, **kwargs))

    async def in_turn(self, turns: CapacityLimiter, function: Callable[[], T]) -> T:
        """The same in turns of another kind."""
        asked = time.monotonic()
        async with turns:
            try:
                with CancelScope(shield=True):
                    if self._silence:
                        await self._look(asked)
                    return await self.outcome(call_in_thread(function))
            except SandboxError:
                await anyio.lowlevel.checkpoint_if_cancelled()  # nobody waits for it
                raise
        raise AssertionError("nobody cancels this scope")

    async def outcome(self, call: asyncio.Future[T]) -> T:
        """Of a call that was begun. Raises `SandboxError` if the engine is found to be frozen before."""
        while not (await asyncio.wait([call], timeout=SLOW_S))[0]:
            await self._look(time.monotonic())
        return call.result()

    async def _look(self, asked: float) -> None:
        """One ping for all who have asked meanwhile. Raises `SandboxError` if the engine does not answer it."""
        async with self._looking:
            if self._looked_at < asked:
                ping = call_in_thread(self.client.ping)
                await asyncio.wait([ping], timeout=PING_S)
                error = ping.exception() if ping.done() else TimeoutError(f"a ping took more than {PING_S:g} s")
                self._silence = "" if error is None else str(error) or repr(error)
                self._looked_at = time.monotonic()
        if self._silence:
            raise SandboxError(f"the container engine does not answer: {self._silence}")

    async def call(self, what: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Raises `SandboxError` that begins with `what`."""
        with as_sandbox_errors(what):
            return await self.in_thread(function, *args, **kwargs)

    async def answers(self) -> bool:
        """Whether the engine is there."""
        try:
            await self._look(time.monotonic())
        except SandboxError:
            return False
        return True

    async def outlast(self, work: Callable[[], Awaitable[T]]) -> T:
        """What `work()` returns. If the engine goes away over it, it is begun anew when the engine is back: for work
        that may be begun twice. Raises `SandboxError`, also if the engine stays away for `RETURN_S`, or is there and
        does not do it."""
        failure: Exception | None = None
        for _ in range(BEGINNINGS):
            try:
                return await work()
            except (SandboxError, SandboxUnavailableError) as error:
                failure = error
            refused = failure.__cause__ is None or isinstance(failure.__cause__, docker.errors.APIError)
            if refused and await self.answers():
                raise failure
            until = time.monotonic() + RETURN_S  # from here: the work itself may have taken long
            await anyio.sleep(RETURN_POLL_S)
            while not await self.answers() and time.monotonic() < until:
                await anyio.sleep(RETURN_POLL_S)
            if time.monotonic() > until:
                break
        # In the midst of a run this is no mistake of the user's any longer.
        raise SandboxError(f"the engine has gone away, or is stuck: {failure}") from failure

    async def open_exec(
        self, container: str, command: list[str], env: dict[str, str], user: str | None
    ) -> tuple[ExecSocket, str]:
        """Start a program in a container. Its connected standard streams, and the engine's id for it."""

        def start() -> tuple[ExecSocket, str]:
            made = self.client.exec_create(
                container, command, stdin=True, stdout=True, stderr=True, environment=env, user=user or ""
            )
            raw = self.client.exec_start(made["Id"], socket=True)
            return ExecSocket(raw, partial(close_raw, raw)), made["Id"]

        return await self.call(f"starting {command[0]} in a sandbox", start)

    async def process(self, exec_id: str) -> Process:
        """Raises `SandboxError` if the engine does not know the process any longer."""
        found = await self.call("asking after a shell", self.client.exec_inspect, exec_id)
        return Process(bool(found["Running"]), found["ExitCode"], int(found.get("Pid") or 0))

    async def is_running(self, container: str) -> bool:
        try:
            found = await self.in_thread(self.client.inspect_container, container)
        except docker.errors.NotFound:
            return False
        except ENGINE_ERRORS as error:
            raise SandboxError(f"asking after a sandbox: {error}") from error
        return bool(found["State"]["Running"])

    async def remove(self, container: str) -> None:
        """Kill and remove, whatever its state; gone is well. Raises `SandboxError` if it is still there in the end."""
        problem, until = "", time.monotonic() + REMOVAL_S
        for attempt in range(REMOVAL_TRIES):
            try:
                await self.in_thread(remove_container, self.client, container)
                return
            except docker.errors.NotFound:
                return
            except ENGINE_ERRORS as error:
                problem = str(error)  # "removal already in progress", or the engine is restarting
            except SandboxError as error:  # frozen: it would not hear of another try, either
                problem = str(error)
                break
            if time.monotonic() > until:
                break
            await anyio.sleep(0.2 * 2**attempt)
        raise SandboxError(f"sandbox {container} could not be removed; python -m sandbox.reap will: {problem}")
