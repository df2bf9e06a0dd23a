"""What a model is shown of a Python function, and what the function is given of a call."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import json
import pickle
from typing import Annotated, Any, Literal, Optional

import anyio
import pytest
from pydantic import BaseModel, Field
from transformers.utils import get_json_schema

from errors import ConfigError
from tool_use import InvalidArguments, tool
from tool_use.signatures import split_docstring
from tool_use.tools import FunctionTool

pytestmark = pytest.mark.anyio


class Unit(enum.Enum):
    CELSIUS = "C"
    FAHRENHEIT = "F"


class Place(BaseModel):
    city: str = Field(description="its name")
    title: str = "Place"  # a property, not pydantic's title


class Tree(BaseModel):
    label: str
    children: list[Tree] = []


@dataclasses.dataclass
class Span:
    days: int


@tool
def forecast(
    place: Place,
    unit: Unit,
    span: Span,
    when: datetime.date,
    hours: Annotated[list[int], "which hours"],
    detail: Literal["short", "long"] = "short",
    note: Optional[str] = None,  # noqa: UP045 (both spellings must do)
    limit: int = Field(default=3, ge=1, description="at most so many"),
) -> list[str]:
    """The weather to come.

    Never wrong.
    """
    return [type(v).__name__ for v in (place, unit, span, when, hours, detail, note, limit)]


@tool
def module_level(a: int) -> int:
    return a


class Counter:
    def __init__(self) -> None:
        self.total = 0

    @tool
    def add(self, amount: int) -> int:
        """Adds."""
        self.total += amount
        return self.total

    @tool
    async def read(self) -> int:
        return self.total

    @tool
    @staticmethod
    def double(amount: int) -> int:
        return 2 * amount

    @staticmethod
    @tool
    def triple(amount: int) -> int:
        return 3 * amount

    @tool
    @classmethod
    def kind(cls, amount: int) -> str:
        return f"{cls.__name__} {amount}"


class Child(Counter):
    pass


def properties(made: FunctionTool) -> dict[str, Any]:
    return made.parameters["properties"]


# --- the schema


def test_the_schema_says_types_defaults_and_descriptions():
    assert forecast.schema == {
        "type": "function",
        "function": {
            "name": "forecast",
            "description": "The weather to come.\n\nNever wrong.",
            "parameters": {
                "type": "object",
                "properties": {
                    "place": {
                        "type": "object",
                        "properties": {
                            "city": {"type": "string", "description": "its name"},
                            "title": {"type": "string", "default": "Place"},
                        },
                        "required": ["city"],
                    },
                    "unit": {"type": "string", "enum": ["C", "F"]},
                    "span": {
                        "type": "object",
                        "properties": {"days": {"type": "integer"}},
                        "required": ["days"],
                        "additionalProperties": False,
                    },
                    "when": {"type": "string", "format": "date"},
                    "hours": {"type": "array", "items": {"type": "integer"}, "description": "which hours"},
                    "detail": {"type": "string", "enum": ["short", "long"], "default": "short"},
                    "note": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
                    "limit": {"type": "integer", "minimum": 1, "default": 3, "description": "at most so many"},
                },
                "required": ["place", "unit", "span", "when", "hours"],
            },
        },
    }
    json.dumps(forecast.schema)


def test_a_documented_function_has_the_schema_that_transformers_makes_of_it():
    def search(query: str, count: int, exact: bool, tags: list[str]) -> str:
        """
        Looks something up.

        Args:
            query: What to look for,
                in plain words.
            count: How many: at most.
            exact: Whether case matters.
            tags: Only with these.

        Returns:
            What was found.
        """
        return query

    expected = get_json_schema(search)
    expected["function"].pop("return")
    assert tool(search).schema == expected


def test_a_function_without_parameters_or_docstring():
    @tool
    def ping() -> str:
        return "pong"

    assert ping.schema["function"] == {
        "name": "ping",
        "description": "",
        "parameters": {"type": "object", "properties": {}},
    }


def test_an_annotation_wins_over_the_docstring():
    @tool
    def f(a: Annotated[int, "from the annotation"], b: Annotated[int, Field(description="from the field")], c: int):
        """Text.

        Args:
            a (int): from the docstring
            b: from the docstring
            c (int, optional): from the docstring
        """

    assert [p["description"] for p in properties(f).values()] == [
        "from the annotation",
        "from the field",
        "from the docstring",
    ]
    assert f.description == "Text."


def test_a_type_that_contains_itself_keeps_its_reference_and_others_are_written_out():
    @tool
    def plant(tree: Tree, place: Place):
        pass

    schema = plant.parameters
    assert schema["properties"]["tree"]["properties"]["children"]["items"] == {"$ref": "#/$defs/Tree"}
    assert list(schema["$defs"]) == ["Tree"]
    assert schema["properties"]["place"]["properties"]["city"]["type"] == "string"


@pytest.mark.parametrize("name", ["schema", "copy", "json", "_hidden", "model_config", "self_", "class_", "validate"])
def test_a_parameter_may_have_any_name(name: str):
    namespace: dict[str, Any] = {}
    exec(f"def f({name}: int): return {name}", namespace)
    made = tool(namespace["f"])
    assert list(properties(made)) == [name]
    assert anyio.run(made.run, {name: "3"}) == 3


def test_types_made_inside_a_function_are_found_and_those_made_later_too():
    class Local(BaseModel):
        x: int

    @tool
    def f(local: Local, later: Later) -> int:
        return local.x

    assert list(properties(f)) == ["local", "later"]


class Later(BaseModel):
    y: int


def test_a_type_that_never_comes_is_an_error_on_first_use():
    @tool
    def f(x: Nowhere):  # type: ignore[name-defined]
        pass

    with pytest.raises(ConfigError, match=r"tool 'f': an annotation cannot be read.*Nowhere"):
        _ = f.schema


@pytest.mark.parametrize(
    ("define", "reason"),
    [
        (lambda: tool(lambda *words: 0), "lambda.*expected 1 to 64 letters"),
        (lambda: tool(name="f")(lambda *words: 0), r"\*words.*no name that a model could give"),
        (lambda: tool(name="f")(lambda **options: 0), r"\*\*options"),
        (lambda: tool(name="two words")(lambda: 0), "two words.*@tool"),
        (lambda: tool(timeout_s=0)(module_level), "timeout_s=0.*above 0"),
        (lambda: tool(3), "functions and methods, got 3"),  # type: ignore[call-overload]
    ],
)
def test_what_no_model_could_call_is_refused_where_it_is_defined(define: Any, reason: str):
    with pytest.raises(ConfigError, match=reason):
        define()


def test_a_type_without_a_schema_is_refused():
    with pytest.raises(ConfigError, match=r"tool 'f'.*no JSON schema"):

        @tool
        def f(x: FunctionTool):
            pass


def test_options():
    @tool(name="other", timeout_s=None, sequential=True)
    def f():
        pass

    assert (f.name, f.timeout_s, f.sequential) == ("other", None, True)
    assert (module_level.timeout_s, module_level.sequential) == (60.0, False)


# --- arguments


GOOD = {
    "place": {"city": "Ulm"},
    "unit": "F",
    "span": {"days": "2"},
    "when": "2024-02-29",
    "hours": [1, "2"],
}


async def test_arguments_arrive_as_the_types_they_are_annotated_with():
    assert await forecast.run(GOOD) == ["Place", "Unit", "Span", "date", "list", "str", "NoneType", "int"]


async def test_what_a_model_writes_as_text_becomes_a_number_and_no_number_becomes_text():
    @tool
    def f(i: int, x: float, yes: bool) -> Any:
        return (i, x, yes)

    assert await f.run({"i": "5", "x": "1.5", "yes": "true"}) == (5, 1.5, True)

    @tool
    def g(text: str) -> Any:
        return text

    with pytest.raises(InvalidArguments, match=r"argument 'text': input should be a valid string .got 5."):
        await g.run({"text": 5})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"place": None}, "argument 'place': "),
        ({"plaec": 1}, "unknown argument 'plaec'"),
        ({"hours": [1, "x"]}, r"argument 'hours\[1\]': input should be a valid integer.*got 'x'"),
        ({"place": {}}, "missing argument 'place.city'"),
        ({"unit": "K"}, "argument 'unit': input should be 'C' or 'F' .got 'K'"),
        ({"limit": 0}, "argument 'limit': .*greater than or equal to 1"),
        ({"detail": "x" * 1000}, "got 'x{50,60}…"),
    ],
)
async def test_wrong_arguments_are_named_and_told_shortly(changes: dict[str, Any], told: str):
    with pytest.raises(InvalidArguments, match=told) as error:
        await forecast.run(GOOD | changes)
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)
    assert "Its arguments: place, unit, span, when, hours, detail (optional)" in str(error.value)


async def test_all_mistakes_are_told_at_once_but_not_a_hundred():
    with pytest.raises(
        InvalidArguments, match=r"missing argument 'place'; missing argument 'unit'.*unknown argument 'z'"
    ):
        await forecast.run({"span": {"days": 1}, "when": "2024-02-29", "hours": [], "z": 1})
    with pytest.raises(InvalidArguments, match="and 95 more"):
        await module_level.run({"a": 1} | {f"x{i}": 1 for i in range(100)})


async def test_a_default_of_a_field_is_filled_in_and_a_mutable_one_is_not_shared():
    @tool
    def f(
        a: int = Field(default=7),
        b: list[int] = Field(default_factory=list),  # noqa: B008 (as pydantic's users write it)
    ) -> Any:
        b.append(a)
        return b

    assert [await f.run({}), await f.run({}), await f.run({"a": 1, "b": [0]})] == [[7], [7], [0, 1]]


# --- functions, methods and their state


async def test_the_decorated_function_is_still_the_function():
    assert module_level(3) == 3
    assert module_level.__name__ == "module_level"
    assert Counter().add(2) == 2


async def test_state_belongs_to_the_instance():
    one, other = Counter(), Counter()
    assert [await one.add.run({"amount": 2}), await one.add.run({"amount": 3}), await other.read.run({})] == [2, 5, 0]
    assert list(properties(one.add)) == ["amount"]
    assert one.add.name == "add"


async def test_static_and_class_methods_in_either_order():
    assert await Counter.double.run({"amount": 2}) == 4
    assert await Counter().double.run({"amount": 2}) == 4
    assert await Counter().triple.run({"amount": 2}) == 6
    assert await Child.kind.run({"amount": 2}) == "Child 2"
    assert await Child().kind.run({"amount": 2}) == "Child 2"


def test_a_method_without_its_object_says_how_to_get_one():
    with pytest.raises(ConfigError, match=r"give the tool of an instance, as Counter\(\).add"):
        _ = Counter.add.schema


async def test_a_tool_that_a_class_only_keeps_still_works_on_its_own():
    class Keeper:
        kept = module_level
        tools = (module_level,)

    assert await module_level.run({"a": 1}) == await Keeper.kept.run({"a": 1}) == 1
    assert await Keeper().tools[0].run({"a": 2}) == 2


async def test_a_bound_method_can_be_made_a_tool_afterwards():
    class Plain:
        def greet(self, name: str) -> str:
            return f"hello {name}"

    assert await tool(Plain().greet).run({"name": "Ada"}) == "hello Ada"


async def test_sync_and_async_functions_run_and_a_coroutine_that_a_function_returns_is_awaited():
    async def later() -> str:
        await anyio.sleep(0)
        return "later"

    assert await tool(name="f")(lambda: later()).run({}) == "later"
    assert await tool(later).run({}) == "later"


async def test_tools_can_be_pickled_with_the_state_they_are_bound_to():
    assert pickle.loads(pickle.dumps(module_level)) is module_level
    counter = Counter()
    await counter.add.run({"amount": 4})
    copied = pickle.loads(pickle.dumps([counter.add, counter]))
    assert await copied[0].run({"amount": 1}) == 5
    assert copied[1].total == 5  # one object, not two


# --- docstrings


@pytest.mark.parametrize(
    ("doc", "text", "arguments"),
    [
        ("", "", {}),
        ("Only text: a colon.", "Only text: a colon.", {}),
        (
            "T.\n\nArgs:\n    a: one\n\n    b (int): two\n        and more: so",
            "T.",
            {"a": "one", "b": "two and more: so"},
        ),
        ("Args:\n    a: one\nReturns:\n    b: not an argument", "", {"a": "one"}),
        ("T.\n\nArguments:\n  a : one\n\nBack at the margin.", "T.\n\n\nBack at the margin.", {"a": "one"}),
        ("T.\n\nArgs:\n    **kw: rest\n    not an entry", "T.", {"kw": "rest not an entry"}),
        ("T.\n\nRaises:\n    ValueError: no\n\nArgs:\n    a:\n        below", "T.", {"a": "below"}),
    ],
)
def test_docstrings(doc: str, text: str, arguments: dict[str, str]):
    found, described = split_docstring(doc)
    assert (found.replace("\n\n\n", "\n\n"), described) == (text.replace("\n\n\n", "\n\n"), arguments)
