"""The small made-up conversations that stand for a real history when a chat template is differenced
and checked (`envs/rendering.py`)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from envs.types import Message


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str, tool_calls: Sequence[dict] = ()) -> Message:
    message: Message = {"role": "assistant", "content": content}
    return message | {"tool_calls": list(tool_calls)} if tool_calls else message


def tool_call(name: str, arguments: Any, call_id: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def dummy_calls(new: Sequence[Message], tool_calls: Sequence[dict], argument: str) -> Iterator[list[dict[str, Any]]]:
    """Calls that the new messages may answer, the likeliest form first: templates want arguments as an
    object or as JSON text, and some refuse more than one call in a turn."""
    named = [(call.get("function", call).get("name"), call.get("id")) for call in tool_calls]
    if not named:
        named = [(m.get("name"), m.get("tool_call_id")) for m in new if m["role"] == "tool"]
    # nine characters: Mistral's templates insist
    filled = [(name or "tool", call_id or f"call{i:05d}") for i, (name, call_id) in enumerate(named)]
    if not filled:
        yield []
        return
    for calls in (filled, filled[:1]):
        for arguments in ({"value": argument}, json.dumps({"value": argument}, ensure_ascii=False)):
            yield [tool_call(name, arguments, call_id) for name, call_id in calls]


CHECK_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks up a word.",
        "parameters": {"type": "object", "properties": {"value": {"type": "string"}}, "required": ["value"]},
    },
}


def with_json_arguments(messages: Sequence[Message]) -> list[Message]:
    """The messages with the arguments of their tool calls as JSON text."""
    return [
        message
        | {
            "tool_calls": [
                tool_call(c["function"]["name"], json.dumps(c["function"]["arguments"]), c["id"])
                for c in message["tool_calls"]
            ]
        }
        if "tool_calls" in message
        else message
        for message in messages
    ]


def check_cases(*, tools: bool, multi_turn: bool) -> Iterator[tuple[list[Message], list[Message]]]:
    """(history ending in an assistant turn, messages that answer it)."""
    short = [user("question")]
    long = [user("first question"), assistant("first answer"), user("second question")]
    if multi_turn:
        for history in (short, long):
            for answer in ("answer", "<think>\nthought\n</think>\n\nanswer"):
                yield [*history, assistant(answer)], [user("next question")]
    if tools:
        one, two = (
            tool_call("look_up", {"value": "one"}, "checkcal1"),
            tool_call("look_up", {"value": "two"}, "checkcal2"),
        )
        first, second = (
            {"role": "tool", "name": "look_up", "tool_call_id": call["id"], "content": content}
            for call, content in ((one, "first result"), (two, "second result"))
        )
        after_call = [*short, assistant("", [two]), second]
        for history in (short, long, after_call):
            yield [*history, assistant("", [one])], [first]
            yield [*history, assistant("look", [one, two])], [first, second]
