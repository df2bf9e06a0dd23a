"""What a Dockerfile is built from, the same with other images, and as engines without BuildKit can read it.

Docker's API builds without BuildKit, which alone knows heredocs and cache mounts. Published Dockerfiles use
them: `for_any_engine` says the same in the older words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from errors import DataError

FROM = re.compile(
    r"(?P<before>\s*FROM\s+(?:--\S+\s+)*)(?P<image>\S+)(?P<after>(?:\s+AS\s+(?P<stage>\S+))?.*)", re.IGNORECASE
)
COPY_FROM = re.compile(r"(?P<before>\s*(?:COPY|ADD)\s+(?:--\S+\s+)*?--from=)(?P<image>\S+)(?P<after>.*)", re.IGNORECASE)
HEREDOC = re.compile(r"(?<!\S)\d*<<(?P<dash>-?)(?P<quote>[\"']?)(?P<name>[A-Za-z_]\w*)(?P=quote)")
TAKES_HEREDOCS = re.compile(r"\s*(RUN|COPY|ADD)\s+(?:--\S+\s+)*(?!\[)", re.IGNORECASE)  # not a JSON list of words
ARG = re.compile(r"\s*ARG\s+(.*)", re.IGNORECASE | re.DOTALL)
VARIABLE = re.compile(r"\$(?:\{(\w+)(?:(:[-+])([^}]*))?\}|(\w+))")
OPTIONAL_MOUNT = re.compile(r"--mount=(?=\S*type=(?:cache|tmpfs))\S+\s+")  # makes a build faster, and no other
SHELL = ("/bin/sh", "-c")
LONGEST_LINE = 32000  # of 65535 that the engine reads
HEREDOC_FOLDER = ".protege-heredocs"


@dataclass(frozen=True)
class Heredoc:
    """`body` as it stands, with its last newline."""

    name: str
    quoted: bool
    dash: bool  # leading tabs do not count
    body: str


@dataclass(frozen=True)
class Instruction:
    """An instruction of a Dockerfile: its lines as they stand, comments and heredocs among them too."""

    lines: tuple[str, ...]
    text: str  # on one line, without heredocs' bodies
    heredocs: tuple[Heredoc, ...] = ()

    @property
    def word(self) -> str:
        return self.text.split(maxsplit=1)[0].upper() if self.text.strip() else ""


def instructions(text: str) -> Iterator[Instruction]:
    """The file's instructions in order; comments and empty lines between them as ones without a word."""
    lines = iter(text.splitlines())
    for line in lines:
        if not line.strip() or line.lstrip().startswith("#"):
            yield Instruction((line,), "")
            continue
        whole, parts = [line], [line]
        while parts[-1].rstrip().endswith("\\") and (line := next(lines, None)) is not None:
            whole.append(line)
            if line.strip() and not line.lstrip().startswith("#"):  # else it does not end the instruction
                parts.append(line)
        joined = " ".join(part.rstrip().removesuffix("\\") for part in parts)
        found = list(HEREDOC.finditer(joined)) if TAKES_HEREDOCS.match(joined) else []
        heredocs = []
        for mark in found:
            body = []
            for line in lines:
                whole.append(line)
                if (line.lstrip("\t") if mark["dash"] else line) == mark["name"]:
                    break
                body.append(line + "\n")
            heredocs.append(Heredoc(mark["name"], bool(mark["quote"]), bool(mark["dash"]), "".join(body)))
        yield Instruction(tuple(whole), joined, tuple(heredocs))


# --- images


def base_images(text: str, args: Mapping[str, str] | None = None) -> list[str]:
    """The images that a build with these arguments takes from outside, stages of its own left out."""
    return list(dict.fromkeys(image for _, _, image in _outside(text, args or {})))


def with_substitutes(text: str, substitutes: Mapping[str, str], args: Mapping[str, str] | None = None) -> str:
    """`text` with every base image that `substitutes` names replaced; `name` and `name:latest` are one."""
    instead: dict[int, str] = {}
    for number, found, image in _outside(text, args or {}):
        if (other := substitute(image, substitutes)) != image:
            instead[number] = f"{found['before']}{other}{found['after']}"
    lines: list[str] = []
    for number, instruction in enumerate(instructions(text)):
        lines += [instead[number]] if number in instead else instruction.lines
    return "\n".join(lines) + "\n"


