"""What a Dockerfile is built from, and other images in their place."""

from __future__ import annotations

import json

import pytest

from errors import DataError
from sandbox.dockerfile import base_images, for_any_engine, heredoc_marks, instructions, with_substitutes

STAGES = """# syntax=docker/dockerfile:1
# FROM comment
ARG V=1
FROM --platform=linux/amd64 python:3.12-slim AS Builder
RUN echo \\
  # a comment in between
  FROM continued
COPY <<END /x
FROM heredoc
END
from builder
COPY --chown=1:1 --from=ghcr.io/astral-sh/uv:latest /uv /bin/
COPY --from=builder /a /b
COPY --from=0 /a /b
FROM scratch
FROM ubuntu
"""


def test_stages_comments_and_continued_lines_are_no_images():
    assert base_images(STAGES) == ["python:3.12-slim", "ghcr.io/astral-sh/uv:latest", "ubuntu"]


def test_only_images_are_substituted():
    others = {"python:3.12-slim": "local", "ubuntu:latest": "mine:1", "builder": "no", "0": "no"}
    text = with_substitutes(STAGES, others)
    assert base_images(text) == ["local", "ghcr.io/astral-sh/uv:latest", "mine:1"]
    changed = [(a, b) for a, b in zip(STAGES.splitlines(), text.splitlines(), strict=True) if a != b]
    assert changed == [
        ("FROM --platform=linux/amd64 python:3.12-slim AS Builder", "FROM --platform=linux/amd64 local AS Builder"),
        ("FROM ubuntu", "FROM mine:1"),
    ]


def test_a_tag_that_is_not_latest_is_another_image():
    assert with_substitutes("FROM ubuntu:24.04\n", {"ubuntu": "mine"}) == "FROM ubuntu:24.04\n"


def test_arguments_of_the_build_name_images():
    text = "ARG BASE=local-py AS=3\nARG TAG\nFROM ${BASE}:${TAG:-$AS} AS one\nFROM one\nARG BASE=later\nFROM $BASE\n"
    assert base_images(text) == ["local-py:3", "local-py"]
    assert base_images(text, {"BASE": "mine", "TAG": "9"}) == ["mine:9", "mine"]
    changed = with_substitutes(text, {"local-py:3": "protege-base"})
    assert "FROM protege-base AS one\nFROM one\n" in changed and "FROM $BASE\n" in changed


def test_what_only_buildkit_reads_is_said_in_older_words():
    text = (
        "FROM a\nRUN --mount=type=cache,target=/root/.cache --network=none pip install x\n"
        "RUN bash -s one <<'EOF' && echo done\nset -e\ncat <<X\n# no comment\nX\nEOF\nUSER me\n"
        'SHELL ["/bin/bash", "-ec"]\nRUN <<-A\n\techo "$HOME"\n\tA\nRUN <<B\n#!/usr/bin/env python3\nprint(1)\nB\n'
        "COPY --chown=me <<one <<'two' more /to/\n1\none\n$2\ntwo\nRUN cat <<< word $((1<<X))\n"
    )
    new, files = for_any_engine(text)
    lines = new.splitlines()
    assert lines[1] == "RUN --network=none pip install x"
    script = "bash -s one <<'EOF' && echo done\nset -e\ncat <<X\n# no comment\nX\nEOF\n"
    assert json.loads(lines[2].removeprefix("RUN ")) == ["/bin/sh", "-c", script]
    assert json.loads(lines[5].removeprefix("RUN ")) == ["/bin/bash", "-ec", 'echo "$HOME"\n']
    assert json.loads(lines[6].removeprefix("RUN "))[2].startswith("/usr/bin/env python3 /dev/stdin <<'END'\n#!/usr/")
    assert lines[7] == "COPY --chown=me .protege-heredocs/0/one .protege-heredocs/1/two more /to/"
    assert files == {".protege-heredocs/0/one": "1\n", ".protege-heredocs/1/two": "$2\n"}
    assert lines[8] == "RUN cat <<< word $((1<<X))" and len(lines) == 9
    assert for_any_engine(new) == (new, {})


def test_a_long_heredoc_is_folded_into_lines_that_the_engine_reads_and_joins():
    body = "".join(f"# line {i}  \n\n" for i in range(20000))
    new, _ = for_any_engine(f"FROM a\nRUN cat <<'E' > /x\n{body}E\n")
    lines = new.splitlines()[1:]
    assert len(lines) > 5 and max(map(len, lines)) < 65535
    assert not any(line.lstrip().startswith("#") or not line.strip() for line in lines)
    joined = "".join(line.removesuffix("\\") if i < len(lines) - 1 else line for i, line in enumerate(lines))
    assert json.loads(joined.removeprefix("RUN "))[2] == f"cat <<'E' > /x\n{body}E\n"


