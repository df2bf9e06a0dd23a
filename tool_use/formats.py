"""How models write tool calls in text: the JSON formats, and what all formats share.

A call that stands in a fenced code block, right behind a backtick or inside of thinking is text: the model
shows it and does not make it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from envs.message_env import MalformedCall

Schemas = Mapping[str, Mapping[str, Any]]
"""Each tool's parameters, a JSON schema, by the tool's name."""


@dataclass(frozen=True)
class RawCall:
    """A call as the model wrote it. `id` is None unless the format has ids and this one will do."""

    name: str
    arguments: Mapping[str, Any]
    id: str | None = None


@dataclass
class RawTurn:
    """What a turn's text holds: what it says beside its calls, the calls, and those that cannot be read."""

    content: str = ""
    thinking: str = ""
    calls: list[RawCall] = field(default_factory=list)
    malformed: list[MalformedCall] = field(default_factory=list)

    def add(self, call: RawCall | MalformedCall) -> None:
        if isinstance(call, RawCall):
            self.calls.append(call)
        else:
            self.malformed.append(call)


# --- thinking

_THINKING = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))


def opens_thinking(header: str) -> bool:
    """Whether the template itself has opened the thinking before the model begins to write."""
    return any(header.rfind(start) > header.rfind(end) for start, end in _THINKING)


def split_thinking(text: str, *, inside: bool) -> tuple[str, str]:
    """The thinking that a turn begins with, and the rest. Thinking that never ends is all of the turn."""
    body = text.lstrip()
    for start, end in _THINKING:
        if body.startswith(start) or (inside and end in body):
            thought, _, rest = body.removeprefix(start).partition(end)
            return thought.strip(), rest
    return (text.strip(), "") if inside else ("", text)


# --- where a call may stand

_FENCE = r"^ {0,3}(?P<fence>`{3,}|~{3,})[^\n]*$"
_OPENS_THOUGHT = "|".join(re.escape(start) for start, _ in _THINKING)

ReadCall = Callable[[RawTurn, str, re.Match[str]], int | None]
"""Reads what begins at a match, adds it to the turn and returns where it ends; None: that is text."""


def scan(text: str, opening: str, read: ReadCall) -> RawTurn:
    """A turn whose calls begin where the pattern `opening` matches."""
    pattern = re.compile(rf"{_FENCE}|(?P<thought>{_OPENS_THOUGHT})|(?P<opening>{opening})", re.MULTILINE)
    turn, said, thoughts = RawTurn(), [], []
    last_end = {begin: text.rfind(end) for begin, end in _THINKING}  # once: a model may open a thousand thoughts
    start = position = 0  # text from `start` on is not in `said` yet
    while (match := pattern.search(text, position)) is not None:
        if match["fence"] is not None:
            position = _end_of_fence(text, match)
        elif (begin := match["thought"]) is not None:
            position = match.end()
            if last_end[begin] >= position:  # else it is never closed, and only text
                end = dict(_THINKING)[begin]
                position = text.index(end, position) + len(end)
                said.append(text[start : match.start()])
                thoughts.append(text[match.start() : position])
                start = position
        else:
            unread = len(turn.malformed)
            end = read(turn, text, match)
            position = max(match.end(), match.start() + 1) if end is None else end
            if end is not None and len(turn.malformed) == unread:  # what cannot be read stays visible
                said.append(text[start : match.start()])
                start = end
    turn.content = "".join([*said, text[start:]])
    turn.thinking = "\n".join(thoughts)
    return turn


def _end_of_fence(text: str, match: re.Match[str]) -> int:
    fence = match["fence"]
    closing = re.compile(rf"^ {{0,3}}{re.escape(fence[0])}{{{len(fence)},}}[ \t]*$", re.MULTILINE)
    found = closing.search(text, match.end())
    return found.end() if found else len(text)  # as in Markdown: to the end


# --- JSON

_DECODER = json.JSONDecoder(strict=False)  # a line break in a string is no reason to refuse a call
_SPACE = re.compile(r"\s*")


class BadJSON(ValueError):
    """Text that is not JSON. The message is for the model."""


def decode(text: str, position: int) -> tuple[Any, int]:
    """The JSON value there, and where it ends. Raises `BadJSON`."""
    start = after_space(text, position)
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated"):
            raise BadJSON("the call is cut short: its JSON does not end") from error
        raise BadJSON(f"not valid JSON: {error.msg} at {text[error.pos : error.pos + 20]!r}") from error
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, 1000 brackets
        raise BadJSON(f"JSON that cannot be read: {error}") from error


def after_space(text: str, position: int) -> int:
    found = _SPACE.match(text, position)
    return found.end() if found else position


