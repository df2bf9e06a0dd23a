"""What a Dockerfile is built from, the same with other images, and as engines without BuildKit can read it.

Docker's API builds without BuildKit, which alone knows heredocs and cache mounts. Published Dockerfiles use
them: `for_any_engine` says the same in the older words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from errors import DataError

FROM = re.compile(
    r"(?P<before>\s*FROM\s+(?:--\S+\s+)*)(?P<image>\S+)(?P<after>(?:\s+AS\s+(?P<stage>\S+))?.*)", re.IGNORECASE
)
COPY_FROM = re.compile(r"(?P<before>\s*(?:COPY|ADD)\s+(?:--\S+\s+)*?--from=)(?P<image>\S+)(?P<after>.*)", re.IGNORECASE)
QUOTED = re.compile(r"""'[^']*'|"(?:\\.|[^"\\])*"|\\.|\\$|[^'"\\]""", re.DOTALL)  # or one character
HEREDOC = re.compile(r"\d*<<(?P<dash>-?)(?P<rest>[^<]+)")
DIRECTIVE = re.compile(r"#\s*([a-zA-Z][a-zA-Z0-9]*)\s*=\s*(.+?)\s*")
FLAGS = re.compile(r"\s*(?:ONBUILD\s+)?(?P<word>RUN|COPY|ADD)\b(?:\s+--\S+)*", re.IGNORECASE)
ARG = re.compile(r"\s*ARG\s+(.*)", re.IGNORECASE | re.DOTALL)
VARIABLE = re.compile(r"\$(?:\{(\w+)(?:(:[-+])([^}]*))?\}|(\w+))")
OPTIONAL_MOUNT = re.compile(r"\s?--mount=(?=\S*type=(?:cache|tmpfs))\S+")  # makes a build faster, and no other
SHELL = ("/bin/sh", "-c")
LONGEST_LINE = 32000  # of 65535 that the engine reads
HEREDOC_FOLDER = ".protege-heredocs"


@dataclass(frozen=True)
class Heredoc:
    """`body` as it stands, with its last newline. `start` and `end`: where its mark is in the instruction's text."""

    name: str
    quoted: bool
    dash: bool  # leading tabs do not count
    start: int
    end: int
    body: str = ""


@dataclass(frozen=True)
class Instruction:
    """An instruction of a Dockerfile: its lines as they stand, comments and heredocs among them too."""

    lines: tuple[str, ...]
    text: str  # on one line, without heredocs' bodies
    heredocs: tuple[Heredoc, ...] = ()
    number: int = 0  # of its first line

    @property
    def word(self) -> str:
        return self.text.split(maxsplit=1)[0].upper() if self.text.strip() else ""


def instructions(text: str) -> Iterator[Instruction]:
    """The file's instructions in order; comments and empty lines between them as ones without a word.

    Raises `DataError` for a heredoc without an end and an escape character that is none."""
    escape = re.escape(escape_of(text))
    goes_on = re.compile(rf"(?<!{escape}){escape}[ \t]*$")  # two of them are one that is meant
    lines = iter(list(enumerate(text.removeprefix("\ufeff").removesuffix("\n").split("\n"), 1)))
    for number, line in lines:
        line = line.rstrip("\r")
        if not line.strip() or line.lstrip().startswith("#"):
            yield Instruction((line,), "", number=number)
            continue
        whole, parts = [line], [line]
        while goes_on.search(parts[-1]) and (after := next(lines, None)) is not None:
            line = after[1].rstrip("\r")
            whole.append(line)
            if line.strip() and not line.lstrip().startswith("#"):  # else it does not end the instruction
                parts.append(line)
        joined = "".join(goes_on.sub("", part) for part in parts)
        heredocs = [_with_body(mark, lines, whole, number) for mark in heredoc_marks(joined)]
        yield Instruction(tuple(whole), joined, tuple(heredocs), number)


def escape_of(text: str) -> str:
    """What ends a line that goes on: the file may say so, in comments before all else. Raises `DataError`."""
    for line in text.removeprefix("\ufeff").split("\n"):
        found = DIRECTIVE.fullmatch(line.strip())
        if found is None:
            break
        if found[1].lower() == "escape":
            if found[2] not in ("\\", "`"):
                raise DataError(f"a Dockerfile's `# escape={found[2]}`: expected \\ or ` as the escape character")
            return found[2]
    return "\\"


def _with_body(mark: Heredoc, lines: Iterator[tuple[int, str]], whole: list[str], number: int) -> Heredoc:
    body = []
    for _, line in lines:
        whole.append(line)
        if (line.lstrip("\t") if mark.dash else line).rstrip("\r") == mark.name:
            return replace(mark, body="".join(body))
        body.append(line + "\n")
    raise DataError(f"a Dockerfile's heredoc <<{mark.name} in line {number} has no end: a line that says {mark.name}")


def heredoc_marks(text: str) -> list[Heredoc]:
    """The heredocs that an instruction on one line begins: words of RUN, COPY and ADD, of ONBUILD before them too, that
    are a mark as a whole. Not what stands in quotes, or is a list of words in JSON."""
    if (command := FLAGS.match(text)) is None or is_json(text[command.end() :]):
        return []
    marks = []
    for start, end in words(text):
        found = HEREDOC.fullmatch(text[start:end])
        if found is not None and len(words(found["rest"])) == 1:
            name = unquoted(found["rest"])
            marks.append(Heredoc(name, name != found["rest"], bool(found["dash"]), start, end))
    return marks


def is_json(arguments: str) -> bool:
    """Whether these are a list of words, which no shell reads."""
    try:
        value = json.loads(arguments)
    except ValueError:
        return False
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


