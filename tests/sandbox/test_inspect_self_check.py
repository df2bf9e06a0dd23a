"""inspect_ai's own checks of a sandbox, run on `DockerSandbox` through a thin adapter. Needs inspect_ai installed."""

from __future__ import annotations

import shlex
from collections.abc import AsyncIterator
from typing import Any

import pytest

from errors import SandboxError
from sandbox.docker_sandbox import DockerSandboxFactory
from sandbox.types import Sandbox, SandboxConfig, TimedOut

inspect_ai = pytest.importorskip("inspect_ai", reason="inspect_ai is not installed")

from inspect_ai.util import (  # noqa: E402  # pyright: ignore[reportMissingImports]
    ExecResult,
    OutputLimitExceededError,
    SandboxEnvironment,
    SandboxEnvironmentLimits,
    SandboxUserUnsupportedError,
)
from inspect_ai.util._sandbox.self_check import *  # noqa: E402, F403  # pyright: ignore[reportMissingImports]

pytestmark = [pytest.mark.anyio, pytest.mark.docker]


ADD_USER = b"""#!/bin/bash
echo "${@: -1}:x:1234:1234::/:/bin/bash" >> /etc/passwd
"""  # the base image has none, one of the checks wants it


class Adapter(SandboxEnvironment):
    """A `Sandbox` as inspect_ai calls it. Every command runs in the persistent shell, in the sandbox's first folder."""

    def __init__(self, sandbox: Sandbox) -> None:
        super().__init__()
        self.sandbox = sandbox

    async def exec(
        self,
        cmd: list[str],
        input: str | bytes | None = None,
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        user: str | None = None,
        timeout: int | None = None,
        timeout_retry: bool = True,
        concurrency: bool = True,
    ) -> ExecResult[str]:
        limit = SandboxEnvironmentLimits.MAX_EXEC_OUTPUT_SIZE
        try:
            result = await self.sandbox.run_command(
                shlex.join(cmd),
                timeout_s=timeout or 600,
                workdir=cwd,
                env=env,
                user=user,
                stdin=input.encode() if isinstance(input, str) else input,
                max_output_bytes=limit,
            )
        except TimedOut as error:
            raise TimeoutError(str(error)) from error
        except SandboxError as error:
            if "has no user" in str(error):
                raise SandboxUserUnsupportedError(str(error)) from error
            raise
        if result.truncated:
            raise OutputLimitExceededError(str(limit), result.stdout_text)
        stdout, stderr = result.stdout.decode(errors="replace"), result.stderr.decode(errors="replace")
        if result.exit_code == 126 and "Permission denied" in stderr:
            raise PermissionError(stderr)
        return ExecResult(result.exit_code == 0, result.exit_code, stdout, stderr)

    async def write_file(self, file: str, contents: str | bytes) -> None:
        await self.sandbox.write_file(file, contents.encode() if isinstance(contents, str) else contents)

    async def read_file(self, file: str, text: bool = True) -> Any:
        limit = SandboxEnvironmentLimits.MAX_READ_FILE_SIZE
        try:
            content = await self.sandbox.read_file(file, max_bytes=limit)
        except OSError as error:
            if "larger than" in str(error):
                raise OutputLimitExceededError(SandboxEnvironmentLimits.MAX_READ_FILE_SIZE_STR, None) from error
            raise
        return content.decode() if text else content

    @classmethod
    async def sample_cleanup(cls, task_name: str, config: Any, environments: Any, interrupted: bool) -> None:
        """The fixture does it."""


@pytest.fixture
async def sandbox_env(factory: DockerSandboxFactory, image: str) -> AsyncIterator[Adapter]:
    sandbox = await factory.create(image, SandboxConfig())
    await sandbox.write_file("/usr/bin/adduser", ADD_USER, mode=0o755)
    yield Adapter(sandbox)
    await sandbox.cleanup()
    with pytest.raises(SandboxError):
        await sandbox.run_command("true", timeout_s=1)
