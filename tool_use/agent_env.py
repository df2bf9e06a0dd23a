"""An environment in which a model calls tools until it answers without a call."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import anyio

from envs.message_env import AssistantTurn, MalformedCall, MessageStep, Outcome, TokenEnv, plain_turn
from envs.rendering import Renderer
from envs.types import Message, StopReason
from errors import ConfigError
from tool_use.calling import by_name, call_tools, invoke
from tool_use.parsing import make_parser
from tool_use.types import ErrorKind, Tool, ToolAnswer, tool_message

ParseErrorPolicy = Literal["tell", "stop"]
Reward = float | tuple[float, Mapping[str, float]]
RewardFn = Callable[[list[Message]], Reward | Awaitable[Reward]]
"""Given the whole conversation, once, when the episode has ended. Tool messages carry `metadata` of their
`ToolResult`s, and `error`. Returns the reward, or the reward and metrics. It may be async; else it runs in
a thread. An `InfrastructureError` drops the episode."""


async def zero_reward(messages: list[Message]) -> float:
    """No reward: in distillation the teacher's judgement is the only signal."""
    return 0.0


@dataclass(frozen=True)
class AgentLimits:
    """When an episode ends although the student would go on."""

    max_turns: int = 10
    max_trajectory_tokens: int = 8192  # prompt, all turns and all tool results
    max_generation_tokens: int = 1024  # of one turn
    max_tool_calls: int | None = None  # calls beyond these are not made
    parse_error_policy: ParseErrorPolicy = "tell"  # a call that cannot be read: tell the model, or stop
    timeout_s: float | None = None  # wall clock, from the first turn on; looked at while tools run

    def __post_init__(self) -> None:
        for name in ("max_turns", "max_trajectory_tokens", "max_generation_tokens", "max_tool_calls", "timeout_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name}={value}: expected more than 0")
        if self.parse_error_policy not in ("tell", "stop"):
            raise ConfigError(f"parse_error_policy={self.parse_error_policy!r}: expected 'tell' or 'stop'")


