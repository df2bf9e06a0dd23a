"""`DockerSandbox`: a container that one episode owns, and `DockerSandboxFactory`, which makes them.

A container is removed by its owner; ends by itself when its owner dies (its first program reads a pipe that the
owner holds open) or when its lease is over; and is found by its labels otherwise (`sandbox.reap`).
"""

from __future__ import annotations

import contextlib
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import anyio
from anyio import CancelScope

from errors import SandboxError
from sandbox import files
from sandbox.container import NO_BASH, Container, MissingImage, container_options, start_container
from sandbox.docker_engine import Engine, Process
from sandbox.dockerfile import substitute
from sandbox.images import PULL_TIMEOUT_S, Images
from sandbox.processes import END_INSIDE, OOM_KILLS_INSIDE, ContainerProcess, HostView, host_view, now_ticks
from sandbox.reap import reap
from sandbox.shell import MARK, Ended, Report, Shell
from sandbox.shell_stream import STDERR, STDOUT, HeadTail, Sink
from sandbox.types import ExecResult, SandboxConfig, TimedOut

log = logging.getLogger(__name__)

FILE_TIMEOUT_S = 600.0
APART_BYTES = 2**20
END_TIMEOUT_S = 10.0  # for proving a command dead; after this its sandbox is given up
SYNTAX_ERROR = 2
KILLED = 137
SHELL_TRIES = 3
OUR_ENV = {"LC_ALL": "C"}  # for our own scripts, whose complaints are read


@dataclass(frozen=True)
class ShellKey:
    """Which of a sandbox's shells: one per user for commands, and one for our own scripts."""

    user: str | None
    ours: bool = False