def json_call(value: Any, *, keep_id: bool = False) -> RawCall | MalformedCall:
    """A call written as `{"name": …, "arguments": {…}}`; "parameters" will do, as will arguments in a string."""
    if not isinstance(value, dict):
        return MalformedCall(f'a call must be a JSON object with "name" and "arguments", got {_short(value)}')
    name = value.get("name")
    if not isinstance(name, str) or not name:
        return MalformedCall(f'a call needs a "name", got {_short(value)}')
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = decode(arguments, 0)[0] if arguments.strip() else {}
        except BadJSON as error:
            return MalformedCall(f'the "arguments" of {name} are a string that is {error}', name)
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        return MalformedCall(f'the "arguments" of {name} must be a JSON object, got {_short(arguments)}', name)
    call_id = value.get("id")
    kept = keep_id and isinstance(call_id, str) and re.fullmatch(r"[A-Za-z0-9]{9}", call_id)
    return RawCall(name, arguments, call_id if kept else None)


def malformed(reason: object, text: str) -> MalformedCall:
    """With the name that the call seems to have."""
    found = re.search(r'"name"\s*:\s*"([\w.-]{1,64})"|<function=([\w.-]{1,64})>', text)
    return MalformedCall(str(reason), (found[1] or found[2]) if found else "tool")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:79] + "…"


# --- Hermes, Qwen 2.5 and 3: <tool_call>{"name": …, "arguments": {…}}</tool_call>


def is_hermes(written: str) -> bool:
    return re.search(r'<tool_call>\s*\{\s*"name"', written) is not None


def parse_hermes(text: str, schemas: Schemas) -> RawTurn:
    return scan(text, r"(?<!`)<tool_call>", _read_hermes)


def _read_hermes(turn: RawTurn, text: str, match: re.Match[str]) -> int:
    closing = "</tool_call>"
    try:
        value, end = decode(text, match.end())
        at = after_space(text, end)
        if text.startswith(closing, at):
            turn.add(json_call(value))
            return at + len(closing)
        problem = f"the call is not closed: expected {closing}"
        problem += f" and got {text[at : at + 20]!r}" if text[at:] else ""
    except BadJSON as error:
        problem, end = str(error), match.end()
    found = text.find(closing, end)
    stop = len(text) if found < 0 else found + len(closing)
    turn.add(malformed(problem, text[match.end() : stop]))
    return stop


# --- Llama 3: {"name": …, "parameters": {…}}, alone, behind a line of text or behind <|python_tag|>

_PYTHON_TAG = "<|python_tag|>"
_BEGINS_LIKE_A_CALL = re.compile(r'\{\s*"name"\s*:\s*"[^"]*"\s*(,\s*("(parameters|arguments)"|"\w*$|$)|$)')


def is_llama3_json(written: str) -> bool:
    return re.search(r'(^|[\n>])\s*\{\s*"name":\s*"look_up",\s*"parameters":\s*\{', written) is not None


def parse_llama3_json(text: str, schemas: Schemas) -> RawTurn:
    for end in ("<|eom_id|>", "<|eot_id|>"):
        text = text.removesuffix(end)
    return scan(text, rf"{re.escape(_PYTHON_TAG)}|^[ \t]*(?=\{{)", _read_llama3)


def _read_llama3(turn: RawTurn, text: str, match: re.Match[str]) -> int | None:
    tagged = match["opening"].endswith(_PYTHON_TAG)
    position, first = match.end(), True
    while True:
        try:
            value, end = decode(text, position)
        except BadJSON as error:
            if first and not tagged and not _BEGINS_LIKE_A_CALL.match(text, position):
                return None
            turn.add(malformed(error, text[position:]))
            return len(text)
        if first and not tagged and not _is_call(value):
            return None  # an answer in JSON
        turn.add(json_call(value))
        position = after_space(text, end)
        if text.startswith(";", position):
            position = after_space(text, position + 1)
        if not text.startswith("{", position):
            return position
        first = False


def _is_call(value: Any) -> bool:
    return isinstance(value, dict) and "name" in value and ("parameters" in value or "arguments" in value)


# --- Mistral: [TOOL_CALLS] [{"name": …, "arguments": {…}, "id": …}] and [TOOL_CALLS]name[ARGS]{…}

_TOOL_CALLS = "[TOOL_CALLS]"
_NAMED = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*([A-Za-z0-9]+)\s*)?(?:\[ARGS\])?\s*(?=\{)")


def is_mistral(written: str) -> bool:
    return _TOOL_CALLS in written


def parse_mistral(text: str, schemas: Schemas) -> RawTurn:
    return scan(text, rf"(?<!`){re.escape(_TOOL_CALLS)}", _read_mistral)


def _read_mistral(turn: RawTurn, text: str, match: re.Match[str]) -> int:
    position = after_space(text, match.end())
    try:
        if text.startswith("[", position):
            values, end = decode(text, position)
            for value in values:
                turn.add(json_call(value, keep_id=True))
            return end
        while (named := _NAMED.match(text, position)) is not None:
            value, position = decode(text, named.end())
            turn.add(json_call({"name": named[1], "arguments": value, "id": named[2]}, keep_id=True))
        if position > after_space(text, match.end()):
            return position
        problem = "expected a JSON list of calls, or a tool's name, [ARGS] and a JSON object"
    except BadJSON as error:
        problem = str(error)
    turn.add(malformed(problem, text[position:]))
    following = text.find(_TOOL_CALLS, position)
    return len(text) if following < 0 else following
