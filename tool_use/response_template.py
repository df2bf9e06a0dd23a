"""Tool calls by the response template that a tokenizer declares itself; transformers reads those."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from envs.rendering import Renderer
from tool_use.formats import RawCall, RawTurn, Schemas, json_call, malformed


def parse_with_template(renderer: Renderer) -> Callable[[str, Schemas], RawTurn]:
    """A parser for this tokenizer. It reads thinking, content and calls as the template says."""

    def parse(text: str, schemas: Schemas) -> RawTurn:
        tools: list[Any] = [
            {"type": "function", "function": {"name": name, "parameters": dict(schema)}}
            for name, schema in schemas.items()
        ]
        try:
            # the header of a made-up prompt, not the prompt itself: nothing that a tool printed is read here
            message = renderer.tokenizer.parse_response(text, prefix=renderer.header, tools=tools)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            reason = str(error).replace("\n", " ")
            return RawTurn(content=text, malformed=[malformed(reason[:200], text)])
        turn = RawTurn(content=message.get("content") or "", thinking=message.get("thinking") or "")
        for call in message.get("tool_calls") or []:
            read = json_call(call.get("function", call))
            given = call.get("id")
            if isinstance(read, RawCall) and isinstance(given, str) and given:
                read = RawCall(read.name, json.loads(json.dumps(read.arguments)), given)
            turn.add(read)
        return turn

    return parse
