"""The student's shell: a sandbox as a tool named `bash`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any

from errors import SandboxCommandTimeout
from sandbox.types import ExecResult, Sandbox
from tool_use.tools import tool
from tool_use.types import ToolResult

KEPT_BYTES = 64 * 1024
"""What the sandbox keeps of each stream: more than is shown, so that the seam of its cut is never shown."""


class HarborBashTool:
    """One sandbox as a tool. Commands share one shell: `cd` and variables stay.

    The first and last `max_output_bytes / 2` bytes of the output are shown, and how much was
    left out. A command that runs out of time is told to the model; every other failure of the sandbox is
    ours and drops the episode. No command is given more than `seconds_left()` of the attempt's time.
    """

    def __init__(
        self,
        sandbox: Sandbox,
        *,
        timeout_s: float,
        max_output_bytes: int,
        user: str | None = None,
        seconds_left: Callable[[], float] = lambda: math.inf,
    ) -> None:
        self._sandbox = sandbox
        self.timeout_s = timeout_s
        self.max_output_bytes = max_output_bytes
        self.user = user
        self._seconds_left = seconds_left

    @staticmethod
    def schema() -> dict[str, Any]:
        """What a prompt shows of the tool, for whoever has no sandbox yet."""
        return HarborBashTool(None, timeout_s=1.0, max_output_bytes=0).bash.schema  # type: ignore[arg-type]

    @tool(timeout_s=None, sequential=True)  # the sandbox has the timeout: cut short from here, it could not be reused
    async def bash(self, command: Annotated[str, "The command or script to run."]) -> ToolResult:
        """Run a bash command in the sandbox and return its output and exit code.

        The shell stays open between calls. There is no terminal: do not start editors or other
        interactive programs, and run what does not end in the background.
        """
        if "\0" in command:
            return ToolResult("error: a command cannot hold a NUL character", is_error=True)
        timeout_s = max(1.0, min(self.timeout_s, self._seconds_left()))
        try:
            result = await self._sandbox.run_command(
                command, timeout_s=timeout_s, user=self.user, max_output_bytes=KEPT_BYTES
            )
        except SandboxCommandTimeout:
            return ToolResult(
                f"error: the command ran for more than {timeout_s:g} s and was killed, "
                "with everything that it had started",
                is_error=True,
                metrics={"command_timeouts": 1.0, "commands": 1.0},
            )
        metrics = {"commands": 1.0, "failed_commands": float(result.exit_code != 0), "command_s": result.duration_s}
        return ToolResult(shown(result, self.max_output_bytes), metrics=metrics)


def shown(result: ExecResult, max_bytes: int) -> str:
    """A command's output as the model reads it."""
    parts = [_cut(result.stdout, result.stdout_bytes, max_bytes)]
    if result.stderr_bytes:
        parts.append("[stderr]\n" + _cut(result.stderr, result.stderr_bytes, max_bytes))
    if result.oom_killed:
        parts.append("[killed: out of memory]")
    if result.exit_code != 0 or not any(parts):
        parts.append(f"[exit code {result.exit_code}]")
    return "\n".join(part.removesuffix("\n") for part in parts if part)


def _cut(kept: bytes, size: int, max_bytes: int) -> str:
    if len(kept) == size <= max_bytes:
        return kept.decode("utf-8", errors="replace")
    half = min(max_bytes, len(kept)) // 2
    head, tail = (part.decode("utf-8", errors="replace") for part in (kept[:half], kept[len(kept) - half :]))
    return f"{head}\n[… {size - 2 * half} of {size} bytes left out …]\n{tail}"