def test_a_heredoc_with_variables_to_fill_in_is_refused():
    with pytest.raises(DataError, match=r"write <<'X'"):
        for_any_engine("FROM a\nCOPY <<X /x\n$HOME\nX\n")


# What Docker's own builder takes for a heredoc: a word of RUN, COPY or ADD that is one as a whole, when the line is cut
# into words as it cuts them (moby/buildkit, frontend/dockerfile/parser).


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("RUN <<EOF", ["EOF"]),
        ("run <<eof", ["eof"]),
        ("RUN <<-EOF", ["EOF"]),
        ("RUN <<'EOF'", ["EOF"]),
        ('RUN <<-"EOF"', ["EOF"]),
        ("RUN <<E'O'F", ["EOF"]),
        ("RUN <<\\EOF", ["EOF"]),
        ("RUN 3<<EOF cat <&3", ["EOF"]),
        ("RUN <<EOF cat > /a && <<TWO cat", ["EOF", "TWO"]),
        ("RUN --mount=type=cache,target=/x <<EOF", ["EOF"]),
        ("COPY --chown=a:b <<one <<'two' /to/", ["one", "two"]),
        ("ADD <<f /f", ["f"]),
        ("ONBUILD RUN <<EOF", ["EOF"]),
        ("RUN [ -f x ] && cat <<EOF", ["EOF"]),
        ("RUN <<EOF;", ["EOF;"]),  # so it is, though no shell would say so
        ('RUN echo "a <<EOF b"', []),
        ("RUN python -c 'print(1<<SHIFT)'", []),
        ("RUN python -c 'x = 1 <<SHIFT'", []),
        ('RUN echo "it\\"s <<EOF"', []),
        ("RUN echo \\<<EOF", []),
        ("RUN cat <<<word", []),
        ("RUN cat <<< word", []),
        ("RUN cat << EOF", []),
        ("RUN cat<<EOF", []),
        ("RUN echo $((1<<X)) $((1 <<2<<3))", []),
        ("RUN echo it's <<EOF", []),  # a quote without an end: the builder finds no words at all
        ('RUN ["cat", "<<EOF"]', []),
        ('RUN --network=none ["cat", "<<EOF"]', []),
        ("CMD cat <<EOF", []),
        ("HEALTHCHECK CMD cat <<EOF", []),
        ("HEALTHCHECK --interval=5s CMD cat <<EOF", []),
        ("ENV A <<EOF", []),
        ("ONBUILD CMD <<EOF", []),
        ("RUNNING <<EOF", []),
    ],
)
def test_what_a_heredoc_is(line: str, names: list[str]):
    assert [mark.name for mark in heredoc_marks(line)] == names


def read(text: str) -> list[tuple[str, list[str]]]:
    return [(i.text, [heredoc.body for heredoc in i.heredocs]) for i in instructions(text) if i.word]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("RUN a \\\n  b\nRUN c", [("RUN a   b", []), ("RUN c", [])]),
        ("RUN a \\  \t\n  b", [("RUN a   b", [])]),
        ("RUN a\\\nb", [("RUN ab", [])]),
        ("RUN a \\\n# no \\\n\n   # neither\n  b", [("RUN a   b", [])]),
        ("RUN a \\\\\nRUN b", [("RUN a \\\\", []), ("RUN b", [])]),
        ("RUN a \\\n\\\nb", [("RUN a b", [])]),
        ("# escape=`\nRUN a `\n b\\\nRUN c", [("RUN a  b\\", []), ("RUN c", [])]),
        ("# syntax=docker/dockerfile:1\n#Escape = `\nRUN a `\n b", [("RUN a  b", [])]),
        ("# a comment\n# escape=`\nRUN a `\nRUN b", [("RUN a `", []), ("RUN b", [])]),
        ("\n# escape=`\nRUN a `\nRUN b", [("RUN a `", []), ("RUN b", [])]),
        ("\ufeff# escape=`\r\nRUN a `\r\n b\r\n", [("RUN a  b", [])]),
        ("RUN <<A \\\n cat <<B\n1\nA\n2\n\nB\nRUN c", [("RUN <<A  cat <<B", ["1\n", "2\n\n"]), ("RUN c", [])]),
        ("RUN <<-A\n\t1\n A\n\t\tA\nRUN c", [("RUN <<-A", ["\t1\n A\n"]), ("RUN c", [])]),
        ("RUN <<A\n# no comment\nx \\\n\tA\nA", [("RUN <<A", ["# no comment\nx \\\n\tA\n"])]),
        ("RUN <<A\nb\x0cA\nA", [("RUN <<A", ["b\x0cA\n"])]),
        ("RUN <<A\r\nx\r\nA\r\nRUN c", [("RUN <<A", ["x\r\n"]), ("RUN c", [])]),
        ("COPY <<A <<B /\n1\nA\n2\nB", [("COPY <<A <<B /", ["1\n", "2\n"])]),
        ("RUN a \\", [("RUN a ", [])]),
    ],
)
def test_how_lines_are_read(text: str, expected: list):
    assert read(text) == expected


