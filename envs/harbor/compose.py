"""A task's docker-compose file, where it says no more than a single container can be given.

Harbor lays such a file over its own, so tasks ship one to change a detail of their only container. What starts
a second container, or asks for what a sandbox does not give, makes the task unsupported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

COMPOSE_FILES = ("docker-compose.yaml", "docker-compose.yml", "compose.yaml", "compose.yml")
MAIN = "main"
# Harmless for one container that is built here, ended here and given a first program of ours.
HARMLESS = {
    "build", "container_name", "image", "init", "pull_policy", "restart", "stdin_open", "stop_grace_period", "tty",
}  # fmt: skip
IGNORED = ("cpus", "hostname", "mem_limit", "platform")  # a task may do without; said by name
REFERENCE = re.compile(r"\$(?!\{\w+(?::-[^}]*)?\})")  # any other than those that task.toml knows, too
WAITING = ("sleep", "tail -f /dev/null", "infinity")


class NotOneContainer(ValueError):
    """The file asks for more; the text says what."""


def compose_file(folder: Path) -> Path | None:
    return next((folder / name for name in COMPOSE_FILES if (folder / name).exists()), None)


def environment_of(path: Path) -> dict[str, str]:
    """The variables that the file gives the container `main`. Raises `NotOneContainer`."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        services: Mapping[str, Any] = content["services"]
        service: Mapping[str, Any] = services[MAIN] or {}
        service.items()
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise NotOneContainer(f"it has no service {MAIN!r} that can be read ({error})") from error
    if others := [name for name in services if name != MAIN]:
        raise NotOneContainer(f"services {', '.join(map(str, others))} besides {MAIN!r}")
    if others := [str(key) for key in content if key not in ("services", "version", "name") and content[key]]:
        raise NotOneContainer(f"{', '.join(others)} besides services")
    for key, value in service.items():
        if key == "command" and not any(word in str(value) for word in WAITING):
            raise NotOneContainer(f"services.{MAIN}.command={value!r}: sandboxes run nothing of the image's own")
        if key not in HARMLESS | {"command", "environment", *IGNORED}:
            raise NotOneContainer(f"services.{MAIN}.{key}")
        if key == "build" and not _is_plain(value):
            raise NotOneContainer(f"services.{MAIN}.build={value!r}: only the Dockerfile of the folder is built")
    return _variables(service.get("environment"))


def ignored_keys(path: Path) -> list[str]:
    """What a file that `environment_of` takes asks of its container, and does not get."""
    service = yaml.safe_load(path.read_text(encoding="utf-8"))["services"][MAIN] or {}
    return [key for key in IGNORED if key in service]


def _is_plain(build: Any) -> bool:
    if isinstance(build, str):
        build = {"context": build}
    if not isinstance(build, Mapping):
        return build is None
    plain = build.get("context", ".") in (".", "./", "${CONTEXT_DIR}") and build.keys() <= {"context", "dockerfile"}
    return plain and build.get("dockerfile", "Dockerfile") == "Dockerfile"


def _variables(given: Any) -> dict[str, str]:
    if isinstance(given, list):  # without a value it is the host's, if that lets it in
        parts = (str(entry).partition("=") for entry in given)
        given = {name: value if equals else None for name, equals, value in parts}
    if not isinstance(given, Mapping | None):
        raise NotOneContainer(f"services.{MAIN}.environment={given!r}: expected names with values, or a list of them")
    found = {}
    for name, value in (given or {}).items():
        text = f"${{{name}:-}}" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        if REFERENCE.search(text):
            raise NotOneContainer(f"services.{MAIN}.environment.{name}={text!r}: only ${{NAME}} and ${{NAME:-default}}")
        found[str(name)] = text
    return found
