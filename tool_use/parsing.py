"""From the text of a sampled turn to its tool calls, in the format that the model's own template uses.

The format is found out by having the template write a call and looking at the text, not by the model's
name. A format that is not known here is one `register_tool_parser` away. Reading never changes a token.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from envs.message_env import AssistantTurn, MalformedCall
from envs.rendering import Renderer
from errors import TemplateError
from tool_use import formats, qwen_xml
from tool_use.formats import RawCall, RawTurn, Schemas
from tool_use.response_template import parse_with_template
from tool_use.types import Tool

Detect = Callable[[str], bool]
Parse = Callable[[str, Schemas], RawTurn]

_LITERAL_CALL = ("look_up", {"value": "one"}, "checkcal1")


@dataclass(frozen=True)
class ToolFormat:
    """How a model writes its calls. `detect` is shown the text in which a template has written a call of
    `look_up` with the argument `value`, `"one"`; `parse` reads a turn's text."""

    name: str
    detect: Detect
    parse: Parse
    reads_thinking: bool = False  # True: `parse` is given the thinking, too


_BUILT_IN = (
    ToolFormat("hermes", formats.is_hermes, formats.parse_hermes),
    ToolFormat("qwen_xml", qwen_xml.detect, qwen_xml.parse),
    ToolFormat("mistral", formats.is_mistral, formats.parse_mistral),
    ToolFormat("llama3_json", formats.is_llama3_json, formats.parse_llama3_json),
)
_registered: list[ToolFormat] = []


def register_tool_parser(name: str, detect: Detect, parse: Parse) -> None:
    """Teach another format. It is asked before those that are known already; a second registration of a
    name replaces the first.

    `detect(text)`: whether the template that wrote `text`, a turn with the call `look_up(value="one")`, uses
    this format. `parse(text, schemas)`: a turn's text, without the token that ended it, as a `RawTurn`;
    `schemas` are the tools' parameters by name. Thinking has been taken off the text.
    """
    _registered[:] = [ToolFormat(name, detect, parse), *(known for known in _registered if known.name != name)]
    _formats.clear()


class TurnParser:
    """Reads the turns of one episode. Calls get ids that no other call of the episode has."""

    def __init__(self, format: ToolFormat, tools: Sequence[Tool], *, starts_thinking: bool) -> None:
        self.format = format
        self._starts_thinking = starts_thinking
        self._schemas: Schemas = {tool.name: tool.schema["function"].get("parameters", {}) for tool in tools}
        self._seen: set[str] = set()
        self._numbers = itertools.count(1)

    def __call__(self, text: str) -> AssistantTurn:
        thinking, said = "", text
        if not self.format.reads_thinking:
            thinking, said = formats.split_thinking(text, inside=self._starts_thinking)
        raw = self.format.parse(said, self._schemas)
        thoughts = [part for part in (thinking, raw.thinking) if part]
        return AssistantTurn(
            content=raw.content.strip(),
            thinking="\n".join(thoughts),
            tool_calls=tuple(self._openai(call) for call in raw.calls),
            malformed=tuple(raw.malformed),
        )

    def placeholder(self, malformed: MalformedCall) -> dict[str, Any]:
        """A call for an answer to refer to, in place of one that cannot be read."""
        return self._openai(RawCall(malformed.name, {}))

    def _openai(self, call: RawCall) -> dict[str, Any]:
        call_id = call.id
        if call_id is None or call_id in self._seen:  # nine characters: Mistral's templates refuse any other
            call_id = next(i for n in self._numbers if (i := f"call{n:05d}") not in self._seen)
        self._seen.add(call_id)
        function = {"name": call.name, "arguments": dict(call.arguments)}
        return {"id": call_id, "type": "function", "function": function}


@dataclass(frozen=True)
class _Known:
    format: ToolFormat
    starts_thinking: bool


_formats: weakref.WeakKeyDictionary[Renderer, _Known] = weakref.WeakKeyDictionary()


def make_parser(renderer: Renderer, tools: Sequence[Tool]) -> TurnParser:
    """A parser for one episode. The first for a renderer proves that its template can be appended to with
    tools, and finds out how it writes calls. Raises `TemplateError` with the way out."""
    known = _formats.get(renderer)
    if known is None:
        renderer.check(tools=True)
        known = _formats[renderer] = _Known(detect_format(renderer), formats.opens_thinking(renderer.header))
    return TurnParser(known.format, tools, starts_thinking=known.starts_thinking)


def detect_format(renderer: Renderer) -> ToolFormat:
    """How this renderer's template writes calls: a registered format, the tokenizer's own declared response
    template, or one of those built in. Raises `TemplateError`."""
    written = renderer.write_call(*_LITERAL_CALL)
    for known in _registered:
        if known.detect(written):
            return known
    if getattr(renderer.tokenizer, "response_template", None):
        return ToolFormat("response_template", bool, parse_with_template(renderer), reads_thinking=True)
    for known in _BUILT_IN:
        if known.detect(written):
            return known
    raise TemplateError(
        f"tokenizer {renderer.name!r}: its chat template writes a tool call as {written!r}, which none of "
        f"{', '.join(known.name for known in _BUILT_IN)} reads. Way out: tool_use.register_tool_parser(name, detect, "
        "parse), or a tokenizer with a response_template"
    )