@pytest.mark.parametrize(
    ("line", "script"),
    [
        ("RUN <<A <<B\n1\nA\n2\nB", "<<A <<B\n1\nA\n2\nB\n"),
        ("RUN <<A cat > /x && <<-B cat\n1\nA\n\t2\n\tB", "<<A cat > /x && <<-B cat\n1\nA\n\t2\nB\n"),
        ("RUN 3<<A cat <&3\n1\nA", "3<<A cat <&3\n1\nA\n"),
        ("RUN \\\n  <<A\n1\nA", "1\n"),
        ("RUN <<'A'\n$x\nA", "$x\n"),
        ("ONBUILD RUN <<A\n1\nA", "1\n"),
        ("RUN <<A\n#!/bin/sh -e\nEND\nA", "/bin/sh -e /dev/stdin <<'END_'\n#!/bin/sh -e\nEND\nEND_\n"),
    ],
)
def test_what_the_shell_is_given(line: str, script: str):
    new, files = for_any_engine(f"FROM a\n{line}\nUSER x\n")
    (_, run, user) = new.splitlines()
    word, _, given = run.partition(" [")
    assert word in ("RUN", "ONBUILD RUN") and user == "USER x" and not files
    assert json.loads("[" + given) == ["/bin/sh", "-c", script]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("RUN --mount=type=cache,target=/x cmd --mount=type=cache,a b", "RUN cmd --mount=type=cache,a b"),
        ("RUN --mount=target=/x,type=tmpfs --mount=type=bind,from=y c", "RUN --mount=type=bind,from=y c"),
        (
            "RUN --mount=type=cache,target=/x \\\n  # why\n  --mount=type=cache,target=/y \\\n  c \\\n"
            " --mount=type=cache,z",
            "RUN \\\n  # why\n  \\\n  c \\\n --mount=type=cache,z",
        ),
        ("ONBUILD RUN --mount=type=cache,target=/x c", "ONBUILD RUN c"),
        ("CMD x --mount=type=cache,y", "CMD x --mount=type=cache,y"),
    ],
)
def test_optional_mounts_are_left_out_of_options_alone(before: str, after: str):
    new, _ = for_any_engine(before)
    assert [line.rstrip() for line in new.splitlines()] == [line.rstrip() for line in after.splitlines()]


def test_a_folded_line_is_joined_by_the_files_own_escape_character():
    new, _ = for_any_engine("# escape=`\nFROM a\nRUN <<E\n" + "echo word; " * 5000 + "\nE\n")
    assert new.count("`\n") >= 1 and "\\\n" not in new
    (_, run) = read(new)
    assert json.loads(run[0].removeprefix("RUN "))[2] == "echo word; " * 5000 + "\n"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("RUN a\nRUN <<A\nx\n A\n", "heredoc <<A in line 2 has no end"),
        ("# escape=x\nRUN a", "`# escape=x`: expected"),
        (
            "FROM a\nSHELL /bin/bash -c",
            """SHELL in line 2: expected a list of words, as ["/bin/bash", "-c"], got '/bin/bash -c'""",
        ),
        ("FROM a\nSHELL", "got ''"),
        ("FROM a\nSHELL []", "SHELL in line 2"),
        ("COPY <<X /x\n$HOME\nX", "heredoc in line 1, <<X, has variables"),
        ('COPY <<"a b" /x\nX\na b', "would be a file of that name"),
        ("COPY <<.. /x/\nX\n..", "would be a file of that name"),
        ("ONBUILD COPY <<X /x\n1\nX", "copied by ONBUILD"),
    ],
)
def test_what_cannot_be_built_here_is_said_with_its_line(text: str, part: str):
    with pytest.raises(DataError) as error:
        for_any_engine(text)
    assert part in str(error.value)
