"""Every call is answered, in order, in time; only our own failures raise."""

from __future__ import annotations

import dataclasses
import datetime
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
from pydantic import BaseModel

from errors import ConfigError, SandboxCommandTimeout, SandboxError
from tool_use import ErrorKind, InvalidArguments, ToolResult, tool
from tool_use.calling import as_result, by_name, call_tool, call_tools
from tool_use.types import ToolAnswer

pytestmark = pytest.mark.anyio


def call(name: str, call_id: str = "call00001", **arguments: Any) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


async def answer(made: Any, **arguments: Any) -> ToolAnswer:
    return await call_tool({made.name: made}, call(made.name, **arguments))


def raising(error: BaseException | Callable[[], Any], **options: Any) -> Any:
    @tool(name="broken", **options)
    def broken() -> None:
        raise error() if callable(error) else error

    return broken


class Custom:
    """A tool of one's own: no decorator, no optional attributes."""

    name = "custom"

    def __init__(self, behaviour: Callable[[dict[str, Any]], Any] = dict) -> None:
        self.behaviour = behaviour

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "function", "function": {"name": self.name, "parameters": {"type": "object"}}}

    async def run(self, arguments: dict[str, Any]) -> Any:
        return self.behaviour(arguments)


# --- answers


class Model(BaseModel):
    x: int
    day: datetime.date


@dataclasses.dataclass
class Data:
    name: str


@pytest.mark.parametrize(
    ("value", "content"),
    [
        ('text as it is: "quoted" <|im_end|>', 'text as it is: "quoted" <|im_end|>'),
        ("", ""),
        (None, "null"),
        (3, "3"),
        (True, "true"),
        ({"ü": [1, 2.5, None]}, '{"ü": [1, 2.5, null]}'),
        ((1, 2), "[1, 2]"),
        (Model(x=1, day=datetime.date(2024, 2, 29)), '{"x": 1, "day": "2024-02-29"}'),
        ([Data("Ada")], '[{"name": "Ada"}]'),
        (ToolResult({"a": 1}), '{"a": 1}'),
    ],
)
async def test_what_a_tool_returns_is_text_as_it_is_or_json(value: Any, content: str):
    @tool
    def f() -> Any:
        return value

    answered = await answer(f)
    assert answered.error is None
    assert answered.message == {"role": "tool", "tool_call_id": "call00001", "name": "f", "content": content}


@pytest.mark.parametrize("value", [object(), {"x": np.float32(1)}, b"\xff", [{1: object()}], lambda: 0])
async def test_what_json_cannot_write_is_an_error_that_the_model_reads(value: Any):
    answered = await answer(Custom(lambda arguments: value))
    assert answered.error is ErrorKind.UNWRITABLE_RESULT
    assert answered.message["content"].startswith("Error: custom returned what cannot be written as JSON")


def test_a_result_keeps_what_only_the_environment_sees():
    result = as_result(ToolResult("x", stop=True, metrics={"n": 1}, metadata={"file": Path("/x")}, is_error=True))
    assert (result.stop, result.metrics, result.metadata) == (True, {"n": 1.0}, {"file": Path("/x")})
    answered = ToolAnswer(call("f"), result, ErrorKind.REPORTED)
    assert "metadata" not in answered.message and "error" not in answered.message
    assert answered.record["metadata"] == {"file": Path("/x")} and answered.record["error"] == "reported"


@pytest.mark.parametrize("metrics", [{"n": float("nan")}, {"n": "many"}])
async def test_metrics_that_are_no_numbers_are_an_error(metrics: Any):
    answered = await answer(Custom(lambda arguments: ToolResult("x", metrics=metrics)))
    assert answered.error is ErrorKind.UNWRITABLE_RESULT


# --- errors


async def test_an_unknown_tool_is_answered_with_the_names_of_those_that_exist():
    answered = await call_tool(by_name([Custom(), raising(ValueError)]), call("cutsom"))
    assert answered.error is ErrorKind.UNKNOWN_TOOL
    assert answered.message["content"] == "Error: there is no tool 'cutsom'. The tools are: custom, broken"
    assert answered.message["name"] == "cutsom"