class AgentToolMessageEnv:
    """A conversation with tools. It ends when a turn makes no call, a tool says stop, or a limit is met.

    The calls of the last turn are made even if `max_turns` ends the episode there, because what they did
    may count. `placeholder` makes the call that the answer to an unreadable one refers to.
    """

    def __init__(
        self,
        tools: Sequence[Tool],
        initial_messages: Sequence[Message],
        reward_fn: RewardFn = zero_reward,
        *,
        limits: AgentLimits,
        placeholder: Callable[[MalformedCall], dict[str, Any]],
    ) -> None:
        self.history: list[Message] = list(initial_messages)
        self._tools = by_name(tools)
        self._reward_fn = reward_fn
        self._limits = limits
        self._placeholder = placeholder
        self._deadline = math.inf
        self._counts: Counter[str] = Counter()

    @property
    def tools(self) -> list[dict[str, Any]]:
        return [tool.schema for tool in self._tools.values()]

    async def initial_messages(self) -> Sequence[Message]:
        if self._limits.timeout_s is not None:
            self._deadline = anyio.current_time() + self._limits.timeout_s
        return list(self.history)

    async def step(self, turn: AssistantTurn) -> MessageStep:
        self._counts["turns"] += 1
        self._counts["parse_errors"] += len(turn.malformed)
        self.history.append(turn.message)
        if turn.malformed and self._limits.parse_error_policy == "stop":
            return MessageStep(stop_reason=StopReason.PARSE_ERROR, tool_calls=turn.tool_calls)
        if not turn.tool_calls and not turn.malformed:
            return MessageStep(stop_reason=StopReason.COMPLETED)
        answers = await self._answers(turn.tool_calls)
        self.history.extend(answer.record for answer in answers)
        told = [(self._placeholder(problem), problem) for problem in turn.malformed]
        errors = [tool_message(call, _unreadable(problem)) for call, problem in told]
        self.history.extend(errors)
        return MessageStep(
            messages=tuple(answer.message for answer in answers) + tuple(errors),
            stop_reason=self._stop_reason(turn, answers),
            tool_calls=turn.tool_calls + tuple(call for call, _ in told),
            metrics=_added_up(answers),
        )

    async def finish(self, stop_reason: StopReason, cut: AssistantTurn | None) -> Outcome:
        if cut is not None:
            self._counts["turns"] += 1
            self.history.append(cut.message)
        returned = await invoke(self._reward_fn, list(self.history))
        reward, metrics = returned if isinstance(returned, tuple) else (returned, {})
        if not math.isfinite(reward):
            raise ConfigError(f"reward_fn returned {reward}: expected a finite number")
        names = ["turns", "tool_calls", "parse_errors", "tool_errors", *(f"tool_errors/{kind}" for kind in ErrorKind)]
        counts = {name: float(self._counts[name]) for name in names}
        return Outcome(float(reward), {**counts, **{name: float(value) for name, value in metrics.items()}})

    async def _answers(self, calls: Sequence[dict[str, Any]]) -> list[ToolAnswer]:
        """The answers to the calls that the limits allow; none if time runs out over them."""
        if self._limits.max_tool_calls is not None:
            calls = calls[: self._limits.max_tool_calls - self._counts["tool_calls"]]
        self._counts["tool_calls"] += len(calls)
        answers: list[ToolAnswer] = []
        with anyio.move_on_at(self._deadline):
            answers = await call_tools(self._tools, calls)
        for answer in answers:
            if answer.error is not None:
                self._counts["tool_errors"] += 1
                self._counts[f"tool_errors/{answer.error}"] += 1
        return answers

    def _stop_reason(self, turn: AssistantTurn, answers: Sequence[ToolAnswer]) -> StopReason | None:
        if any(answer.result.stop for answer in answers):
            return StopReason.TOOL_STOPPED
        if anyio.current_time() >= self._deadline:
            return StopReason.TIMEOUT
        if len(answers) < len(turn.tool_calls):
            return StopReason.MAX_TOOL_CALLS
        if self._counts["turns"] >= self._limits.max_turns:
            return StopReason.MAX_TURNS
        return None


def build_agent_tool_env(
    renderer: Renderer,
    tools: Sequence[Tool],
    initial_messages: Sequence[Message],
    reward_fn: RewardFn = zero_reward,
    *,
    max_turns: int = 10,
    max_trajectory_tokens: int = 8192,
    max_generation_tokens: int = 1024,
    max_tool_calls: int | None = None,
    parse_error_policy: ParseErrorPolicy = "tell",
    timeout_s: float | None = None,
) -> TokenEnv:
    """The token-level environment of one episode: the model of `renderer` has these tools and this prompt.

    The options are `AgentLimits`'. Raises `TemplateError` if the model's template cannot show tools, or
    writes calls in a way that is not known, and `ConfigError` for tools that are none.
    """
    limits = AgentLimits(
        max_turns, max_trajectory_tokens, max_generation_tokens, max_tool_calls, parse_error_policy, timeout_s
    )
    by_name(tools)  # said before the template is looked at
    parser = make_parser(renderer, tools) if tools else None
    env = AgentToolMessageEnv(
        tools, initial_messages, reward_fn, limits=limits, placeholder=parser.placeholder if parser else _no_calls
    )
    return TokenEnv(
        env,
        renderer,
        max_trajectory_tokens=limits.max_trajectory_tokens,
        max_generation_tokens=limits.max_generation_tokens,
        parse=parser or plain_turn,
    )


def _no_calls(problem: MalformedCall) -> dict[str, Any]:
    raise AssertionError(f"a turn without tools has no calls: {problem}")


def _unreadable(problem: MalformedCall) -> str:
    return f"Error: your tool call could not be read: {problem.error}. Write the call again"


def _added_up(answers: Sequence[ToolAnswer]) -> dict[str, float]:
    total: Counter[str] = Counter()
    for answer in answers:
        for name, value in answer.result.metrics.items():
            total[name] += value  # type: ignore[assignment]
    return dict(total)
