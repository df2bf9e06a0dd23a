"""Attempts at one row, each with tools of its own."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from envs.message_env import DeferredEnv
from envs.rendering import Renderer
from envs.types import Env, Message, TeacherHint
from errors import ConfigError
from tool_use.agent_env import AgentLimits, RewardFn, build_agent_tool_env, zero_reward
from tool_use.types import Tool

Tools = Sequence[Tool]
MakeTools = Callable[[], Tools | Awaitable[Tools] | AbstractAsyncContextManager[Tools] | AbstractContextManager[Tools]]
"""Makes the tools of one episode. As a context manager, sync or async, it also gives back what it took,
as soon as the episode ends. Raising an `InfrastructureError` drops that episode."""


@dataclass(frozen=True)
class ToolEnvGroupBuilder:
    """`group_size` attempts at one row's prompt with the tools that `make_tools` makes, anew for each attempt.

    Picklable if `make_tools` and `reward_fn` are: functions or classes of a module, or `functools.partial`s.
    """

    dataset: str
    row_id: str
    teacher: str
    messages: tuple[Message, ...]
    renderer: Renderer
    make_tools: MakeTools
    group_size: int = 1
    teacher_messages: tuple[Message, ...] | None = None
    teacher_hints: tuple[TeacherHint, ...] = ()
    reward_fn: RewardFn = zero_reward
    limits: AgentLimits = field(default_factory=AgentLimits)

    async def make_envs(self) -> Sequence[Env]:
        return [DeferredEnv(self._open) for _ in range(self.group_size)]

    async def cleanup(self) -> None:
        """Nothing is left: each episode's tools are given back as it ends."""

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[Env]:
        async with opened(self.make_tools) as tools:
            yield build_agent_tool_env(self.renderer, tools, self.messages, self.reward_fn, **vars(self.limits))


@asynccontextmanager
async def opened(make_tools: MakeTools) -> AsyncIterator[Tools]:
    """The tools, for as long as the context lasts. Raises `ConfigError` if none are made."""
    made: Any = make_tools()
    if inspect.isawaitable(made):
        made = await made
    if isinstance(made, AbstractAsyncContextManager):
        async with made as tools:
            yield _checked(make_tools, tools)
    elif isinstance(made, AbstractContextManager):
        with made as tools:
            yield _checked(make_tools, tools)
    else:
        yield _checked(make_tools, made)


def _checked(make_tools: MakeTools, tools: Any) -> Tools:
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise ConfigError(f"make_tools={make_tools!r}: expected a list of tools, got {tools!r}")
    return tools
