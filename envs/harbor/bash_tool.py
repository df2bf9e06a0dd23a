"""The student's shell: a sandbox as a tool named `bash`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any

from errors import SandboxCommandTimeout
from sandbox.types import ExecResult, Sandbox, TimedOut
from tool_use.tools import tool
from tool_use.types import ToolResult


class HarborBashTool:
    """One sandbox as a tool. Commands share one shell: `cd` and variables stay.

    The first and last `max_output_bytes / 2` bytes of each stream are shown, and how much was left out. A
    command that runs out of time is told to the model; every other failure of the sandbox is ours and
    drops the episode. No command is given more than `seconds_left()` of the attempt's time.
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

    @tool(timeout_s=None, sequential=True)  # the sandbox keeps the time: it can prove that a command is dead
    async def bash(self, command: Annotated[str, "The command or script to run."]) -> ToolResult:
        """Run a bash command in the sandbox and return its output and exit code.

        The shell stays open between calls. There is no terminal: do not start editors or other
        interactive programs, and run what does not end in the background.
        """
        timeout_s = max(1.0, min(self.timeout_s, self._seconds_left()))
        try:
            result = await self._sandbox.run_command(
                command, timeout_s=timeout_s, user=self.user, max_output_bytes=self.max_output_bytes
            )
        except SandboxCommandTimeout as error:
            killed = f"[killed after {timeout_s:g} s, with all that it had started; the next command has a new shell]"
            text = shown(error.result, ending=killed) if isinstance(error, TimedOut) else killed
            metrics = {"commands": 1.0, "command_timeouts": 1.0, "command_s": timeout_s}
            return ToolResult(text, is_error=True, metrics=metrics)
        metrics = {"commands": 1.0, "failed_commands": float(result.exit_code != 0), "command_s": result.duration_s}
        return ToolResult(shown(result), metrics=metrics)


def shown(result: ExecResult, ending: str = "") -> str:
    """A command's output as the model reads it: never empty. `ending` replaces the exit code."""
    parts = []
    if result.shell_lost and not result.ended_shell:
        parts.append("[the shell had ended; this is a new one, without earlier `cd`s and variables]")
    if result.stdout_bytes:
        parts.append(result.stdout_text)
    if result.stderr_bytes:
        parts += ["[stderr]", result.stderr_text]
    if result.oom_killed:
        parts.append("[out of memory: a process was killed]")
    if ending or result.exit_code != 0 or not parts:
        parts.append(ending or f"[exit code {result.exit_code}]")
    if result.ended_shell and not ending:
        parts.append("[this ended the shell; the next command has a new one, without earlier `cd`s and variables]")
    return "\n".join(part.removesuffix("\n") for part in parts)
