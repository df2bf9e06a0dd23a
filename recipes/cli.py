"""Turns `key=value` arguments into a config, and every mistake into one message and an exit code.

    if __name__ == "__main__":
        run_cli(main, Config, presets=preset_of_dataset)

Layers, later wins: the config's defaults, the preset chosen by the given pairs, the pairs.

Exit codes: 0 fine or `--help`, 1 a run failed (`ProtegeError`), 2 the user's mistake (`UserError`,
unknown option, wrong type), 130 Ctrl-C, 143 SIGTERM. Anything else is a bug and keeps its traceback.

`chz.entrypoint` is not used: it prints through a decorator that exits with 1 for a typo, and that
re-raises when pytest is running. Its `Blueprint` does the work below it.
"""

from __future__ import annotations

import contextlib
import difflib
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import chz
from chz.blueprint import (
    ConstructionException,
    ExtraneousBlueprintArg,
    InvalidBlueprintArg,
    MissingBlueprintArg,
)
from chz.factories import MetaFactory, MetaFromString
from chz.tiepin import CastError, type_repr
from chz.util import MISSING

from errors import ConfigError, ProtegeError, UserError
from training.signals import Interrupted, raised_at_signals

ConfigT = TypeVar("ConfigT")
Presets = Callable[[dict[str, str]], Mapping[str, Any]]
"""From the raw given pairs to the values that replace defaults, e.g. those of the chosen dataset."""


def run_cli(
    main: Callable[[ConfigT], int | None],
    config_class: type[ConfigT],
    *,
    presets: Presets | None = None,
    argv: Sequence[str] | None = None,
) -> NoReturn:
    """Parse `argv`, call `main` with the config, and exit with its code (None: 0)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if {"--help", "-h"} & set(arguments):
            print(help_text(config_class, presets, arguments))
            code = 0
        else:
            with raised_at_signals():
                code = main(parse_config(config_class, arguments, presets=presets)) or 0
    except BaseException as error:
        code = _report(error)
        if code is None:
            raise
    sys.exit(code)


def parse_config(config_class: type[ConfigT], argv: Sequence[str], *, presets: Presets | None = None) -> ConfigT:
    """The config for `argv`. Raises ConfigError for anything that the user can fix."""
    given = _pairs(argv)
    blueprint = chz.Blueprint(config_class)
    preset = {} if presets is None else dict(presets(dict(given)))
    _check_there(config_class, given)
    _check_entries(config_class, given, preset)
    blueprint.apply(preset, layer_name="preset")
    blueprint.apply_from_argv([f"{key}={value}" for key, value in given.items()])
    try:
        return blueprint.make()
    except (ConstructionException, ExtraneousBlueprintArg, InvalidBlueprintArg, MissingBlueprintArg) as error:
        raise ConfigError(_explain(str(error), config_class, given)) from error
    except (ValueError, TypeError) as error:
        # why: chz's validators and `chz.validate` methods complain with these, about given values;
        # X_ is chz's name for a field before munging, which no user knows
        raise ConfigError(re.sub(r"\bX_(?=\w)", "", str(error))) from error
    except ConfigError as error:
        raise ConfigError(_with_whole_name(str(error), config_class, given)) from error


def _pairs(argv: Sequence[str]) -> dict[str, str]:
    """`key=value` arguments as a dict. The last of equal keys wins, as a shell user expects."""
    pairs: dict[str, str] = {}
    for position, argument in enumerate(argv):
        key, equals, value = argument.partition("=")
        name = key.lstrip("-")
        if key.startswith("-") and name:
            following = argv[position + 1] if position + 1 < len(argv) else "VALUE"
            hint = f"{name}={value if equals else following}"
            raise ConfigError(f"{argument!r}: options are given without dashes. Write {hint}")
        if not equals or not name:
            raise ConfigError(f"{argument!r} is not an option: options are given as key=value")
        if key.endswith("..."):
            raise ConfigError(f"{argument!r}: a wildcard cannot end an option's name")
        pairs[key] = value
    return pairs


def _check_there(config_class: type, given: Mapping[str, str]) -> None:
    """Raises `ConfigError` for an option that the class inherits and is `without`."""
    absent = _absent(config_class)
    for key, value in given.items():
        if (name := key.partition(".")[0]) in absent:
            raise ConfigError(f"{key}={value}: {absent[name]}")


def _absent(config_class: type) -> Mapping[str, str]:
    return config_class.without() if issubclass(config_class, Narrowed) else {}


def _check_entries(config_class: type, given: Mapping[str, str], preset: Mapping[str, Any]) -> None:
    """Raises `ConfigError` unless the entries of every list are 0, 1, 2, …: chz would count up to the largest."""
    given = {key: value for key, value in given.items() if "..." not in key}  # chz's wildcards name no entry
    for name in (f"{option.name}." for option in options(config_class) if _entry_class(option.type) is not None):
        there = {key.removeprefix(name).split(".")[0] for key in (*given, *preset) if key.startswith(name)}
        for key in filter(lambda key: key.startswith(name), given):
            place, dot, rest = key.removeprefix(name).partition(".")
            if not re.fullmatch(r"0|[1-9][0-9]*", place):
                entry = rest if place.lstrip("-").isdigit() else place + dot + rest
                raise ConfigError(
                    f"{key}={given[key]}: {name[:-1]} is a list, counted from 0. Write {name}0.{entry}={given[key]}"
                )
            counted = list(map(str, range(len(there))))
            if place not in counted:
                missing = next(number for number in counted if number not in there)
                raise ConfigError(
                    f"{key}={given[key]}: {name[:-1]} is counted from 0 without gaps, and there is no {name}{missing}"
                )


# Options


@typing.runtime_checkable
class Narrowed(typing.Protocol):
    """A config class that inherits options which it has no use for. --help leaves them out, and one that is given is
    refused."""

    @staticmethod
    def without() -> Mapping[str, str]:
        """By name, what to tell who gives one."""
        ...


class ByName(MetaFactory):
    """A nested config whose class is chosen by name, as in `sampler=vllm`. Options of it, given alone, imply the
    class that has them all."""

    def __init__(self, classes: Mapping[str, type], *, implied: str) -> None:
        super().__init__()
        self.classes = classes
        self.implied = implied

    def unspecified_factory(self) -> type:
        return self.classes[self.implied]

    def from_string(self, factory: str) -> type:
        if factory not in self.classes:
            raise MetaFromString(f"expected one of {', '.join(self.classes)}")
        return self.classes[factory]

    def perform_cast(self, value: str) -> Any:
        raise CastError(value)  # a name stands for a class, which its options then make

    def name_of(self, value: Any) -> str:
        return next(name for name, option in self.classes.items() if type(value) is option)


@dataclass(frozen=True)
class Option:
    """One field of the config, nested ones with dots, those of a list's entries with `.N.`."""

    name: str
    type: Any
    default: str  # as shown by --help
    doc: str

    @property
    def expected(self) -> str:
        if typing.get_origin(self.type) is typing.Literal:
            return "one of " + ", ".join(map(str, typing.get_args(self.type)))
        if _entry_class(self.type) is not None:
            return f"a list: {self.name}.0.OPTION=VALUE, {self.name}.1.OPTION=VALUE, …"
        return type_repr(self.type)


