"""From a Python signature to what a model is shown of it, and from a model's arguments to Python values.

Pydantic does both. A signature becomes a `TypedDict`, so that parameters may have any name, arrive as
the types they are annotated with, and keep Python's own defaults.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NotRequired, get_args, get_origin, get_type_hints

import pydantic
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python
from typing_extensions import TypedDict

from errors import ConfigError
from tool_use.types import InvalidArguments

_MAX_PROBLEMS = 5


@dataclass(frozen=True)
class Signature:
    """A tool's parameters. `parameters` is their JSON schema, `description` the docstring's text."""

    name: str
    description: str
    parameters: dict[str, Any]
    _adapter: pydantic.TypeAdapter[Any]

    def typed(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments as the types they are annotated with. Raises `InvalidArguments`.

        Pydantic's lax mode: "5" is an int where an int is wanted, 5 is no str.
        """
        try:
            return self._adapter.validate_python(dict(arguments))
        except pydantic.ValidationError as error:
            raise InvalidArguments(self._told(error)) from error

    def _told(self, error: pydantic.ValidationError) -> str:
        problems = [_problem(details) for details in error.errors(include_url=False)]
        if len(problems) > _MAX_PROBLEMS:
            problems = [*problems[:_MAX_PROBLEMS], f"and {len(problems) - _MAX_PROBLEMS} more"]
        required = self.parameters.get("required", [])
        names = [n if n in required else f"{n} (optional)" for n in self.parameters["properties"]]
        return f"{self.name}: {'; '.join(problems)}. Its arguments: {', '.join(names) or 'none'}"


def read_signature(
    function: Callable[..., Any], *, name: str, skip_first: bool, namespace: Mapping[str, Any] | None = None
) -> Signature:
    """The signature of a function; `skip_first` leaves out `self`. Raises NameError for an annotation whose
    name does not exist (yet), `ConfigError` for what no JSON schema can say."""
    parameters = list(inspect.signature(function).parameters.values())[1 if skip_first else 0 :]
    hints = get_type_hints(function, localns=dict(namespace or {}), include_extras=True)
    description, documented = split_docstring(inspect.getdoc(function) or "")
    fields: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    for parameter in parameters:
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ConfigError(
                f"tool {name!r}: its parameter {str(parameter)!r} has no name that a model could give. Use plain "
                "parameters in place of *args, **kwargs and positional-only ones"
            )
        kind, notes = _annotation(hints.get(parameter.name, Any))
        if documented.get(parameter.name):
            notes.insert(0, pydantic.Field(description=documented[parameter.name]))  # what comes later wins
        if isinstance(parameter.default, FieldInfo):  # pydantic fills in its default
            notes.append(parameter.default)
        elif parameter.default is not parameter.empty:
            defaults[parameter.name] = parameter.default
        annotated: Any = Annotated[(kind, *notes)] if notes else kind  # type: ignore[valid-type]
        optional = parameter.name in defaults or any(isinstance(n, FieldInfo) and not n.is_required() for n in notes)
        fields[parameter.name] = NotRequired[annotated] if optional else annotated  # type: ignore[valid-type]
    made: Any = TypedDict(name, fields)  # type: ignore[misc]
    made.__pydantic_config__ = pydantic.ConfigDict(extra="forbid", arbitrary_types_allowed=False)
    try:
        adapter = pydantic.TypeAdapter(made)
        schema = adapter.json_schema()
    except pydantic.errors.PydanticUserError as error:  # of schemas, too
        raise ConfigError(
            f"tool {name!r}: a parameter's type has no JSON schema ({str(error).splitlines()[0]}). Use types that "
            "JSON can write: str, int, float, bool, list, dict, Literal, enums, dataclasses, pydantic models"
        ) from error
    return Signature(name, description, _tidy(schema, defaults), adapter)


def _annotation(hint: Any) -> tuple[Any, list[Any]]:
    """The type and its notes, a bare string among them as a description."""
    if get_origin(hint) is not Annotated:
        return hint, []
    kind, *notes = get_args(hint)
    return kind, [pydantic.Field(description=note) if isinstance(note, str) else note for note in notes]


# --- the schema that a model is shown


def _tidy(schema: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`$ref`s written out, since templates that list parameters show nothing behind them; kept only where
    a type contains itself. No made-up titles."""
    definitions = schema.get("$defs", {})
    kept: set[str] = set()
    properties = {name: _inline(value, definitions, (), kept) for name, value in schema["properties"].items()}
    for name, value in defaults.items():
        properties[name].setdefault("default", _json_or_text(value))
    tidy: dict[str, Any] = {"type": "object", "properties": properties}
    if schema.get("required"):
        tidy["required"] = schema["required"]
    done: dict[str, Any] = {}
    while missing := kept - done.keys():
        for name in missing:
            done[name] = _inline(definitions[name], definitions, (name,), kept)
    return tidy | ({"$defs": {name: done[name] for name in sorted(done)}} if done else {})


def _inline(node: Any, definitions: Mapping[str, Any], inside: tuple[str, ...], kept: set[str]) -> Any:
    if isinstance(node, list):
        return [_inline(item, definitions, inside, kept) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        name = node["$ref"].removeprefix("#/$defs/")
        rest = {key: value for key, value in node.items() if key != "$ref"}
        if name in inside:
            kept.add(name)
            return node
        return _inline(definitions[name], definitions, (*inside, name), kept) | rest
    out: dict[str, Any] = {}
    for key, value in node.items():
        if key == "title" and isinstance(value, str):
            continue
        if key == "properties":  # names, of which one may be "title" or "$ref"
            out[key] = {name: _inline(item, definitions, inside, kept) for name, item in value.items()}
        elif key in ("default", "const", "enum", "examples"):  # values, not schemas
            out[key] = value
        else:
            out[key] = _inline(value, definitions, inside, kept)
    return out


def _json_or_text(value: Any) -> Any:
    try:
        return to_jsonable_python(value)
    except ValueError:
        return str(value)


# --- what a docstring says

_SECTION = re.compile(r"(Args|Arguments|Parameters|Returns?|Raises|Yields|Examples?|Notes?):\s*$")
_ENTRY = re.compile(r"(\s+)\**(\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)")


def split_docstring(doc: str) -> tuple[str, dict[str, str]]:
    """The text of a docstring, without its sections, and what its `Args:` says of each parameter."""
    text: list[str] = []
    arguments: dict[str, list[str]] = {}
    section, margin, current = "", None, None
    for line in doc.splitlines():
        if (header := _SECTION.match(line)) is not None:
            section, margin, current = header[1], None, None
        elif not section:
            text.append(line)
        elif line.strip() and not line[0].isspace():  # back at the margin: the section has ended
            section = ""
            text.append(line)
        elif section in ("Args", "Arguments", "Parameters"):
            entry = _ENTRY.match(line)
            if entry is not None and (margin is None or len(entry[1]) == margin):
                margin, current = len(entry[1]), entry[2]
                arguments[current] = [entry[3]]
            elif current is not None and line.strip():
                arguments[current].append(line.strip())
    described = {name: " ".join(filter(None, parts)).strip() for name, parts in arguments.items()}
    return "\n".join(text).strip(), described


# --- what the model is told of its mistakes


def _problem(details: Any) -> str:
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in details["loc"]).lstrip(".")
    if details["type"] in ("missing", "missing_argument"):
        return f"missing argument {where!r}"
    if details["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown argument {where!r}"
    reason = details["msg"][:1].lower() + details["msg"][1:]
    return f"argument {where!r}: {reason} (got {shortened(repr(details['input']), 60)})"


def shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
