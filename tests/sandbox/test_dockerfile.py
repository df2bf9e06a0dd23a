"""What a Dockerfile is built from, and other images in their place."""

from __future__ import annotations

import json

import pytest

from errors import DataError
from sandbox.dockerfile import base_images, for_any_engine, with_substitutes

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
    assert json.loads(lines[6].removeprefix("RUN "))[2].startswith("/usr/bin/env python3 /dev/stdin <<'B'\n#!/usr/")
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