@pytest.mark.parametrize(
    "made",
    [tool(name="custom")(lambda n: n), Custom(lambda a: (_ for _ in ()).throw(InvalidArguments("n is missing")))],
)
async def test_invalid_arguments_of_any_tool_are_told(made: Any):
    answered = await answer(made, m=1)
    assert answered.error is ErrorKind.INVALID_ARGUMENTS
    assert answered.message["content"].startswith("Error: invalid arguments: ")


@pytest.mark.parametrize(
    ("error", "content"),
    [
        (ValueError("no such account"), "Error: ValueError: no such account"),
        (KeyError("x"), "Error: KeyError: 'x'"),
        (RuntimeError(), "Error: RuntimeError"),
        (StopIteration("s"), "Error: RuntimeError: "),
        (SystemExit(3), "Error: SystemExit: 3"),
        (TimeoutError("the server"), "Error: TimeoutError: the server"),
        (RecursionError("deep"), "Error: RecursionError: deep"),
        (ExceptionGroup("two", [ValueError("a"), ValueError("b")]), "Error: ExceptionGroup: two (2 sub-exceptions)"),
    ],
)
@pytest.mark.parametrize("kind", ["thread", "async", "custom"])
async def test_exceptions_are_told_without_a_traceback(error: BaseException, content: str, kind: str):
    @tool(name="broken")
    async def asynchronous() -> None:
        raise error

    def throw(arguments: dict[str, Any]) -> None:
        raise error

    made = {"thread": raising(error), "async": asynchronous, "custom": Custom(throw)}[kind]
    answered = await answer(made)
    assert answered.error is ErrorKind.EXCEPTION
    assert answered.result.is_error
    assert answered.message["content"].startswith(content)
    assert "Traceback" not in answered.message["content"]


async def test_an_error_shows_nothing_of_this_machine_and_is_not_endless():
    inside = Path.cwd() / "secrets" / "key.txt"
    answered = await answer(raising(FileNotFoundError(2, "No such file or directory", str(inside))))
    assert answered.message["content"] == (
        "Error: FileNotFoundError: [Errno 2] No such file or directory: '…/secrets/key.txt'"
    )
    for folder in (str(Path.home()), os.getcwd(), sys.prefix):
        answered = await answer(raising(ValueError(f"see {folder}/x, {folder}")))
        assert folder not in answered.message["content"]
    answered = await answer(raising(ValueError("x" * 100_000)))
    assert len(answered.message["content"]) < 1100


@pytest.mark.parametrize("ours", [SandboxError("gone"), SandboxCommandTimeout("late"), ConfigError("not set up")])
async def test_our_own_errors_are_never_told(ours: Exception):
    @tool
    async def grouped() -> None:
        raise BaseExceptionGroup("tasks", [ValueError("x"), ExceptionGroup("inner", [ours])])

    for made in (raising(ours), Custom(lambda a: (_ for _ in ()).throw(ours)), grouped):
        with pytest.raises(type(ours)):
            await answer(made)
        with pytest.raises(type(ours)):  # and bare, though the calls of a turn run in a task group
            await call_tools({made.name: made, "other": Custom()}, [call(made.name), call("other")])


async def test_an_infrastructure_error_stops_the_other_calls_of_the_turn():
    cancelled = []

    @tool
    async def slow() -> None:
        try:
            await anyio.sleep(60)
        except BaseException:
            cancelled.append(True)
            raise

    with anyio.fail_after(5), pytest.raises(SandboxError):
        await call_tools(by_name([slow, raising(SandboxError("gone"))]), [call("slow"), call("broken")])
    assert cancelled == [True]


# --- time


async def test_a_slow_tool_is_stopped_and_the_model_told():
    stopped = []

    @tool(timeout_s=0.05)
    async def slow() -> None:
        try:
            await anyio.sleep(60)
        finally:
            stopped.append(True)

    answered = await answer(slow)
    assert (answered.error, stopped) == (ErrorKind.TIMEOUT, [True])
    assert answered.message["content"] == "Error: slow did not answer within 0.05 s and was stopped"


async def test_a_hanging_thread_does_not_hold_up_the_episode():
    release = threading.Event()

    @tool(timeout_s=0.05)
    def hang() -> None:
        release.wait(30)

    start = time.monotonic()
    assert (await answer(hang)).error is ErrorKind.TIMEOUT
    assert time.monotonic() - start < 5
    release.set()


