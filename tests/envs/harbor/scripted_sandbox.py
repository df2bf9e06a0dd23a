"""A sandbox without an engine: files in a dict, commands answered by a function. Records all that it is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio

from envs.harbor.processes import BEFORE
from errors import SandboxError
from sandbox.types import ExecResult, SandboxConfig

REWARD = "/logs/verifier/reward.txt"


def result(stdout: str = "", *, exit_code: int = 0, stderr: str = "") -> ExecResult:
    out, err = stdout.encode(), stderr.encode()
    return ExecResult(exit_code, out, err, len(out), len(err), 0.25)


@dataclass(frozen=True)
class Call:
    """One command, and how it was asked for."""

    command: str
    user: str | None
    timeout_s: float
    env: dict[str, str]
    workdir: str | None


Answer = Callable[["ScriptedSandbox", Call], ExecResult]


@dataclass
class ScriptedSandbox:
    """`agent` answers the agent's commands, `tests` what is run as /tests/test.sh; either may raise."""

    agent: Answer = lambda sandbox, call: result()
    tests: Answer = lambda sandbox, call: sandbox.rewarded("1")
    config: SandboxConfig = field(default_factory=SandboxConfig)
    image: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    events: list[str] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    removed: bool = False
    services: str = ""  # pids that listen
    refuses: OSError | None = None  # what an upload fails with
    leftovers: str = ""  # pids that the stopping script finds
    id: str = "scripted"

    def rewarded(self, text: str, *, name: str = "reward.txt", exit_code: int = 0) -> ExecResult:
        self.files[f"/logs/verifier/{name}"] = text.encode()
        return result(exit_code=exit_code)

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
        await anyio.lowlevel.checkpoint()
        self.check()
        call = Call(command, user, timeout_s, dict(env or {}), workdir)
        self.calls.append(call)
        if command.startswith("/tests/test.sh"):
            self.events.append(f"tests as {user}")
            return self.tests(self, call)
        if command.startswith("rm -rf /tests ") and "/logs/verifier" in command:
            self.events.append("wiped")
            self.files = {p: c for p, c in self.files.items() if not p.startswith(("/tests/", "/logs/verifier/"))}
            return result()
        if command == BEFORE:
            return result("1:7 8:9 ")
        if "id -u" in command:
            return result({None: "0:0", "agent": "1000:1000"}.get(user, "5:5") + "\n")
        if "kill -STOP" in command:
            self.events.append(f"stopped, but {call.env['SPARE']}" if call.env["SPARE"] else "stopped")
            return result(self.leftovers)
        if "/proc/net/tcp" in command:
            return result(self.services)
        if command.startswith("kill -CONT"):
            self.events.append(command.partition(" 2>")[0])
            return result()
        if command.startswith(("chmod a+rx /tests", "tail -c")):
            return result()
        self.events.append(command)
        return self.agent(self, call)

    async def read_file(self, path: str, *, max_bytes: int | None = None, user: str | None = None) -> bytes:
        self.check()
        if path not in self.files:
            raise FileNotFoundError(path)
        self.events.append(f"read {path}")
        return self.files[path]

    async def write_file(self, path: str, content: bytes, *, mode: int = 0o644, user: str | None = None) -> None:
        raise AssertionError("nothing here writes files")

    async def upload_dir(self, source: Path, target: str, *, user: str | None = None) -> None:
        self.check()
        if self.refuses is not None:
            raise self.refuses
        self.events.append(f"uploaded {source.name} to {target}")
        self.files |= {f"{target}/{p.relative_to(source)}": p.read_bytes() for p in source.rglob("*") if p.is_file()}

    async def download_dir(
        self, source: str, target: Path, *, max_bytes: int | None = None, user: str | None = None
    ) -> tuple[str, ...]:
        raise AssertionError("nothing here downloads")

    async def end_processes(self) -> None:
        self.check()
        self.events.append("ended")

    async def close_shells(self, *users: str | None) -> None:
        self.check()
        self.events.append("new shells")

    async def run_apart(
        self, script: str, *, timeout_s: float, env: Mapping[str, str] | None = None, user: str | None = None
    ) -> bytes:
        return (await self.run_command(script, timeout_s=timeout_s, env=env, user=user)).stdout

    async def cleanup(self) -> None:
        await anyio.lowlevel.checkpoint()  # raises if a cancellation reaches in here
        self.removed = True

    def check(self) -> None:
        if self.removed:
            raise SandboxError("the sandbox is gone")


@dataclass
class ScriptedSandboxes:
    """A factory whose n-th sandbox has the n-th of `options`, an exception in their place being raised."""

    options: list[dict[str, Any] | Exception] = field(default_factory=list)
    made: list[ScriptedSandbox] = field(default_factory=list)
    built: list[Path] = field(default_factory=list)
    build_fails: Exception | None = None

    async def create(self, image: str, config: SandboxConfig) -> ScriptedSandbox:
        await anyio.lowlevel.checkpoint()
        options = self.options.pop(0) if self.options else {}
        if isinstance(options, Exception):
            raise options
        self.made.append(ScriptedSandbox(image=image, config=config, **options))
        return self.made[-1]

    async def build_image(self, folder: Path, *, timeout_s: float, dockerfile: str = "Dockerfile") -> str:
        if self.build_fails is not None:
            raise self.build_fails
        self.built.append(folder)
        return f"built:{folder.parent.name}"
