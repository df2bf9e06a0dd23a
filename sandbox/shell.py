"""One persistent bash in a container, spoken to over one socket: about a millisecond a command.

Each command is one line on bash's own input: a `begun` token, the command in an `eval` whose input and
output are its own, then a report. The token is fresh and random for every command and stands in the line in
two halves, so nothing that the command prints, traces or echoes looks like it. Bash has parsed the line
before the command runs, so aliases, options and an unset PATH do not reach our part of it.

Bash reads its own input a byte at a time, which costs half a second a megabyte, and more than a minute in gVisor. Long
texts therefore go ahead of the line, to `read -N`, which takes 4 kB at a time.
"""

from __future__ import annotations

import contextlib
import math
import re
import secrets
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO

import anyio

from errors import SandboxError
from sandbox.docker_engine import Engine
from sandbox.processes import MARK, HostView
from sandbox.shell_stream import READ_BYTES, STDERR, ExecSocket, HeadTail, Sink, Splitter
from sandbox.types import check_variable

BASH = ["bash", "--norc", "--noprofile"]
SHELL_ENV = {"BASH_ENV": ""}  # a file named there would be run first
OPEN_TIMEOUT_S = 60.0
PID_TRIES = 20
REPORT_BYTES = 8192
LONG_BYTES = 4096  # a text that is longer goes ahead of the line
CHECK_S = 0.2  # between looks at whether the shell still lives, where its children hold its output open
SETTLE_S = 0.1  # what a dead shell's children wrote before it died has come in after this
STALLED_S = (
    60.0  # files of which nothing has moved for so long will not move: the sandbox is frozen, or the way to it gone
)
FREE_BYTES = 32 * 2**20  # of one command's output, read at full speed; after that:
FLOOD_BYTES_PER_S = 32 * 2**20  # one command that prints for ever must not take a core from the others


@dataclass(frozen=True)
class Report:
    """The shell's own account of a command that has ended."""

    exit_code: int


@dataclass(frozen=True)
class Ended:
    """The shell is gone. `begun`: the command had been started, and may have ended it."""

    begun: bool