def test_a_hanging_thread_does_not_keep_python_from_ending():
    script = (
        "import anyio, time\nfrom tool_use import tool\nfrom tool_use.calling import call_tool\n"
        "@tool(timeout_s=0.1)\ndef hang():\n    time.sleep(600)\n"
        "call = {'id': 'a', 'function': {'name': 'hang', 'arguments': {}}}\n"
        "print(anyio.run(call_tool, {'hang': hang}, call).error)\n"
    )
    root = str(Path(__file__).parents[2])
    ran = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout) == (0, "timeout\n"), ran.stderr


async def test_a_custom_tool_may_set_its_own_timeout_or_none():
    custom = Custom()
    custom.timeout_s = None  # type: ignore[attr-defined]
    assert (await answer(custom)).error is None
    custom = Custom(lambda a: anyio.sleep(60))

    class Slow(Custom):
        timeout_s = 0.05

        async def run(self, arguments: dict[str, Any]) -> Any:
            await anyio.sleep(60)

    assert (await answer(Slow())).error is ErrorKind.TIMEOUT


async def test_cancelling_an_episode_cancels_its_tools():
    started = anyio.Event()
    ended = []

    @tool(timeout_s=None)
    async def slow() -> None:
        started.set()
        try:
            await anyio.sleep_forever()
        finally:
            ended.append(True)

    async with anyio.create_task_group() as group:
        group.start_soon(call_tools, by_name([slow]), [call("slow"), call("slow")])
        await started.wait()
        group.cancel_scope.cancel()
    assert ended == [True, True]


# --- order


async def test_calls_of_a_turn_run_at_once_and_are_answered_in_their_order():
    both = anyio.Event()
    waiting = []

    @tool
    async def meet(who: str) -> str:
        waiting.append(who)
        if len(waiting) == 2:
            both.set()
        await both.wait()  # for ever, if one waited for the other to end
        return who

    with anyio.fail_after(5):
        answers = await call_tools(by_name([meet]), [call("meet", "b", who="b"), call("meet", "a", who="a")])
    assert [(a.message["tool_call_id"], a.message["content"]) for a in answers] == [("b", "b"), ("a", "a")]


async def test_sync_tools_run_beside_each_other_in_threads():
    barrier = threading.Barrier(3)

    @tool
    def meet(n: int) -> int:
        barrier.wait(10)
        assert threading.current_thread() is not threading.main_thread()
        return n

    answers = await call_tools(by_name([meet]), [call("meet", n=n) for n in range(3)])
    assert [a.message["content"] for a in answers] == ["0", "1", "2"]


async def test_one_sequential_tool_makes_all_calls_of_its_turn_wait_for_each_other():
    events: list[str] = []

    @tool(sequential=True)
    async def write(n: int) -> None:
        events.append(f"write {n} begins")
        await anyio.sleep(0.01)
        events.append(f"write {n} ends")

    @tool
    async def read() -> None:
        events.append("read")

    await call_tools(by_name([write, read]), [call("write", n=1), call("read"), call("write", n=2)])
    assert events == ["write 1 begins", "write 1 ends", "read", "write 2 begins", "write 2 ends"]


async def test_in_a_sequential_turn_nothing_runs_after_a_stop():
    ran = []

    @tool(sequential=True)
    def act(n: int) -> ToolResult:
        ran.append(n)
        return ToolResult(n, stop=n == 2)

    answers = await call_tools(by_name([act]), [call("act", n=n) for n in (1, 2, 3)])
    assert (ran, len(answers)) == ([1, 2], 2)


# --- sets of tools


def test_two_tools_of_one_name_and_what_is_no_tool_are_refused():
    with pytest.raises(ConfigError, match="two tools are named 'custom'"):
        by_name([Custom(), Custom()])
    with pytest.raises(ConfigError, match="is not a tool: decorate"):
        by_name([len])  # type: ignore[list-item]

    class Nameless(Custom):
        schema = {"name": "custom"}  # type: ignore[assignment]  # noqa: RUF012

    with pytest.raises(ConfigError, match="expected a schema of the form"):
        by_name([Nameless()])
