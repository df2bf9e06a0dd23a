"""What the student reads of a command."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scripted_sandbox import Call, ScriptedSandbox, result

from envs.harbor.bash_tool import HarborBashTool, shown
from errors import SandboxError
from sandbox.types import ExecResult, TimedOut
from tool_use.calling import by_name, call_tool
from tool_use.types import ErrorKind, ToolAnswer

pytestmark = pytest.mark.anyio


async def said(sandbox: ScriptedSandbox, command: str = "x", seconds_left: float = 1e9) -> ToolAnswer:
    shell = HarborBashTool(
        sandbox, timeout_s=30.0, max_output_bytes=100, user="agent", seconds_left=lambda: seconds_left
    )
    call = {"id": "1", "type": "function", "function": {"name": "bash", "arguments": {"command": command}}}
    return await call_tool(by_name([shell.bash]), call)


@pytest.mark.parametrize(
    ("ran", "text"),
    [
        (result("out\n"), "out"),
        (result(""), "[exit code 0]"),
        (result("out\n", stderr="warning\n"), "out\n[stderr]\nwarning"),
        (result("out\n", exit_code=2), "out\n[exit code 2]"),
        (result(stderr="no such file\n", exit_code=1), "[stderr]\nno such file\n[exit code 1]"),
        (ExecResult(0, b"abcdef", b"", 1000, 0, 0.1), "abc\n[… 994 bytes left out …]\ndef"),
        (ExecResult(0, b"\xff\xfe\n", b"", 3, 0, 0.1), "��"),
        (
            ExecResult(137, b"", b"", 0, 0, 0.1, oom_killed=True),
            "[out of memory: a process was killed]\n[exit code 137]",
        ),
        (
            ExecResult(0, b"x", b"", 1, 0, 0.1, shell_lost=True),
            "[the shell had ended; this is a new one, without earlier `cd`s and variables]\nx",
        ),
        (
            ExecResult(3, b"x", b"", 1, 0, 0.1, shell_lost=True, ended_shell=True),
            "x\n[exit code 3]\n"
            "[this ended the shell; the next command has a new one, without earlier `cd`s and variables]",
        ),
    ],
)
def test_output_as_text(ran: ExecResult, text: str):
    assert shown(ran) == text


async def test_a_command_runs_as_the_tasks_user_with_its_limits():
    sandbox = ScriptedSandbox()
    answer = await said(sandbox, "ls")
    assert (answer.error, answer.result.content) == (None, "[exit code 0]")
    assert answer.result.metrics == {"commands": 1.0, "failed_commands": 0.0, "command_s": 0.25}
    (call,) = sandbox.calls
    assert (call.command, call.user, call.timeout_s) == ("ls", "agent", 30.0)


async def test_a_command_gets_no_more_than_is_left_of_the_attempts_time():
    sandbox = ScriptedSandbox()
    await said(sandbox, seconds_left=7.5)
    await said(sandbox, seconds_left=-3.0)
    assert [call.timeout_s for call in sandbox.calls] == [7.5, 1.0]


async def test_a_command_out_of_time_is_told_with_what_it_wrote():
    def slow(sandbox: ScriptedSandbox, call: Call) -> ExecResult:
        raise TimedOut(call.timeout_s, replace(result("so far\n", exit_code=137), shell_lost=True, ended_shell=True))

    answer = await said(ScriptedSandbox(agent=slow))
    assert answer.result.content.startswith("so far\n[killed after 30 s, with all that it had started")
    assert answer.error is ErrorKind.REPORTED and answer.result.metrics["command_timeouts"] == 1.0


async def test_our_own_failure_is_not_told_but_raised():
    def dies(sandbox: ScriptedSandbox, call: Call) -> ExecResult:
        raise SandboxError("its container has ended")

    with pytest.raises(SandboxError):
        await said(ScriptedSandbox(agent=dies))


async def test_a_wrong_call_is_told():
    sandbox = ScriptedSandbox()
    shell = HarborBashTool(sandbox, timeout_s=30.0, max_output_bytes=100)
    call = {"id": "1", "type": "function", "function": {"name": "bash", "arguments": {"cmd": "ls"}}}
    answer = await call_tool(by_name([shell.bash]), call)
    assert answer.error is ErrorKind.INVALID_ARGUMENTS and not sandbox.calls


def test_the_schema_needs_no_sandbox():
    function = HarborBashTool.schema()["function"]
    assert (function["name"], list(function["parameters"]["properties"])) == ("bash", ["command"])
