"""What a tool is, what it returns, and what can go wrong with a call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from envs.types import Message

DEFAULT_TIMEOUT_S = 60.0


class InvalidArguments(ValueError):
    """The arguments of a call do not fit the tool. The text is for the model."""


@dataclass(frozen=True)
class ToolResult:
    """What a tool returns when text alone is not enough.

    `content` is what the model reads: text as it is, anything else as JSON. `stop` ends the episode.
    `metrics` are added up over the episode. `metadata` is for `reward_fn`; the model never sees it.
    """

    content: Any
    stop: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    is_error: bool = False


class Tool(Protocol):
    """What a model can call. Optional attributes: `timeout_s` (60 unless given; None: none) and
    `sequential` (False)."""

    @property
    def name(self) -> str: ...

    @property
    def schema(self) -> dict[str, Any]: ...  # OpenAI's: {"type": "function", "function": {…}}

    async def run(self, arguments: dict[str, Any]) -> Any:
        """The answer: a `ToolResult`, text, or anything that JSON can write.

        Raises `InvalidArguments` for what the model got wrong. Any other exception is told to the model
        too, but for a `ProtegeError`: an `InfrastructureError` drops the episode, others end the run.
        """
        ...


class ErrorKind(StrEnum):
    """Why a call was answered with an error."""

    UNKNOWN_TOOL = "unknown_tool"
    INVALID_ARGUMENTS = "invalid_arguments"
    EXCEPTION = "exception"
    TIMEOUT = "timeout"
    UNWRITABLE_RESULT = "unwritable_result"
    REPORTED = "reported"  # the tool itself said so: `ToolResult(is_error=True)`


@dataclass(frozen=True)
class ToolAnswer:
    """A call and what came of it. `result.content` is text here."""

    call: dict[str, Any]
    result: ToolResult
    error: ErrorKind | None = None

    @property
    def message(self) -> Message:
        """What the model reads."""
        return tool_message(self.call, self.result.content)

    @property
    def record(self) -> Message:
        """The message with what the model does not see."""
        hidden = {"metadata": dict(self.result.metadata)} if self.result.metadata else {}
        return self.message | hidden | ({"error": self.error.value} if self.error else {})


def tool_message(call: Mapping[str, Any], content: str) -> Message:
    return {"role": "tool", "tool_call_id": call["id"], "name": call["function"]["name"], "content": content}