def options(config_class: type, prefix: str = "", instance: Any = None) -> Iterator[Option]:
    """Every option of a chz class, depth first, in order of declaration, but those that it says to be `without`.

    `instance` is the default that a config gives for this nested class, if it gives one."""
    absent = _absent(config_class)
    for name, field in chz.chz_fields(config_class).items():
        if name in absent:
            continue
        value: Any = "(required)"
        if instance is not None:
            value = getattr(instance, name)
        elif field._default is not MISSING:
            value = field._default
        elif field._default_factory is not MISSING:
            value = typing.cast(Callable[[], Any], field._default_factory)()
        nested, kind = _nested_class(field.x_type), field.x_type
        if isinstance(field.meta_factory, ByName):
            nested, kind = field.meta_factory.unspecified_factory(), typing.Literal[tuple(field.meta_factory.classes)]
            value = value if isinstance(value, str) else field.meta_factory.name_of(value)
        yield Option(prefix + name, kind, "''" if value == "" else str(value), field._doc)
        if nested is not None:
            yield from options(nested, f"{prefix}{name}.", value if isinstance(value, nested) else None)
        if (entry := _entry_class(field.x_type)) is not None:
            yield from options(entry, f"{prefix}{name}.N.")


def _nested_class(annotation: Any) -> type | None:
    """The chz class that an annotation holds, alone or as `Class | None`."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    members = typing.get_args(annotation) if is_union else (annotation,)
    nested = [member for member in members if isinstance(member, type) and chz.is_chz(member)]
    return nested[0] if len(nested) == 1 else None


def _entry_class(annotation: Any) -> type | None:
    """The chz class of a list's entries: that of `tuple[Class, ...]`."""
    members = typing.get_args(annotation)
    if typing.get_origin(annotation) is tuple and members[1:] == (...,) and chz.is_chz(members[0]):
        return members[0]
    return None


