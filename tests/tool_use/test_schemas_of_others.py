"""`@tool` beside the schema that transformers, and with it TRL, makes of the same functions, and what users of other
libraries' tools expect of a decorated function."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

import anyio
import pytest
from transformers.utils import get_json_schema

from tool_use import ToolResult, tool
from tool_use.calling import call_tool


def multiply(a: float, b: float) -> float:
    """Multiplies two numbers.

    Args:
        a: The first number.
        b: The second number,
            which goes on here.

    Returns:
        The product.
    """
    return a * b


def search(query: str, limit: int = 5, exact: bool = False, kinds: list[str] | None = None) -> list[str]:
    """
    Searches the index.

    Args:
        query: What to look for.
        limit: How many to return.
        exact: Whether to match whole words.
        kinds: Kinds of documents.
    """
    return [query] * limit


def move(direction: Literal["up", "down"], steps: dict[str, int]) -> str:
    """Moves a piece.

    Args:
        direction: Where to.
        steps: How far, by piece.

    Returns:
        What the board looks like.
    """
    return direction


def now() -> str:
    """Says what time it is."""
    return "noon"


def comparable(schema: dict[str, Any]) -> Any:
    """Without what says the same in other words: nullable types, defaults, and the return value."""
    function = schema["function"]
    properties = {}
    for name, given in function["parameters"].get("properties", {}).items():
        given = {key: value for key, value in given.items() if key not in ("default", "nullable")}
        options = [option for option in given.pop("anyOf", []) if option != {"type": "null"}]
        properties[name] = {**given, **(options[0] if options else {})}
    required = sorted(function["parameters"].get("required", []))
    return function["name"], function["description"], properties, required


@pytest.mark.parametrize("function", [multiply, search, move, now])
def test_a_google_docstring_gives_the_schema_that_transformers_gives(function: Any):
    ours, theirs = comparable(tool(function).schema), comparable(get_json_schema(function))
    if function is move:  # ours says what may stand there
        assert theirs[2]["steps"].pop("additionalProperties", None) in (None, {"type": "integer"})
        assert ours[2]["steps"].pop("additionalProperties") == {"type": "integer"}
    assert ours == theirs


class Notes:
    """As the cookbook's tools are written: methods of one object, async, annotated, answering with results."""

    def __init__(self) -> None:
        self.kept: list[str] = []

    @tool
    async def keep(
        self, text: Annotated[str, "What to remember"], tags: Annotated[list[str], "Its tags"]
    ) -> ToolResult:
        """Keeps a note."""
        self.kept.append(text)
        return ToolResult(f"{len(self.kept)} kept", metrics={"tags": len(tags)})

    @tool
    def drop(self) -> dict[str, int]:
        """Drops all notes."""
        if not self.kept:
            raise LookupError("there are none")
        return {"dropped": len(self.kept)}


def asked(tools: Any, name: str, arguments: dict[str, Any]) -> Any:
    call = {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}
    return anyio.run(call_tool, {each.name: each for each in tools}, call)


def test_a_cookbook_tool_runs_as_it_is():
    notes = Notes()
    tools = [notes.keep, notes.drop]
    assert tools[0].schema["function"]["parameters"]["properties"] == {
        "text": {"type": "string", "description": "What to remember"},
        "tags": {"type": "array", "items": {"type": "string"}, "description": "Its tags"},
    }
    empty = asked(tools, "drop", {})
    assert (empty.message["content"], empty.error) == ("Error: LookupError: there are none", "exception")
    kept = asked(tools, "keep", {"text": "a", "tags": ["x", "y"]})
    assert (kept.message["content"], kept.result.metrics, kept.error) == ("1 kept", {"tags": 2.0}, None)
    assert asked(tools, "drop", {}).message["content"] == '{"dropped": 1}'
    wrong = asked(tools, "keep", {"text": "a", "tags": "x", "more": 1})
    assert wrong.error == "invalid_arguments" and "'tags'" in wrong.message["content"]
    assert asked(tools, "lose", {}).error == "unknown_tool"
    assert asyncio.run(notes.keep("b", [])).content == "2 kept"  # still the method that it was