def _outside(text: str, args: Mapping[str, str]) -> Iterator[tuple[int, re.Match[str], str]]:
    """Number of the instruction, how it matched, and its image with arguments filled in."""
    stages: set[str] = set()
    known: dict[str, str] = {}
    begun = False
    for number, instruction in enumerate(instructions(text)):
        if (said := ARG.match(instruction.text)) and not begun:
            for declared in said[1].split():
                name, _, default = declared.partition("=")
                known[name] = args.get(name, filled_in(default.strip("\"'"), known))
        elif found := FROM.match(instruction.text):
            begun = True
            image = filled_in(found["image"], known)
            if image.lower() not in stages and image.lower() != "scratch":
                yield number, found, image
            if found["stage"]:
                stages.add(found["stage"].lower())
        elif found := COPY_FROM.match(instruction.text):
            image = filled_in(found["image"], known)
            if not (image.isdigit() or image.lower() in stages):
                yield number, found, image


def filled_in(text: str, values: Mapping[str, str]) -> str:
    """`$NAME`, `${NAME}`, `${NAME:-default}` and `${NAME:+other}` as a build fills them in."""

    def value(found: re.Match[str]) -> str:
        set_to = values.get(found[1] or found[4], "")
        other = filled_in(found[3] or "", values)
        if found[2] == ":-":
            return set_to or other
        return (other if set_to else "") if found[2] == ":+" else set_to

    return VARIABLE.sub(value, text)


def substitute(image: str, substitutes: Mapping[str, str]) -> str:
    bare = image.removesuffix(":latest")
    return substitutes.get(image) or substitutes.get(bare) or substitutes.get(f"{bare}:latest") or image


# --- without BuildKit


def for_any_engine(text: str) -> tuple[str, dict[str, str]]:
    """The same Dockerfile without heredocs and cache mounts, and files that its context needs besides.

    Raises `DataError` for a heredoc that would have to be filled in with variables."""
    lines: list[str] = []
    files: dict[str, str] = {}
    shell: Sequence[str] = SHELL
    for instruction in instructions(text):
        if instruction.word == "FROM":
            shell = SHELL
        elif instruction.word == "SHELL":
            shell = json.loads(instruction.text.split(maxsplit=1)[1])
        if instruction.word == "RUN" and instruction.heredocs:
            lines.append(_run(instruction, shell))
        elif instruction.heredocs:
            lines.append(_copy(instruction, files))
        elif instruction.word == "RUN":
            lines += [OPTIONAL_MOUNT.sub("", line) for line in instruction.lines]
        else:
            lines += instruction.lines
    return "\n".join(lines) + "\n", files


def _run(instruction: Instruction, shell: Sequence[str]) -> str:
    command = OPTIONAL_MOUNT.sub("", instruction.text).split(maxsplit=1)[1]
    options = re.match(r"(?:--\S+\s+)*", command)
    assert options is not None
    command = command[options.end() :]
    if HEREDOC.sub("", command).strip():  # a program that reads them: the shell knows heredocs, too
        bodies = "".join(f"{heredoc.body}{heredoc.name}\n" for heredoc in instruction.heredocs)
        script = f"{command}\n{bodies}"
    else:
        (heredoc,) = instruction.heredocs
        script = _untabbed(heredoc)
        if script.startswith("#!"):
            program = script[2:].splitlines()[0].strip()
            script = f"{program} /dev/stdin <<'{heredoc.name}'\n{script}{heredoc.name}\n"
    return f"RUN {options[0]}{_folded(json.dumps([*shell, script]))}"


def _copy(instruction: Instruction, files: dict[str, str]) -> str:
    text = instruction.text
    for heredoc in instruction.heredocs:
        if not heredoc.quoted and "$" in heredoc.body:
            raise DataError(
                f"a Dockerfile's heredoc <<{heredoc.name} has variables to be filled in, which needs BuildKit: write "
                f"<<'{heredoc.name}' if its $ is meant as it stands, or copy a file"
            )
        name = f"{HEREDOC_FOLDER}/{len(files)}/{heredoc.name}"
        files[name] = _untabbed(heredoc)
        text = HEREDOC.sub(lambda _, name=name: name, text, count=1)
    return text


def _untabbed(heredoc: Heredoc) -> str:
    return re.sub(r"^\t+", "", heredoc.body, flags=re.MULTILINE) if heredoc.dash else heredoc.body


def _folded(text: str) -> str:
    """A long line on several, which the engine joins again; none of them may look like a comment or be empty."""
    parts = []
    while len(text) > LONGEST_LINE:
        cut = next(i for i in range(LONGEST_LINE, 0, -1) if text[i].isalnum() and text[i - 1].isalnum())
        parts.append(text[:cut])
        text = text[cut:]
    return "\\\n".join([*parts, text])
