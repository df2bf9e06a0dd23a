"""Making calls: every call is answered, and only our own failures raise.

Whatever a tool does wrong becomes text that the model can read. A `ProtegeError` is never shown to the
model: an `InfrastructureError` drops the episode, any other ends the run.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import json
import math
import os
import re
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import anyio
from pydantic_core import to_jsonable_python

from errors import ConfigError, ProtegeError
from tool_use.signatures import shortened
from tool_use.types import DEFAULT_TIMEOUT_S, ErrorKind, InvalidArguments, Tool, ToolAnswer, ToolResult

T = TypeVar("T")
_MAX_ERROR_CHARACTERS = 1000


def by_name(tools: Sequence[Tool]) -> dict[str, Tool]:
    """The tools by their names. Raises `ConfigError` for two of one name, and for what is no tool."""
    named: dict[str, Tool] = {}
    for tool in tools:
        if not all(hasattr(tool, attribute) for attribute in ("name", "schema", "run")):
            raise ConfigError(f"{tool!r} is not a tool: decorate the function with @tool, or see tool_use.types.Tool")
        function = tool.schema.get("function") if isinstance(tool.schema, Mapping) else None
        if not isinstance(function, Mapping) or function.get("name") != tool.name:
            raise ConfigError(
                f"tool {tool.name!r}: expected a schema of the form "
                f'{{"type": "function", "function": {{"name": {tool.name!r}, …}}}}, got {tool.schema!r}'
            )
        if tool.name in named:
            raise ConfigError(f"two tools are named {tool.name!r}: rename one, as by @tool(name=…)")
        named[tool.name] = tool
    return named


async def call_tools(tools: Mapping[str, Tool], calls: Sequence[dict[str, Any]]) -> list[ToolAnswer]:
    """The answers to a turn's calls, in their order. The calls run at once, unless one of their tools is
    `sequential`: then one after another, and none after one that stopped the episode."""
    if any(getattr(tools.get(call["function"]["name"]), "sequential", False) for call in calls):
        answers: list[ToolAnswer] = []
        for call in calls:
            answers.append(await call_tool(tools, call))
            if answers[-1].result.stop:
                break
        return answers
    found: dict[int, ToolAnswer] = {}
    failures: list[ProtegeError] = []

    async def one(i: int, call: dict[str, Any]) -> None:
        try:
            found[i] = await call_tool(tools, call)
        except ProtegeError as error:  # bare, not in the task group's ExceptionGroup
            failures.append(error)
            group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        for i, call in enumerate(calls):
            group.start_soon(one, i, call)
    if failures:
        raise failures[0]
    return [found[i] for i in range(len(calls))]


async def call_tool(tools: Mapping[str, Tool], call: dict[str, Any]) -> ToolAnswer:
    """One call, answered. Raises nothing but `ProtegeError`s."""
    name = call["function"]["name"]
    tool = tools.get(name)
    if tool is None:
        there_is = f"The tools are: {', '.join(tools)}" if tools else "There are no tools"
        return _error(call, ErrorKind.UNKNOWN_TOOL, f"there is no tool {shortened(repr(name), 80)}. {there_is}")
    limit = getattr(tool, "timeout_s", DEFAULT_TIMEOUT_S)
    try:
        with anyio.move_on_after(math.inf if limit is None else limit) as scope:
            value = await invoke(tool.run, call["function"]["arguments"])
        if scope.cancelled_caught:
            return _error(call, ErrorKind.TIMEOUT, f"{name} did not answer within {limit:g} s and was stopped")
    except InvalidArguments as error:
        return _error(call, ErrorKind.INVALID_ARGUMENTS, f"invalid arguments: {error}")
    except BaseException as error:
        _raise_ours(error)
        return _error(call, ErrorKind.EXCEPTION, _described(error))
    try:
        result = as_result(value)
    except (TypeError, ValueError, RecursionError) as error:
        return _error(call, ErrorKind.UNWRITABLE_RESULT, f"{name} returned what cannot be written as JSON: {error}")
    return ToolAnswer(call, result, ErrorKind.REPORTED if result.is_error else None)


def as_result(value: Any) -> ToolResult:
    """What a tool returned, with text as its content. Raises ValueError for what JSON cannot write."""
    result = value if isinstance(value, ToolResult) else ToolResult(value)
    metrics = {name: float(number) for name, number in result.metrics.items()}
    if not all(map(math.isfinite, metrics.values())):
        raise ValueError(f"its metrics are not finite: {metrics}")
    content = result.content
    if not isinstance(content, str):
        content = json.dumps(to_jsonable_python(content), ensure_ascii=False)
    return replace(result, content=content, metrics=metrics)


# --- running what may be sync or async


async def invoke(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function, async or not; one that is not runs in a thread of its own."""
    if inspect.iscoroutinefunction(getattr(function, "func", function)):
        return await function(*args)
    value = await in_thread(lambda: function(*args))
    return await value if inspect.isawaitable(value) else value


async def in_thread(function: Callable[[], T]) -> T:
    """Run a function in a new thread. A cancelled caller leaves it to itself: Python cannot stop a thread.

    Not `anyio.to_thread`: its threads are waited for when Python ends, so one tool that hangs would keep
    the whole run from ending, and its limit of 40 at a time would count as the tool's time.
    """
    loop, done = asyncio.get_running_loop(), anyio.Event()
    values: list[T] = []
    errors: list[BaseException] = []

    def target() -> None:
        try:
            values.append(function())
        except BaseException as error:
            errors.append(error)
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits any longer
            loop.call_soon_threadsafe(done.set)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(target,), daemon=True, name="tool")
    thread.start()
    await done.wait()
    if errors:
        raise errors[0]
    return values[0]


# --- errors, for the model to read


def _error(call: dict[str, Any], kind: ErrorKind, text: str) -> ToolAnswer:
    text = shortened(_without_host_paths(text), _MAX_ERROR_CHARACTERS)
    return ToolAnswer(call, ToolResult(f"Error: {text}", is_error=True), kind)


def _raise_ours(error: BaseException) -> None:
    """Raise what is not the model's to see: our own errors, also out of a group, and the end of the process."""
    if isinstance(error, BaseExceptionGroup):
        ours = error.subgroup(ProtegeError)
        while isinstance(ours, BaseExceptionGroup):
            ours = ours.exceptions[0]
        if ours is not None:
            raise ours from error
    if isinstance(error, ProtegeError) or not isinstance(error, Exception | SystemExit | BaseExceptionGroup):
        raise error
    if isinstance(error, BaseExceptionGroup) and not isinstance(error, ExceptionGroup):
        raise error


def _described(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _without_host_paths(text: str) -> str:
    """The text without where this machine keeps its files: the home, working and Python's own folders."""
    folders = {str(Path.home()), os.getcwd(), sys.prefix, sys.base_prefix}
    for folder in sorted((f.rstrip("/") for f in folders), key=len, reverse=True):
        if folder:
            text = re.sub(rf"(?<![\w./]){re.escape(folder)}(?=/|\W|$)", "…", text)
    return text
