"""Environments that speak in messages, and `TokenEnv`, which lets a student that speaks in tokens act in one.

The history is never rendered again: each turn appends what the environment says, as the renderer writes
it after an assistant turn. An environment that rewrites its context has no place here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from envs.rendering import Renderer
from envs.types import Closable, Env, Message, Observation, Sampled, StepResult, StopCondition, StopReason
from errors import DataError


@dataclass(frozen=True)
class MalformedCall:
    """Text that was meant as a tool call and cannot be read as one. `name` is a guess."""

    error: str
    name: str = "tool"


@dataclass(frozen=True)
class AssistantTurn:
    """One sampled turn as read: what it says, what it thought, the calls it makes (OpenAI's form, arguments
    as an object) and those that cannot be read."""

    content: str
    thinking: str = ""
    tool_calls: tuple[dict[str, Any], ...] = ()
    malformed: tuple[MalformedCall, ...] = ()

    @property
    def message(self) -> Message:
        message: Message = {"role": "assistant", "content": self.content}
        if self.thinking:
            message["reasoning_content"] = self.thinking
        if self.tool_calls:
            message["tool_calls"] = list(self.tool_calls)
        return message


@dataclass(frozen=True)
class MessageStep:
    """A message env's answer to a turn: `messages` to append, or a `stop_reason`. `tool_calls` are those
    that the messages answer."""

    messages: tuple[Message, ...] = ()
    stop_reason: StopReason | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    reward: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    logs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.stop_reason is None and not self.messages:
            raise ValueError("a step that does not stop needs messages for the student to go on from")


@dataclass(frozen=True)
class Outcome:
    """What a message env has to say once its episode has ended."""

    reward: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    logs: dict[str, Any] = field(default_factory=dict)


class MessageEnv(Protocol):
    """Message-level environment of one episode, single use."""

    @property
    def tools(self) -> Sequence[dict[str, Any]]: ...  # function schemas that the prompt shows

    async def initial_messages(self) -> Sequence[Message]: ...

    async def step(self, turn: AssistantTurn) -> MessageStep: ...

    async def finish(self, stop_reason: StopReason, cut: AssistantTurn | None) -> Outcome:
        """Called once, when the episode has ended. `cut` is a turn that the sampler cut short: `step` has
        not seen it."""
        ...


def plain_turn(text: str) -> AssistantTurn:
    """A turn of an environment without tools: all of it is content."""
    return AssistantTurn(content=text)


class TokenEnv:
    """A `MessageEnv` for a student that reads and writes tokens.

    `parse` reads the text of a turn; it never changes a token. A turn that is cut ends the episode, and
    so does an answer that leaves the student no room below `max_trajectory_tokens`: that answer is not
    appended. Raises `DataError` for a prompt that leaves no room at all.
    """

    def __init__(
        self,
        message_env: MessageEnv,
        renderer: Renderer,
        *,
        max_trajectory_tokens: int,
        max_generation_tokens: int,
        parse: Callable[[str], AssistantTurn] = plain_turn,
    ) -> None:
        self.message_env = message_env
        self.max_trajectory_tokens = max_trajectory_tokens
        self.max_generation_tokens = max_generation_tokens
        self._renderer = renderer
        self._parse = parse
        self._length = 0  # of the token log

    @property
    def stop(self) -> StopCondition:
        return self._renderer.stop

    async def initial_observation(self) -> Observation:
        messages = tuple(await self.message_env.initial_messages())
        tools = tuple(self.message_env.tools)
        ids = self._renderer.prompt(messages, tools)
        self._length = len(ids)
        if self._length >= self.max_trajectory_tokens:
            raise DataError(
                f"max_trajectory_tokens={self.max_trajectory_tokens}: the prompt alone has {self._length} tokens"
                f"{' with its tools' if tools else ''}. Raise the limit, or shorten the prompt: "
                f"{str(messages[-1].get('content'))[:80]!r}"
            )
        return Observation(ids, messages, tools)

    async def step(self, action: Sampled) -> StepResult:
        self._length += len(action.token_ids)
        turn = self._parse(self._renderer.decode(action.token_ids))
        if not action.stopped:
            full = self._length >= self.max_trajectory_tokens
            reason = StopReason.CONTEXT_OVERFLOW if full else StopReason.MAX_TOKENS
            return await self._end(MessageStep(stop_reason=reason, tool_calls=turn.tool_calls), cut=turn)
        said = await self.message_env.step(turn)
        if said.stop_reason is not None:
            return await self._end(said)
        ended = action.token_ids[-1] in self.stop.token_ids
        ids = self._renderer.continuation(said.messages, ended=ended, tool_calls=said.tool_calls)
        if self._length + len(ids) >= self.max_trajectory_tokens:
            return await self._end(said, reason=StopReason.CONTEXT_OVERFLOW)
        self._length += len(ids)
        return StepResult(
            done=False,
            observation=Observation(ids, said.messages),
            reward=said.reward,
            metrics=said.metrics,
            logs=said.logs,
            tool_calls=said.tool_calls,
        )

    async def aclose(self) -> None:
        if isinstance(self.message_env, Closable):
            await self.message_env.aclose()

    async def _end(
        self, said: MessageStep, *, reason: StopReason | None = None, cut: AssistantTurn | None = None
    ) -> StepResult:
        reason = reason or said.stop_reason
        assert reason is not None
        outcome = await self.message_env.finish(reason, cut)
        metrics = dict(said.metrics)
        for name, value in outcome.metrics.items():
            metrics[name] = metrics.get(name, 0.0) + value
        return StepResult(
            done=True,
            stop_reason=reason,
            reward=said.reward + outcome.reward,
            metrics=metrics,
            logs={**said.logs, **outcome.logs},
            tool_calls=said.tool_calls,
        )


class DeferredEnv:
    """An env that is opened when its episode begins and closed when it ends.

    `open` gives an async context manager: what it takes before its `yield` (a sandbox, say) is this episode's
    alone and is given back after it. An `InfrastructureError` there drops this episode and no other.
    """

    def __init__(self, open: Callable[[], AbstractAsyncContextManager[Env]]) -> None:
        self._open = open
        self._context: AbstractAsyncContextManager[Env] | None = None
        self._env: Env | None = None

    @property
    def env(self) -> Env:
        if self._env is None:
            raise RuntimeError("the env is opened by initial_observation, and closed by aclose")
        return self._env

    @property
    def stop(self) -> StopCondition:
        return self.env.stop

    @property
    def max_generation_tokens(self) -> int:
        return self.env.max_generation_tokens

    @property
    def max_trajectory_tokens(self) -> int:
        return self.env.max_trajectory_tokens

    async def initial_observation(self) -> Observation:
        context = self._open()
        self._env = await context.__aenter__()
        self._context = context  # only now: what failed to open cleans up after itself
        return await self._env.initial_observation()

    async def step(self, action: Sampled) -> StepResult:
        return await self.env.step(action)

    async def aclose(self) -> None:
        env, context = self._env, self._context
        self._env = self._context = None
        try:
            if isinstance(env, Closable):
                await env.aclose()
        finally:
            if context is not None:
                await context.__aexit__(None, None, None)