def words(text: str) -> list[tuple[int, int]]:
    """Where the words of `text` begin and end, as the builder cuts it: at spaces outside of quotes. None at all if a
    quote has no end."""
    found: list[tuple[int, int]] = []
    start, at = None, 0
    while at < len(text):
        if text[at].isspace():
            if start is not None:
                found.append((start, at))
            start, at = None, at + 1
            continue
        start = at if start is None else start
        piece = QUOTED.match(text, at)
        if piece is None:
            return []
        at = piece.end()
    return found if start is None else [*found, (start, len(text))]


def unquoted(word: str) -> str:
    """A word without its quotes, and without what escapes a character."""
    pieces = []
    for piece in QUOTED.finditer(word):
        quote, inner = piece[0][0], piece[0][1:-1]
        if quote == "'":
            pieces.append(inner)
        elif quote == '"':
            pieces.append(re.sub(r'\\(["$\\])', r"\1", inner))
        else:
            pieces.append(piece[0][-1])
    return "".join(pieces)


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
            for start, end in words(said[1]):
                name, _, default = said[1][start:end].partition("=")
                known[name] = args.get(name, filled_in(unquoted(default), known))
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

    Raises `DataError` for what cannot be read, and for heredocs that have no older words: with variables to be
    filled in, or copied by ONBUILD."""
    escape = escape_of(text)
    lines: list[str] = []
    files: dict[str, str] = {}
    shell: Sequence[str] = SHELL
    for instruction in instructions(text):
        if instruction.word == "FROM":
            shell = SHELL
        elif instruction.word == "SHELL":
            shell = _shell(instruction)
        command = FLAGS.match(instruction.text)
        runs = command is not None and command["word"].upper() == "RUN"
        if runs and instruction.heredocs:
            lines.append(_run(instruction, shell, escape))
        elif instruction.heredocs:
            lines.append(_copy(instruction, files))
        else:
            lines += _without_mounts(instruction.lines) if runs else instruction.lines
    return "\n".join(lines) + "\n", files


def _shell(instruction: Instruction) -> list[str]:
    given = instruction.text.split(maxsplit=1)[1:]
    if not given or not is_json(given[0]) or not json.loads(given[0]):
        raise DataError(
            f'a Dockerfile\'s SHELL in line {instruction.number}: expected a list of words, as ["/bin/bash", "-c"], '
            f"got {''.join(given)!r:.100}"
        )
    return json.loads(given[0])


def _without_mounts(lines: Sequence[str]) -> list[str]:
    """Those of a RUN without its optional mounts, which may stand on lines of their own. What the command itself is
    given by the same name stays."""
    kept, options = [], True
    for number, line in enumerate(lines):
        rest = FLAGS.match(line) if number == 0 else re.match(r"(?:\s*--\S+)*", line)
        if options and rest is not None and not line.lstrip().startswith("#"):
            kept.append(OPTIONAL_MOUNT.sub("", rest[0]) + line[rest.end() :])
            options = line[rest.end() :].strip() in ("", "\\", "`")
        else:
            kept.append(line)
    return kept


def _run(instruction: Instruction, shell: Sequence[str], escape: str) -> str:
    flags = FLAGS.match(instruction.text)
    assert flags is not None
    command = instruction.text[flags.end() :].strip()
    only = HEREDOC.fullmatch(command)
    if only is not None and len(words(only["rest"])) == 1:
        (heredoc,) = instruction.heredocs
        script = _untabbed(heredoc)
        if script.startswith("#!"):
            program, end = script[2:].splitlines()[0].strip(), "END"
            while end in script.splitlines():
                end += "_"
            script = f"{program} /dev/stdin <<'{end}'\n{script}{end}\n"
    else:  # the shell knows heredocs, too
        bodies = "".join(f"{heredoc.body}{heredoc.name}\n" for heredoc in instruction.heredocs)
        script = f"{command}\n{bodies}"
    return f"{OPTIONAL_MOUNT.sub('', flags[0])} {_folded(json.dumps([*shell, script]), escape)}"


def _copy(instruction: Instruction, files: dict[str, str]) -> str:
    text, shift = instruction.text, 0
    where = f"a Dockerfile's heredoc in line {instruction.number}"
    if instruction.word == "ONBUILD":
        raise DataError(f"{where} is copied by ONBUILD, which needs BuildKit: copy a file")
    for heredoc in instruction.heredocs:
        if not heredoc.quoted and "$" in heredoc.body:
            raise DataError(
                f"{where}, <<{heredoc.name}, has variables to be filled in, which needs BuildKit: write "
                f"<<'{heredoc.name}' if its $ is meant as it stands, or copy a file"
            )
        if not re.fullmatch(r"[\w.-]+", heredoc.name) or heredoc.name in (".", ".."):
            raise DataError(f"{where}, <<{heredoc.name}, would be a file of that name: use letters, digits, _ . and -")
        name = f"{HEREDOC_FOLDER}/{len(files)}/{heredoc.name}"
        files[name] = _untabbed(heredoc)
        text = text[: heredoc.start + shift] + name + text[heredoc.end + shift :]
        shift += len(name) - (heredoc.end - heredoc.start)
    return text


def _untabbed(heredoc: Heredoc) -> str:
    return re.sub(r"^\t+", "", heredoc.body, flags=re.MULTILINE) if heredoc.dash else heredoc.body


def _folded(text: str, escape: str) -> str:
    """A long line on several, which the engine joins again; none of them may look like a comment or be empty."""
    parts = []
    while len(text) > LONGEST_LINE:
        cut = next(i for i in range(LONGEST_LINE, 0, -1) if text[i].isalnum() and text[i - 1].isalnum())
        parts.append(text[:cut])
        text = text[cut:]
    return f"{escape}\n".join([*parts, text])
