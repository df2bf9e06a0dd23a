"""Qwen 3.5's and Qwen3-Coder's calls: a tag for the function, a tag for each parameter.

    <tool_call>
    <function=name>
    <parameter=key>
    value
    </parameter>
    </function>
    </tool_call>

A value is plain text; the tool's schema says what type it has. Qwen3-Coder is known to leave out the opening
`<tool_call>`, and often the closing one with it: a whole function at the beginning of a line is a call without them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from tool_use.formats import RawCall, RawTurn, Schemas, malformed, scan

_CLOSING = "</tool_call>"
_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>")
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>")
# a value may hold the tag's own text: it ends where the format goes on behind it
_END_OF_VALUE = re.compile(r"</parameter>(?=\s*(?:<parameter=[^>\n]+>|</function>\s*</tool_call>))")
_END_OF_CALL = re.compile(r"\s*</function>\s*</tool_call>")
_END_OF_BARE_VALUE = re.compile(r"</parameter>(?=\s*(?:<parameter=[^>\n]+>|</function>))")
_END_OF_BARE_CALL = re.compile(r"\s*</function>(?:\s*</tool_call>)?")
_OPENING = r"(?<!`)<tool_call>|^[ \t]*(?=<function=[^>\n]+>)"


def detect(written: str) -> bool:
    return re.search(r"<tool_call>\s*<function=look_up>\s*<parameter=value>", written) is not None


def parse(text: str, schemas: Schemas) -> RawTurn:
    def read(turn: RawTurn, text: str, match: re.Match[str]) -> int | None:
        if not match["opening"].endswith("<tool_call>"):
            shown = text[: match.start()].rstrip().endswith("<tool_call>")  # by a tag that is text itself
            return None if shown else _read_bare(turn, text, match.end(), schemas)
        function = _FUNCTION.match(text, match.end())
        if function is None:
            return _give_up(turn, text, match, "expected <function=name> after <tool_call>")
        name, values, position = function[1].strip(), {}, function.end()
        while (key := _PARAMETER.match(text, position)) is not None:
            end = _END_OF_VALUE.search(text, key.end())
            if end is None:
                reason = f"the parameter {key[1]!r} of {name} is not closed: expected </parameter>, and after it "
                return _give_up(turn, text, match, f"{reason}<parameter=…> or </function> </tool_call>")
            values[key[1].strip()] = _value(text[key.end() : end.start()])
            position = end.end()
        end = _END_OF_CALL.match(text, position)
        if end is None:
            return _give_up(turn, text, match, f"the call of {name} is not closed: expected </function> </tool_call>")
        turn.add(RawCall(name, typed(values, schemas.get(name, {}))))
        return end.end()

    return scan(text, _OPENING, read)


def _read_bare(turn: RawTurn, text: str, position: int, schemas: Schemas) -> int | None:
    """None: no whole function begins there, so that it is text."""
    function = _FUNCTION.match(text, position)
    assert function is not None, "the opening looks ahead at one"
    values, position = {}, function.end()
    while (key := _PARAMETER.match(text, position)) is not None:
        if (end := _END_OF_BARE_VALUE.search(text, key.end())) is None:
            return None
        values[key[1].strip()] = _value(text[key.end() : end.start()])
        position = end.end()
    if (end := _END_OF_BARE_CALL.match(text, position)) is None:
        return None
    name = function[1].strip()
    turn.add(RawCall(name, typed(values, schemas.get(name, {}))))
    return end.end()


def _give_up(turn: RawTurn, text: str, match: re.Match[str], reason: str) -> int:
    found = text.find(_CLOSING, match.end())
    stop = len(text) if found < 0 else found + len(_CLOSING)
    turn.add(malformed(reason, text[match.end() : stop]))
    return stop


def _value(text: str) -> str:
    """Without the line breaks that the format puts around a value; the value's own stay."""
    return text.removeprefix("\n").removesuffix("\n")


# --- types


def typed(values: Mapping[str, str], schema: Mapping[str, Any]) -> dict[str, Any]:
    """Texts as what the schema says they are; what fits none of its types stays text."""
    properties = schema.get("properties", {})
    return {key: _typed(text, properties.get(key)) for key, text in values.items()}


def _typed(text: str, schema: Mapping[str, Any] | None) -> Any:
    options = list(_options(schema or {}))
    for option in options:
        for value in option.get("enum", [option["const"]] if "const" in option else []):
            if text == value or (not isinstance(value, str) and text in (str(value), json.dumps(value))):
                return value
    types = [kind for option in options for kind in _types(option)]
    if not types or "$ref" in str(schema):  # anything goes
        types = [*types, "object", "array", "number", "boolean", "null"]
    for kind in sorted(set(types), key=_ORDER.index):
        try:
            return _READ[kind](text)
        except ValueError:
            continue
    return text


def _options(schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    unions = [option for key in ("anyOf", "oneOf", "allOf") for option in schema.get(key, [])]
    for option in unions:
        yield from _options(option)
    if not unions:
        yield schema


def _types(schema: Mapping[str, Any]) -> list[str]:
    kind = schema.get("type", [])
    return [k for k in ([kind] if isinstance(kind, str) else kind) if k in _READ]


def _null(text: str) -> None:
    if text.strip() not in ("null", "None"):
        raise ValueError


def _boolean(text: str) -> bool:
    if text.strip().lower() not in ("true", "false"):
        raise ValueError
    return text.strip().lower() == "true"


def _number(text: str) -> float | int:
    value = json.loads(text)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError
    return value


def _integer(text: str) -> int:
    return int(text.strip())


def _json_of(kind: type) -> Any:
    def read(text: str) -> Any:
        value = json.loads(text)
        if not isinstance(value, kind):
            raise ValueError
        return value

    return read


_READ = {
    "null": _null,
    "boolean": _boolean,
    "integer": _integer,
    "number": _number,
    "object": _json_of(dict),
    "array": _json_of(list),
    "string": str,
}
_ORDER = list(_READ)  # text last: it is what everything else fits into
