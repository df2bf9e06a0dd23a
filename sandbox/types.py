"""The sandbox contract: a place to run commands and hold files, with limits, owned by one episode.

Everything that goes wrong on our side is a `SandboxError` and drops the episode. What the command
itself did, a non-zero exit included, is an `ExecResult`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from errors import ConfigError, SandboxCommandTimeout


@dataclass(frozen=True)
class SandboxConfig:
    """What a sandbox may do and use. The defaults hold an untrusted model."""

    network: Literal["none", "bridge"] = "none"
    cpus: float = 1.0
    memory_mb: int = 2048
    pids: int = 256
    user: str | None = None  # None: the image's
    workdir: str | None = None  # None: the image's
    env: Mapping[str, str] = field(default_factory=dict)
    read_only_root: bool = False
    tmpfs_mb: Mapping[str, int] = field(default_factory=dict)  # mount point -> size
    mounts: Mapping[str, str] = field(default_factory=dict)  # host path -> path inside, read-only
    capabilities: tuple[str, ...] = ()  # added to none
    runtime: str | None = None  # the engine's runtime, as "runsc"
    max_output_bytes: int = 64 * 1024  # of each of stdout and stderr
    lease_s: float = 6 * 3600.0  # the sandbox ends itself after this, whoever forgets it

    def __post_init__(self) -> None:
        tmpfs_mb = sum(self.tmpfs_mb.values())
        if 2 * tmpfs_mb > self.memory_mb:  # it counts as memory: a full one would leave none to run anything in
            raise ConfigError(
                f"tmpfs_mb={dict(self.tmpfs_mb)} is {tmpfs_mb} MB of memory_mb={self.memory_mb}: expected at most half;"
                " raise memory_mb or lower tmpfs_mb"
            )
        for path in (*self.tmpfs_mb, *self.mounts, *self.mounts.values(), *([self.workdir] if self.workdir else [])):
            if not path.startswith("/"):
                raise ConfigError(f"a sandbox's folders are absolute paths, got {path!r}")
        for name in self.env:
            check_variable(name)


def check_variable(name: str) -> None:
    """Raises `ConfigError` unless `name` can be an environment variable's."""
    if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
        raise ConfigError(f"{name!r} cannot be the name of an environment variable: letters, digits and _ only")


@dataclass(frozen=True)
class ExecResult:
    """What a command did. Output is the first and last bytes; `…_bytes` count all that it wrote."""

    exit_code: int
    stdout: bytes
    stderr: bytes
    stdout_bytes: int
    stderr_bytes: int
    duration_s: float
    oom_killed: bool = False  # the kernel ended one of its processes for want of memory
    ended_shell: bool = False  # this command did: the next one gets a new shell
    shell_lost: bool = False  # earlier commands' `cd`, exports and functions are gone: see `Sandbox.run_command`

    @property
    def truncated(self) -> bool:
        return self.stdout_bytes > len(self.stdout) or self.stderr_bytes > len(self.stderr)

    @property
    def stdout_text(self) -> str:
        """For reading: where bytes were cut, their number stands."""
        return with_cut(self.stdout, self.stdout_bytes)

    @property
    def stderr_text(self) -> str:
        return with_cut(self.stderr, self.stderr_bytes)


def with_cut(kept: bytes, total: int) -> str:
    """Head and tail of an output of `total` bytes as text."""
    if total <= len(kept):
        return kept.decode("utf-8", "replace")
    head = len(kept) - len(kept) // 2
    first, last = (part.decode("utf-8", "replace") for part in (kept[:head], kept[head:]))
    return f"{first}\n[… {total - len(kept)} bytes left out …]\n{last}"


class TimedOut(SandboxCommandTimeout):
    """A command ran out of time and is proven dead. `result` is what it had written until then."""

    def __init__(self, timeout_s: float, result: ExecResult) -> None:
        super().__init__(
            f"the command was ended after {timeout_s:g} s, and all that it had started; the next one gets a new shell"
        )
        self.result = result


class Sandbox(Protocol):
    """A running sandbox. Not for concurrent commands in one shell: calls are served in order.

    Files are read and written as `user`, by default the sandbox's own. Every method raises `SandboxError` if the
    sandbox cannot be reached or is gone.
    """

    @property
    def id(self) -> str: ...

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
        """Runs `command` in this sandbox's persistent bash: `cd`, exports and functions stay.

        What it left in the background goes on, and does not delay the result. `set -e`, `-u`, `-x`, `-v` and
        traps on DEBUG, ERR and RETURN last for their command. `workdir` and `env` hold for this command alone;
        `user` has a shell of its own. If a command ends the shell (`exit`, `exec`, `kill`), its exit code is
        the shell's and `shell_lost` is set, and so is it on the next result if the shell died in between.
        Raises `TimedOut` once the command and all its children are proven dead.
        """
        ...

    async def read_file(self, path: str, *, max_bytes: int | None = None, user: str | None = None) -> bytes:
        """Raises the OSError that fits: FileNotFoundError, IsADirectoryError, PermissionError (also for pipes
        and devices), with `errno.EFBIG` if it is larger than `max_bytes` (256 MiB by default)."""
        ...

    async def write_file(self, path: str, content: bytes, *, mode: int = 0o644, user: str | None = None) -> None:
        """Makes parent folders; replaces a file's content and mode. Raises OSError, as when the disk is full."""
        ...

    async def upload_dir(self, source: Path, target: str, *, user: str | None = None) -> None:
        """The content of local `source` as `target`, modes and times kept. Raises `DataError` for links that lead
        out of `source` and for devices, OSError if the sandbox does not take it."""
        ...

    async def download_dir(
        self, source: str, target: Path, *, max_bytes: int | None = None, user: str | None = None
    ) -> tuple[str, ...]:
        """The content of `source` as local `target`, modes and times kept; nothing is ever written outside `target`,
        whatever it holds. A link that leads below `source` becomes a relative one where it was none.

        Returns the names that were left out: devices, and links that lead out. Raises OSError, with
        `errno.EFBIG` if it is larger than `max_bytes` (2 GiB by default)."""
        ...

    async def end_processes(self) -> None:
        """Ends every process inside, what earlier commands left in the background too; shells start anew.

        For before a verifier runs: no function, alias or daemon of the student's is there any longer.
        """
        ...

    async def close_shells(self, *users: str | None) -> None:
        """These users' shells and those that move files start anew: what ran inside may have written into them."""
        ...

    async def run_apart(
        self, script: str, *, timeout_s: float, env: Mapping[str, str] | None = None, user: str | None = None
    ) -> bytes:
        """What `script` prints, run by a bash of its own that reads no input: processes inside may kill it, but not
        put commands into it, as into a shell. Raises `SandboxError` if it fails or takes longer."""
        ...

    async def cleanup(self) -> None:
        """Removes the sandbox and everything that runs in it. May be called again; never raises."""
        ...


class SandboxFactory(Protocol):
    """Makes sandboxes of one backend; the owner of their concurrency bound."""

    async def create(self, image: str, config: SandboxConfig) -> Sandbox:
        """`image` is a name that the engine has. Raises `SandboxError`."""
        ...

    async def build_image(self, folder: Path, *, timeout_s: float, dockerfile: str = "Dockerfile") -> str:
        """The image's name, content-hashed, built once however many ask. Raises `ImageBuildError`."""
        ...
