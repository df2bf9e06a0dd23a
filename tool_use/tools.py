"""`@tool`: a Python function, or a method, that a model can call."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import re
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, overload

from errors import ConfigError
from tool_use.calling import invoke
from tool_use.signatures import Signature, read_signature
from tool_use.types import DEFAULT_TIMEOUT_S

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class FunctionTool:
    """A function as a tool. Made by `@tool`; still callable as the function it was.

    A method is a tool once it is bound: `Calculator().add` is one, `Calculator.add` is not. The state is
    the instance's, and lives as long as the instance does.
    """

    def __init__(
        self,
        function: Any,
        *,
        name: str | None,
        timeout_s: float | None,
        sequential: bool,
        namespace: dict[str, Any],
    ) -> None:
        self._static, self._of_class = isinstance(function, staticmethod), isinstance(function, classmethod)
        self._function: Any = function.__func__ if self._static or self._of_class else function
        self._name = name or getattr(self._function, "__name__", type(self._function).__name__)
        self.timeout_s = timeout_s
        self.sequential = sequential
        self._is_method = self._of_class
        self._bound: tuple[Any, ...] = ()
        self._attribute = self.__qualname__ = self._name
        if not _NAME.fullmatch(self._name):
            raise ConfigError(
                f"tool name {self._name!r}: expected 1 to 64 letters, digits, '_', '-' or '.'. Give one that the "
                'models know how to write: @tool(name="…")'
            )
        if timeout_s is not None and not timeout_s > 0:
            raise ConfigError(f"tool {self._name!r}: timeout_s={timeout_s}: expected seconds above 0, or None for none")
        functools.update_wrapper(self, self._function, updated=())
        self._namespace = namespace
        self._signatures: dict[bool, Signature] = {}
        with contextlib.suppress(NameError):  # a type that is defined further down: read again on first use
            self._read(skip_first=self._looks_like_method())
            self._namespace = {}

    def __set_name__(self, owner: type, name: str) -> None:
        if self.__qualname__.rpartition(".")[0] == owner.__qualname__:  # else it is only kept there
            self._is_method = not self._static
            self._attribute = name

    def __get__(self, instance: Any, owner: type | None = None) -> FunctionTool:
        if self._static or (instance is None and not self._of_class):
            return self
        bound = object.__new__(FunctionTool)
        bound.__dict__.update(self.__dict__)
        bound._bound = (owner or type(instance) if self._of_class else instance,)
        return bound

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*self._bound, *args, **kwargs)

    def __reduce__(self) -> Any:
        if self._bound:
            return getattr, (self._bound[0], self._attribute)
        return self.__qualname__  # by name, as functions are

    def __repr__(self) -> str:
        return f"<tool {self._name}>"

    @property
    def name(self) -> str:
        return self._name

    @property
    def description(self) -> str:
        return self._signature.description

    @property
    def parameters(self) -> dict[str, Any]:
        """JSON schema of the arguments."""
        return copy.deepcopy(self._signature.parameters)

    @property
    def schema(self) -> dict[str, Any]:
        function = {"name": self._name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}

    async def run(self, arguments: dict[str, Any]) -> Any:
        """Call the function with typed arguments; in a thread unless it is async. Raises `InvalidArguments`,
        and whatever the function raises."""
        typed = self._signature.typed(arguments)
        return await invoke(functools.partial(self._function, *self._bound, **typed))

    @property
    def _signature(self) -> Signature:
        if self._is_method and not self._bound:
            raise ConfigError(
                f"tool {self.__qualname__!r} is a method without its object: give the tool of an instance, as "
                f"{self.__qualname__.rpartition('.')[0]}().{self._attribute}"
            )
        try:
            return self._read(skip_first=bool(self._bound))
        except NameError as error:
            raise ConfigError(f"tool {self._name!r}: an annotation cannot be read: {error}") from error

    def _read(self, *, skip_first: bool) -> Signature:
        if skip_first not in self._signatures:
            self._signatures[skip_first] = read_signature(
                self._function, name=self._name, skip_first=skip_first, namespace=self._namespace
            )
        return self._signatures[skip_first]

    def _looks_like_method(self) -> bool:
        first = next(iter(inspect.signature(self._function).parameters), None)
        return self._of_class or (first == "self" and not self._static)


@overload
def tool(function: Callable[..., Any], /) -> FunctionTool: ...


@overload
def tool(
    *, name: str | None = None, timeout_s: float | None = DEFAULT_TIMEOUT_S, sequential: bool = False
) -> Callable[[Callable[..., Any]], FunctionTool]: ...


def tool(
    function: Any = None,
    /,
    *,
    name: str | None = None,
    timeout_s: float | None = DEFAULT_TIMEOUT_S,
    sequential: bool = False,
) -> Any:
    """A function or method as a tool: `@tool` or `@tool(name=…, timeout_s=…, sequential=…)`.

    The model is shown the function's name, its docstring and its parameters: types from the annotations,
    descriptions from `Annotated[int, "…"]`, pydantic's `Field` or the docstring's `Args:`. It may be async;
    else it runs in a thread. It returns text, anything that JSON can write, or a `ToolResult`.

    `timeout_s` is the longest a call may take (None: for ever). `sequential`: a turn that calls this tool
    makes its calls one after another, not at once. Raises `ConfigError` for a signature that no model can use.
    """
    namespace = _names_around(sys._getframe(1))

    def make(function: Any) -> FunctionTool:
        if not callable(getattr(function, "__func__", function)):
            raise ConfigError(f"@tool is for functions and methods, got {function!r}")
        return FunctionTool(function, name=name, timeout_s=timeout_s, sequential=sequential, namespace=namespace)

    return make if function is None else make(function)


def _names_around(frame: FrameType | None) -> dict[str, Any]:
    """The local names where a tool is defined, so that string annotations may use types made in a function."""
    names: dict[str, Any] = {}
    home = frame.f_globals if frame is not None else None
    while frame is not None and frame.f_globals is home and frame.f_locals is not frame.f_globals:
        names = {**frame.f_locals, **names}
        frame = frame.f_back
    return names