class DockerSandbox:
    """See `Sandbox`. Made by `DockerSandboxFactory.create`."""

    def __init__(self, engine: Engine, container: Container, config: SandboxConfig) -> None:
        self._engine = engine
        self._container = container.id
        self._name = container.name
        self._lifeline = container.lifeline
        self._config = config
        self._user = config.user or container.image_user  # of what asks for no other
        self._host = host_view(container.id, container.init_pid)
        self._oom_kills = self._host.oom_kills() if self._host else 0
        self._shells: dict[ShellKey, Shell] = {}
        self._locks: dict[ShellKey, anyio.Lock] = {}
        self._ending = anyio.Lock()
        self._lost: set[ShellKey] = set()  # shells that have ended since their last command
        self._gone: str | None = None  # why nothing works any longer
        self._commands = 0
        self._answered = False  # some shell has
        self._no_bash = NO_BASH.format(image=container.image)

    @property
    def id(self) -> str:
        return self._name

    async def run_command(
        self,
        command: str,
        *,
        timeout_s: float,
        workdir: str | None = None,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
        max_output_bytes: int | None = None,
        stdin: bytes | None = None,
    ) -> ExecResult:
        limit = self._config.max_output_bytes if max_output_bytes is None else max_output_bytes
        if "\0" in command or any("\0" in text for text in (workdir or "", *(env or {}).values())):
            complaint = b"a command, its folder and its environment cannot hold NUL bytes\n"
            return ExecResult(SYNTAX_ERROR, b"", complaint, 0, len(complaint), 0.0)
        key = ShellKey(user)
        async with self._locks.setdefault(key, anyio.Lock()):
            self._check_alive()
            self._commands += 1
            mark = f"{self._name}-{self._commands}"
            options = {"workdir": workdir, "env": env, "stdin": stdin}
            return await self._run(command, mark, key, timeout_s, limit, options)

    async def _run(
        self, command: str, mark: str, key: ShellKey, timeout_s: float, limit: int, options: dict[str, Any]
    ) -> ExecResult:
        for _ in range(SHELL_TRIES):
            stdout, stderr = HeadTail(limit), HeadTail(limit)
            shell = await self._shell(key)
            started = time.monotonic()
            work = shell.run(command, stdout=stdout, stderr=stderr, mark=mark, **options)
            outcome = await self._supervise(work, key, shell, mark, timeout_s)
            duration_s = time.monotonic() - started
            if isinstance(outcome, Ended):
                exit_code = await self._account_for(key, shell)
                if not outcome.begun:
                    continue  # the shell had died since the last command: this one runs in a new shell
            else:
                exit_code = outcome.exit_code if outcome is not None else KILLED
            result = ExecResult(
                exit_code,
                stdout.content(),
                stderr.content(),
                stdout.total,
                stderr.total,
                duration_s,
                oom_killed=await self._was_oom_killed(exit_code),
                ended_shell=not isinstance(outcome, Report),
                shell_lost=key in self._lost,
            )
            if outcome is None:
                if not await self._engine.answers():  # then that may be all that the time was for
                    await self._give_up("the engine does not answer")
                raise TimedOut(timeout_s, result)
            if isinstance(outcome, Report):
                self._lost.discard(key)
            return result
        await self._give_up("something inside ends every shell that is started")
        raise AssertionError("not reached")

    # --- files

    async def read_file(self, path: str, *, max_bytes: int | None = None, user: str | None = None) -> bytes:
        return await files.read_file(self._run_script, path, max_bytes, user)

    async def write_file(self, path: str, content: bytes, *, mode: int = 0o644, user: str | None = None) -> None:
        await files.write_file(self._run_script, path, content, mode, user)

    async def upload_dir(self, source: Path, target: str, *, user: str | None = None) -> None:
        await files.upload_dir(self._run_script, source, target, user)

    async def download_dir(
        self, source: str, target: Path, *, max_bytes: int | None = None, user: str | None = None
    ) -> tuple[str, ...]:
        return await files.download_dir(self._run_script, source, target, max_bytes, user)

    async def _run_script(
        self, script: str, *, stdout: Sink, stderr: Sink, payload: IO[bytes] | None = None, user: str | None = None
    ) -> int:
        """One script of ours, in a shell that no command of the model ever reaches."""
        key = ShellKey(user, ours=True)
        async with self._locks.setdefault(key, anyio.Lock()):
            self._check_alive()
            shell = await self._shell(key)
            work = shell.run_script(script, stdout=stdout, stderr=stderr, payload=payload)
            outcome = await self._supervise(work, key, shell, shell.mark, FILE_TIMEOUT_S)
            if isinstance(outcome, Report):
                return outcome.exit_code
            if isinstance(outcome, Ended):
                await self._account_for(key, shell)
            raise SandboxError(f"moving files of sandbox {self._name} took too long, or was interrupted from inside")

    # --- shells

    async def _shell(self, key: ShellKey) -> Shell:
        """The user's shell, a new one if it has none."""
        if (shell := self._shells.get(key)) is None:
            mark = f"{self._name}-shell{secrets.token_hex(3)}"
            try:
                user, env = key.user or self._user, OUR_ENV if key.ours else {}
                shell = await Shell.open(self._engine, self._host, self._container, user, mark, env)
            except SandboxError as error:
                if not await self._engine.is_running(self._container):
                    await self._give_up("its container has ended" if self._answered else self._no_bash)
                way_out = "" if self._answered else ": a sandbox needs an image that has bash"
                raise SandboxError(f"sandbox {self._name}: {error}{way_out}") from error
            self._answered = True
            self._host = shell.host
            self._shells[key] = shell
        return shell

    async def _account_for(self, key: ShellKey, shell: Shell) -> int:
        """The exit code of a shell that has ended. Raises `SandboxError` if the container ended with it."""
        self._drop(key, shell)
        with anyio.move_on_after(END_TIMEOUT_S):
            while (process := await self._process(shell)).running:
                await anyio.sleep(0.02)
            # Killed from inside or with the whole container? A new shell is the proof; one is needed next anyway.
            if process.exit_code is None or process.exit_code >= 128:
                await self._shell(key)
            elif not await self._engine.is_running(self._container):
                await self._give_up("its container has ended")
            return KILLED if process.exit_code is None else process.exit_code
        await self._give_up("the engine does not say how a shell ended")
        raise AssertionError("not reached")

    async def _process(self, shell: Shell) -> Process:
        try:
            return await self._engine.process(shell.exec_id)
        except SandboxError as error:
            await self._give_up(f"its shell cannot be found ({error})")
            raise

    def _drop(self, key: ShellKey, shell: Shell) -> None:
        # Closed at once: the unread stream of a dead process blocks every other exec of its container.
        shell.close()
        self._shells.pop(key, None)
        self._lost.add(key)

    # --- ends

    async def _supervise(
        self, work: Coroutine[Any, Any, Report | Ended], key: ShellKey, shell: Shell, mark: str, timeout_s: float
    ) -> Report | Ended | None:
        """None: out of time. Then, and if it fails or is cancelled, nothing of the work lives on."""
        begun_ticks = now_ticks()
        try:
            with anyio.move_on_after(timeout_s):
                return await work
        except BaseException:
            with CancelScope(shield=True), contextlib.suppress(SandboxError):  # then the sandbox is gone
                await self._end_command(key, shell, mark, begun_ticks)
            raise
        with CancelScope(shield=True):
            await self._end_command(key, shell, mark, begun_ticks)
        return None

    async def end_processes(self) -> None:
        self._check_alive()
        for key, shell in list(self._shells.items()):
            self._drop(key, shell)
        with CancelScope(shield=True):
            if self._host is not None:
                proven = await self._end_all(self._host, lambda process: True)
            else:  # each user can end what is its own; the last one sees that nothing is left
                proven = False
                for user in {key.user for key in self._locks} | {None}:
                    proven = await self._end_inside(user, "", "", known="")
            if not proven:
                await self._give_up("its processes could not be ended")

    async def close_shells(self, *users: str | None) -> None:
        self._check_alive()
        for key in [key for key in self._shells if key.ours or key.user in users]:
            async with self._locks[key]:  # its command is waited for
                shell = self._shells.pop(key, None)
                if shell is not None:
                    shell.close()
                    if self._host is not None and self._host.shows(shell.pid, shell.mark):
                        self._host.kill(shell.pid)  # somebody inside may hold its input open

    async def run_apart(
        self, script: str, *, timeout_s: float, env: Mapping[str, str] | None = None, user: str | None = None
    ) -> bytes:
        self._check_alive()
        stdout, stderr, exit_code = await self._run_apart(
            ["-c", f"exec < /dev/null; {script}"], f"{self._name}-apart", timeout_s, env, user
        )
        if exit_code != 0:
            said = stderr.decode(errors="replace").strip()[-500:]
            ended = f"did not end within {timeout_s:g} s" if exit_code is None else f"failed with status {exit_code}"
            raise SandboxError(f"a script of ours in sandbox {self._name} {ended}: {said or 'nothing was said'}")
        return stdout

    async def _run_apart(
        self, arguments: list[str], mark: str, timeout_s: float, env: Mapping[str, str] | None, user: str | None
    ) -> tuple[bytes, bytes, int | None]:
        """Output, complaints and exit code of a bash with these arguments. No exit code: it goes on."""
        environment = {**(env or {}), **OUR_ENV, MARK: mark}
        command = ["bash", "-p", *arguments]
        socket, exec_id = await self._engine.open_exec(self._container, command, environment, user or self._user)
        said = {STDOUT: HeadTail(APART_BYTES), STDERR: HeadTail(APART_BYTES)}
        try:
            with anyio.move_on_after(timeout_s):
                while frames := await socket.receive():
                    for stream, data in frames:
                        said[STDERR if stream == STDERR else STDOUT].write(data)
                while (process := await self._engine.process(exec_id)).running:
                    await anyio.sleep(0.02)
                return said[STDOUT].content(), said[STDERR].content(), process.exit_code
        finally:
            socket.close()
        return said[STDOUT].content(), said[STDERR].content(), None

    async def _end_command(self, key: ShellKey, shell: Shell, mark: str, begun_ticks: int) -> None:
        """Nothing of the command runs when this returns. Raises `SandboxError` if the sandbox had to go for that."""
        self._drop(key, shell)

        def doomed(process: ContainerProcess) -> bool:
            if process.pid == shell.pid or process.mark == mark:
                return True
            # Without a mark, or forked by the shell itself: then its age tells whose it is.
            marked = process.mark.startswith(f"{self._name}-") and process.mark != shell.mark
            ours = any(process.pid == other.pid for other in self._shells.values())
            return not marked and not ours and process.started_ticks >= begun_ticks - 1

        try:
            if self._host is not None:
                proven = await self._end_all(self._host, doomed)
            else:
                proven = await self._end_inside(key.user, mark, shell.mark, known=f"{self._name}-")
        except SandboxError as error:
            await self._give_up(f"a command could not be ended ({error})")
        else:
            if not proven:
                await self._give_up("a command could not be proven dead")

    async def _end_all(self, host: HostView, doomed: Callable[[ContainerProcess], bool]) -> bool:
        if await host.end(doomed, within_s=1.0):
            return True
        # It forks faster than we kill. (The engine's freezer gives up on what forks that fast.)
        async with self._ending:
            with host.without_forks():
                return await host.end(doomed, within_s=END_TIMEOUT_S)

    async def _end_inside(self, user: str | None, mark: str, shell_mark: str, known: str) -> bool:
        arguments = ["-c", END_INSIDE, "end", mark, shell_mark, known]
        said, _, _ = await self._run_apart(arguments, f"{self._name}-end", END_TIMEOUT_S, None, user)
        return said.strip() == b"left 0"

    async def _was_oom_killed(self, exit_code: int) -> bool:
        before = self._oom_kills
        if self._host is not None:
            self._oom_kills = self._host.oom_kills()
        elif exit_code == KILLED:
            count = HeadTail(100)
            await self._run_script(OOM_KILLS_INSIDE, stdout=count, stderr=HeadTail(0))
            self._oom_kills = int(count.content() or 0)
        return self._oom_kills > before

    def _check_alive(self) -> None:
        if self._gone is not None:
            raise SandboxError(f"sandbox {self._name} is gone: {self._gone}")

    async def _give_up(self, reason: str) -> None:
        """Remove the sandbox, and say why from now on."""
        self._gone = self._gone or reason
        await self.cleanup()
        self._check_alive()

    async def cleanup(self) -> None:
        self._gone = self._gone or "it was cleaned up"
        with CancelScope(shield=True):
            for shell in self._shells.values():
                shell.close()
            self._shells.clear()
            self._lifeline.close()
            try:
                await self._engine.remove(self._container)
            except SandboxError as error:
                log.warning("%s", error)


