"""What a Dockerfile is built from, and the same file with other images in their place."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

FROM = re.compile(
    r"(?P<before>\s*FROM\s+(?:--\S+\s+)*)(?P<image>\S+)(?P<after>(?:\s+AS\s+(?P<stage>\S+))?.*)", re.IGNORECASE
)
COPY_FROM = re.compile(r"(?P<before>\s*(?:COPY|ADD)\s+(?:--\S+\s+)*?--from=)(?P<image>\S+)(?P<after>.*)", re.IGNORECASE)
HEREDOC = re.compile(r"<<-?\s*[\"']?([A-Za-z_]\w*)[\"']?")


def instruction_lines(text: str) -> Iterator[tuple[bool, str]]:
    """Each line, and whether an instruction begins there: not a comment, nor inside of another instruction."""
    continued, heredocs = False, []
    for line in text.splitlines():
        if heredocs:
            yield False, line
            if line.strip() == heredocs[0]:
                heredocs.pop(0)
            continue
        comment = line.lstrip().startswith("#")
        yield not continued and not comment, line
        if not comment:  # a comment between continued lines does not end them
            if re.match(r"\s*(RUN|COPY|ADD)\b", line, re.IGNORECASE) or continued:
                heredocs = HEREDOC.findall(line)
            continued = line.rstrip().endswith("\\")


def base_images(text: str) -> list[str]:
    """The images that a build takes from outside, stages of its own left out."""
    stages: set[str] = set()
    images: list[str] = []
    for begins, line in instruction_lines(text):
        if not begins:
            continue
        if found := FROM.match(line):
            if found["image"].lower() not in stages:
                images.append(found["image"])
            if found["stage"]:
                stages.add(found["stage"].lower())
        elif (found := COPY_FROM.match(line)) and not (found["image"].isdigit() or found["image"].lower() in stages):
            images.append(found["image"])
    return [image for image in dict.fromkeys(images) if image.lower() != "scratch"]


def with_substitutes(text: str, substitutes: Mapping[str, str]) -> str:
    """`text` with every base image that `substitutes` names replaced; `name` and `name:latest` are one."""
    outside = {image: substitute(image, substitutes) for image in base_images(text)}
    lines = []
    for begins, line in instruction_lines(text):
        found = (FROM.match(line) or COPY_FROM.match(line)) if begins else None
        if found and found["image"] in outside:
            line = f"{found['before']}{outside[found['image']]}{found['after']}"
        lines.append(line)
    return "\n".join(lines) + "\n"


def substitute(image: str, substitutes: Mapping[str, str]) -> str:
    bare = image.removesuffix(":latest")
    return substitutes.get(image) or substitutes.get(bare) or substitutes.get(f"{bare}:latest") or image
