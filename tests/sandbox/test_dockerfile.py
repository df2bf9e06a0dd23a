"""What a Dockerfile is built from, and other images in their place."""

from __future__ import annotations

from sandbox.dockerfile import base_images, with_substitutes

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