class Shell:
    """A bash in a container. Not for concurrent commands."""

    def __init__(self, engine: Engine, host: HostView | None, socket: ExecSocket, exec_id: str, mark: str) -> None:
        self.exec_id = exec_id
        self.pid = 0  # on the engine's machine
        self.mark = mark  # in the environment of the shell itself
        self.host = host
        self._engine = engine
        self._socket = socket
        self._moved_at = 0.0  # when bytes last went in or came out
        self._pending: list[tuple[int, bytes]] = []  # came after the last report: from children left behind

    @classmethod
    async def open(
        cls,
        engine: Engine,
        host: HostView | None,
        container: str,
        user: str | None,
        mark: str,
        env: Mapping[str, str],
    ) -> Shell:
        """`host` is None where only the engine can tell what runs. Raises `SandboxError`, also if no bash answers."""
        environment = {**env, **SHELL_ENV, MARK: mark}
        socket, exec_id = await engine.open_exec(container, BASH, environment, user)
        try:
            shell = cls(engine, host, socket, exec_id, mark)
            noise = HeadTail(2000)  # a missing locale, for one, is complained about
            with anyio.move_on_after(OPEN_TIMEOUT_S):
                outcome = await shell.run(":", stdout=noise, stderr=noise)
                if isinstance(outcome, Report):
                    await shell._learn_pid()
                    if host is not None and not host.shows(shell.pid, mark):
                        shell.host = None  # a runtime with a kernel of its own: what we see is not what is inside
                    return shell
            said = noise.content().decode(errors="replace").strip() or "it said nothing"
            if "unable to find user" in said or "no matching entries in passwd" in said:
                raise SandboxError(f"its image has no user {user}: {said}")
            raise SandboxError(f"no bash answers in it ({said})")
        except BaseException:
            socket.close()
            raise

    async def _learn_pid(self) -> None:
        for _ in range(PID_TRIES):  # the engine starts a program first and notes its number then
            self.pid = (await self._engine.process(self.exec_id)).pid
            if self.pid:
                return

    async def lives(self) -> bool:
        if self.host is not None and self.pid:
            return self.host.lives(self.pid)
        return (await self._engine.process(self.exec_id)).running

    async def run(
        self,
        command: str,
        *,
        stdout: Sink,
        stderr: Sink,
        mark: str | None = None,
        workdir: str | None = None,
        env: Mapping[str, str] | None = None,
        stdin: bytes | None = None,
    ) -> Report | Ended:
        """Run one command to its end.

        `env` and `workdir` hold for this command alone; `mark` is in the environment of all that it starts.
        """
        token = secrets.token_hex(16)
        text = line(command, token, mark, workdir, env, stdin)
        return await self._exchange(text, token, None, stdout, stderr, FREE_BYTES, math.inf)

    async def run_script(
        self, script: str, *, stdout: Sink, stderr: Sink, payload: IO[bytes] | None = None
    ) -> Report | Ended:
        """Run a script of ours, which reads all of `payload` from the shell's own input, and no more.

        Raises `SandboxError` if nothing moves for `STALLED_S`."""
        token = secrets.token_hex(16)
        return await self._exchange(script_line(script, token), token, payload, stdout, stderr, math.inf, STALLED_S)

    async def _exchange(
        self,
        text: str,
        token: str,
        payload: IO[bytes] | None,
        stdout: Sink,
        stderr: Sink,
        free_bytes: float,
        stalled_s: float,
    ) -> Report | Ended:
        report = HeadTail(REPORT_BYTES)
        out = Splitter(token.encode(), [stdout, stdout, report])
        err = Splitter(token.encode(), [stderr])
        await self._send(text.encode("utf-8", "surrogatepass"))
        if payload is None:
            await self._read(out, err, free_bytes, stalled_s)
        else:  # at the same time: who complains of every file does not read on until somebody hears it
            failure: SandboxError | None = None
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._send_all, payload)
                try:
                    await self._read(out, err, free_bytes, stalled_s)
                except SandboxError as error:  # as itself, not in a group
                    failure = error
                tasks.cancel_scope.cancel()
            if failure is not None:
                raise failure
        self._pending = [(STDERR, err.rest)] * bool(err.rest) + [(1, out.rest)] * bool(out.rest)
        if not (out.done and err.done):
            out.flush()
            err.flush()
            return Ended(begun=out.passed > 0)
        status = report.content().partition(b"\0")[0].strip()
        if not status.isdigit():
            raise SandboxError(f"a shell's report was tampered with: {status[:100]!r}")
        return Report(int(status))

    async def _send(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # gone: the end of the stream says so
            await self._socket.send(data)
        self._moved_at = time.monotonic()

    async def _send_all(self, payload: IO[bytes]) -> None:
        while data := payload.read(READ_BYTES):
            await self._send(data)

    async def _read(self, out: Splitter, err: Splitter, free_bytes: float, stalled_s: float) -> None:
        """Until both have seen their last token, or the shell is dead."""
        received = 0.0
        frames = self._pending
        settled = False
        while not (out.done and err.done):
            for stream, data in frames:
                (err if stream == STDERR else out).feed(data)
                received += len(data)
            if out.done and err.done:
                return
            frames = []
            if received > free_bytes:
                await anyio.sleep((received - free_bytes) / FLOOD_BYTES_PER_S)
                received = free_bytes
            with anyio.move_on_after(SETTLE_S if settled else CHECK_S):
                if not (frames := await self._socket.receive()):
                    return
            if frames:
                self._moved_at = time.monotonic()
            elif settled:
                return
            elif time.monotonic() - self._moved_at > stalled_s:
                raise SandboxError(
                    f"nothing has come from a sandbox, and nothing has gone into it, for {stalled_s:g} s"
                )
            else:
                settled = not await self.lives()

    def close(self) -> None:
        self._socket.close()


def line(
    command: str,
    token: str,
    mark: str | None,
    workdir: str | None,
    env: Mapping[str, str] | None,
    stdin: bytes | None,
) -> str:
    """What is sent to bash for one command. See the module's first lines."""
    halves = f"{token[:16]} {token[16:]}"
    name_of = secrets.token_hex(4)  # so that no earlier command can have made it readonly
    status, home, text, given = (f"__{name}_{name_of}" for name in ("status", "back", "text", "input"))
    ahead, forget, source, body = "", "", "0</dev/null", shlex.quote(command)
    if stdin is not None:
        written = escaped(stdin)
        source = f"0< <(\\builtin printf %b {shlex.quote(written)})"
        if len(written) > LONG_BYTES:
            ahead += sent_ahead(written, given)
            source = f'0< <(\\builtin printf %b "${given}")'
            forget += f"\\builtin unset {given}; "
    if len(body) > LONG_BYTES:
        written = escaped(command.encode("utf-8", "surrogatepass"))
        ahead += sent_ahead(written, text) + f'\\builtin printf -v {text} %b "${text}"\n'
        body = f'"\\\\builtin unset {text}; ${text}"'
    for name in env or {}:
        check_variable(name)  # it stands there as it is
    values = "".join(f"{name}={shlex.quote(value)} " for name, value in (env or {}).items())
    run = f"{forget}{values}\\command eval {body}"
    if workdir is not None:
        # `cd` back by name: a subshell would lose what the command exports
        run = f'{home}="${{PWD-}}"; CDPATH= \\builtin cd -- {shlex.quote(workdir)} && {{ {run}; }}'
    exported = f"\\builtin export {MARK}={mark}; " if mark is not None else ""
    back = ""
    if workdir is not None:
        back = f'CDPATH= \\builtin cd -- "${home}"; \\builtin unset {home}; '
    return (
        f"{ahead}{status}=1; \\builtin printf %s%s {halves}; {exported}"
        f"{{ {{ {run}; }} {source} 1>&98 2>&99 98>&- 99>&-; }} 98>&1 99>&2; "
        f"{{ {status}=$?; \\builtin set +exuv; \\builtin trap - DEBUG ERR RETURN; {back}}} >&- 2>&-\n"
        f'\\builtin printf "%s%s%s\\0%s%s" {halves} "${status}" {halves}; \\builtin printf %s%s {halves} >&2\n'
        f"\\builtin unset {status} {text} {given}\n"
    )


def script_line(script: str, token: str) -> str:
    """The same for a script of ours: one line, since what follows it is the script's input."""
    halves = f"{token[:16]} {token[16:]}"
    return (
        f"printf %s%s {halves}; eval {shlex.quote(script)}; "
        f'printf "%s%s%s\\0%s%s" {halves} "$?" {halves}; printf %s%s {halves} >&2\n'
    )


def sent_ahead(written: str, name: str) -> str:
    """Lines that make `name` hold `written`, which is ASCII: `read` counts characters. Commands before may have set
    TMOUT, readonly even, which bash complains of, or a trap that ends `read`: the rest would be run as commands."""
    read = f"{{ TMOUT= \\builtin read -r -N {len(written)} {name}; }} 2>/dev/null || \\builtin exit"
    return f"{read}\n{written}\n"


def escaped(data: bytes) -> str:
    """`data` as printf's %b reads it, in printable ASCII: any bytes, NUL too."""
    unsafe = rb"""[^a-zA-Z0-9 ,.:;_+=/()\[\]{}<>|&*?!@#$^~"\n\t-]"""
    return re.sub(unsafe, lambda found: b"\\0%03o" % found[0][0], data).decode("ascii")