class DockerSandboxFactory:
    """Makes `DockerSandbox`es on one engine, as many at a time as it starts well. Belongs to one event loop."""

    def __init__(self, engine: Engine, run: str | None = None, substitutes: Mapping[str, str] | None = None) -> None:
        self._engine = engine
        self._run = run or secrets.token_hex(4)
        self._substitutes = substitutes or {}
        self._images = Images(engine, substitutes or {})

    @classmethod
    async def connect(
        cls, run: str | None = None, substitutes: Mapping[str, str] | None = None
    ) -> DockerSandboxFactory:
        """`run` names the owner in labels; `substitutes` name local images to take instead of others.

        Removes first what dead owners left. Raises `SandboxUnavailableError` if no engine answers.
        """
        engine = await Engine.connect()
        for reaped in await engine.call("removing what dead runs left", reap, engine.client):
            log.info("removed %s: %s", reaped.name, reaped.reason)
        return cls(engine, run, substitutes)

    async def create(self, image: str, config: SandboxConfig | None = None) -> DockerSandbox:
        """Waits for an engine that restarts. Raises `SandboxError`."""
        return await self._engine.outlast(partial(self._create, image, config or SandboxConfig()))

    async def _create(self, image: str, config: SandboxConfig) -> DockerSandbox:
        try:
            return await self._start(substitute(image, self._substitutes), config)
        except MissingImage:
            try:
                return await self._start(await self._images.ensure(image), config)
            except MissingImage as error:
                raise SandboxError(f"image {image} went away between its pull and the sandbox's start") from error

    async def build_image(
        self, folder: Path, *, timeout_s: float, dockerfile: str = "Dockerfile", args: Mapping[str, str] | None = None
    ) -> str:
        return await self._engine.outlast(partial(self._images.build, folder, timeout_s, dockerfile, args))

    async def ensure_image(self, image: str, *, timeout_s: float = PULL_TIMEOUT_S) -> str:
        """The name to create sandboxes of: `image` or its substitute, pulled if missing. Raises `ImageBuildError`."""
        return await self._engine.outlast(partial(self._images.ensure, image, timeout_s))

    async def _start(self, image: str, config: SandboxConfig) -> DockerSandbox:
        engine = self._engine
        run = re.sub(r"[^\w.-]", "-", self._run, flags=re.ASCII)[:40]  # what the engine takes as a name
        name = f"protege-{run}-{secrets.token_hex(6)}"
        options = container_options(engine.client, image, name, self._run, config, engine.cores)
        abandoned = threading.Event()
        try:
            start = partial(start_container, engine.client, options, abandoned)
            return DockerSandbox(engine, await engine.in_turn(engine.starts, start), config)
        except BaseException as error:
            abandoned.set()
            if not isinstance(error, MissingImage):
                with CancelScope(shield=True), contextlib.suppress(SandboxError):
                    await engine.remove(name)
            raise