def _of_any_entry(name: str) -> str:
    """`datasets.0.teacher` as `--help` lists it: `datasets.N.teacher`."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "N", name)


def help_text(config_class: type, presets: Presets | None = None, argv: Sequence[str] = ()) -> str:
    """Every option with its type, default and doc. A given preset's values replace the defaults."""
    preset: Mapping[str, Any] = {}
    if presets is not None:
        try:
            preset = presets(_pairs([argument for argument in argv if argument not in ("--help", "-h")]))
        except UserError:
            preset = {}  # why: help must come out, above all for somebody who typed a wrong option
    module = getattr(sys.modules.get("__main__"), "__spec__", None)
    lines = [f"python -m {module.name if module else 'recipes.NAME'} key=value ...", ""]
    if config_class.__doc__:
        lines += [textwrap.dedent(config_class.__doc__).strip(), ""]
    lines.append("Options:")
    for option in options(config_class):
        chosen = [str(value) for key, value in preset.items() if _of_any_entry(key) == option.name]
        value = f"={', '.join(chosen)} (preset)" if chosen else f"={option.default}"
        if (_nested_class(option.type) is not None or _entry_class(option.type) is not None) and not chosen:
            value = ".*"
        lines.append(f"  {option.name}{value}  ({option.expected})")
        if option.doc:
            lines += textwrap.wrap(option.doc, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


# chz's messages, in the user's words


def _explain(message: str, config_class: type, given: Mapping[str, str]) -> str:
    """chz's message about a bad pair, as: what was given, what was expected, the way out."""
    known = {option.name: option for option in options(config_class)}
    if found := re.match(r"Extraneous argument '(.+)' to Blueprint", message):
        parent = found[1].rpartition(".")[0]
        if found[1] in known and parent in given:
            return f"{found[1]}={given[found[1]]}: {parent}={given[parent]} has no such option; leave one of them out"
        return _explain_unknown(found[1], known)
    if found := re.match(r"Missing required arguments for parameter\(s\): (.+)", message):
        names = {name: known.get(_of_any_entry(name)) for name in found[1].split(", ")}
        missing = "\n".join(f"  {name}=  ({option.expected})" for name, option in names.items() if option)
        return f"missing: {found[1]}\n{missing}\n--help lists every option"
    # why: chz names the parameter in one of its two messages about a failed cast, only the value in the other
    named = re.match(r"Could not interpret argument .* provided for param '(.+)'\.\.\.", message)
    value_only = re.match(r"Could not cast '(.*)' to ", message)
    name = named[1] if named else None
    if value_only:
        name = next((key for key, value in given.items() if value == value_only[1]), None)
    if name is not None and (general := _of_any_entry(name)).endswith(".N"):
        return f"{name}={given.get(name, '')}: expected {name}.OPTION=VALUE; --help lists {general}'s options"
    option = None if name is None else known.get(_of_any_entry(name))
    if name is not None and option is not None:
        reason = re.search(r"as a value:\n(.*?)(?:\n\n- Failed|\Z)", message, re.DOTALL)
        why = reason[1] if reason and not reason[1].startswith("Could not cast") else ""
        return f"{name}={given.get(name, '')}: expected {option.expected}" + (f" ({why})" if why else "")
    return message


def _with_whole_name(message: str, config_class: type, given: Mapping[str, str]) -> str:
    """A nested config's message that begins with its own option, `url=…`, from the top: `teacher.url=…`."""
    first = re.match(r"\w+(?=[= ])", message)
    if first is None or first[0] in chz.chz_fields(config_class):
        return message
    named = [name for name in given if name.rpartition(".")[2] == first[0]]
    if len(named) > 1:
        named = [name for name in named if message.startswith(f"{first[0]}={given[name]}")]
    return named[0].removesuffix(first[0]) + message if len(named) == 1 else message


def _explain_unknown(key: str, known: Mapping[str, Option]) -> str:
    by_leaf: dict[str, str] = {}
    for name in known:
        by_leaf.setdefault(name.rpartition(".")[2], name)
    numbers = iter(re.findall(r"\.(\d+)(?=\.|$)", key))
    sought = _of_any_entry(key)
    leaf = sought.rpartition(".")[2]
    near = [by_leaf[leaf]] if leaf in by_leaf else difflib.get_close_matches(sought, known, n=1, cutoff=0.6)
    # why: `lora_rank` where `model.lora_rank` is meant, and the reverse, are far apart as strings
    near = near or [by_leaf[leaf] for leaf in difflib.get_close_matches(leaf, by_leaf, n=1)]
    guess = re.sub(r"(?<=\.)N(?=\.)", lambda _: next(numbers, "0"), near[0]) if near else None
    hint = f" Did you mean {guess}?" if guess else ""
    return f"unknown option {key}.{hint}\n--help lists every option"


def _report(error: BaseException) -> int | None:
    """Print an expected error to stderr and return its exit code; None for a bug."""
    leaves = _leaves(error)
    for leaf in leaves:
        if isinstance(leaf, KeyboardInterrupt):
            with contextlib.suppress(OSError):  # of `2>&1 | tee log`, which had the same Ctrl-C
                print("interrupted", file=sys.stderr)
            return leaf.exit_code if isinstance(leaf, Interrupted) else 130
    if not all(isinstance(leaf, ProtegeError) for leaf in leaves):
        return None
    for text in dict.fromkeys(str(leaf) for leaf in leaves):
        # why: not rich, which breaks long lines, and with them the paths that a user copies
        print(f"error: {text}", file=sys.stderr)
    return 2 if any(isinstance(leaf, UserError) for leaf in leaves) else 1


def _leaves(error: BaseException) -> list[BaseException]:
    """The errors inside nested exception groups, which is how task groups raise them."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for member in error.exceptions for leaf in _leaves(member)]
    return [error]
