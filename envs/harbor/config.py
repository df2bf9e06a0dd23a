"""`task.toml` as the versions of Harbor's format in use write it, checked field by field.

Keys that no version knows are kept aside and named, not refused: authors add their own. Old spellings
(`version`, `memory = "2G"`, `allow_internet`) mean what they meant.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from errors import DataError

NetworkMode = Literal["public", "no-network", "allowlist"]


class Table(BaseModel):
    """One table of the file."""

    model_config = ConfigDict(extra="allow")


def _number_as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]
User = Annotated[Text, BeforeValidator(_number_as_text)]
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Variables = dict[VariableName, Annotated[str, BeforeValidator(_number_as_text)]]


def megabytes(value: Any) -> Any:
    """`"2G"`, `"512M"`, `"1.5Gi"` as a number of mebibytes; anything else as it is, for pydantic to judge."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])(?:i?B)?\s*", value, re.IGNORECASE)
    if not found:
        raise ValueError("expected a size such as '2G' or '512M'")
    return float(found[1]) * {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2}[found[2].upper()]


Size = Annotated[float, BeforeValidator(megabytes), Field(gt=0, allow_inf_nan=False)]


class Environment(Table):
    """`[environment]`: the image and what the sandbox may use."""

    build_timeout_sec: Seconds = 600.0
    docker_image: Text | None = None
    os: str = "linux"
    cpus: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    memory_mb: Size | None = None
    memory: Size | None = None  # until schema 1.0
    storage_mb: Size | None = None
    storage: Size | None = None  # until schema 1.0
    gpus: int = 0
    gpu_types: list[str] | None = None
    network_mode: NetworkMode | None = None
    allowed_hosts: list[str] = Field(default_factory=list)
    allow_internet: bool | None = None  # before network_mode
    mcp_servers: list[Any] = Field(default_factory=list)
    env: Variables = Field(default_factory=dict)
    skills_dir: str | None = None
    healthcheck: dict[str, Any] | None = None
    workdir: Text | None = None

    @field_validator("os")
    @classmethod
    def _lower(cls, value: str) -> str:
        return value.lower()

    @field_validator("workdir")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith("/"):
            raise ValueError("expected an absolute path")
        return value

    @model_validator(mode="after")
    def _one_meaning(self) -> Environment:
        for old, new in (("memory", "memory_mb"), ("storage", "storage_mb")):
            before, now = getattr(self, old), getattr(self, new)
            if before is not None and now is not None and before != now:
                raise ValueError(f"{old} and {new} differ ({before:g} and {now:g} MB): keep {new}")
        if self.network_mode and self.allow_internet not in (None, self.network_mode == "public"):
            raise ValueError(f"allow_internet contradicts network_mode={self.network_mode!r}: keep network_mode")
        return self

    def network(self) -> NetworkMode:
        """The mode that is meant; Harbor's default is `public`."""
        if self.network_mode is not None:
            return self.network_mode
        if self.allow_internet is not False:
            return "public"
        return "allowlist" if self.allowed_hosts else "no-network"


class Agent(Table):
    """`[agent]` and `[steps.agent]`."""

    timeout_sec: Seconds | None = None
    user: User | None = None
    network_mode: NetworkMode | None = None
    allowed_hosts: list[str] = Field(default_factory=list)


class Verifier(Table):
    """`[verifier]` and `[steps.verifier]`."""

    timeout_sec: Seconds = 600.0
    env: Variables = Field(default_factory=dict)
    user: User | None = None
    environment_mode: Literal["shared", "separate"] | None = None
    environment: Environment | None = None
    network_mode: NetworkMode | None = None
    allowed_hosts: list[str] = Field(default_factory=list)

    @property
    def separate(self) -> bool | None:
        """Whether it runs in a container of its own; None: not said here."""
        if self.environment_mode is not None:
            return self.environment_mode == "separate"
        return None if self.environment is None else True


class Artifact(Table):
    """What a verifier in a container of its own is given of the agent's. A path alone is the usual form."""

    source: Text
    destination: str | None = None  # where Harbor keeps it on the host
    exclude: list[str] = Field(default_factory=list)
    service: str | None = None

    @field_validator("source")
    @classmethod
    def _no_way_up(cls, value: str) -> str:
        if ".." in value.split("/"):
            raise ValueError("expected a path without '..'")
        return value


def _path_as_table(value: Any) -> Any:
    return {"source": value} if isinstance(value, str) else value


Artifacts = list[Annotated[Artifact, BeforeValidator(_path_as_table)]]


class Solution(Table):
    env: Variables = Field(default_factory=dict)


class StepTable(Table):
    """One `[[steps]]` entry."""

    name: Annotated[str, Field(pattern=r"^[\w][\w .+-]*$")]  # a folder under steps/, and nowhere else
    agent: Agent = Field(default_factory=Agent)
    verifier: Verifier = Field(default_factory=Verifier)
    min_reward: float | dict[str, float] | None = None
    healthcheck: dict[str, Any] | None = None
    artifacts: Artifacts = Field(default_factory=list)


class TaskToml(Table):
    """The whole file."""

    schema_version: Annotated[str, BeforeValidator(_number_as_text)] | None = None
    version: Annotated[str, BeforeValidator(_number_as_text)] | None = None  # its name until schema 1.0
    source: str | None = None
    task: dict[str, Any] = Field(default_factory=dict)
    metadata: dict[str, Any] = Field(default_factory=dict)
    environment: Environment = Field(default_factory=Environment)
    agent: Agent = Field(default_factory=Agent)
    verifier: Verifier = Field(default_factory=Verifier)
    solution: Solution = Field(default_factory=Solution)
    steps: list[StepTable] = Field(default_factory=list)
    multi_step_reward_strategy: Literal["mean", "final"] | None = None
    artifacts: Artifacts = Field(default_factory=list)

    @field_validator("steps")
    @classmethod
    def _unlike_names(cls, steps: list[StepTable]) -> list[StepTable]:
        names = [step.name for step in steps]
        if len(set(names)) < len(names):
            raise ValueError(f"two steps have one name: {names}")
        return steps


def read_task_toml(path: Path) -> TaskToml:
    """Raises `DataError` that names the file and the field."""
    try:
        return TaskToml.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not TOML: {error}") from None
    except ValidationError as error:
        raise DataError(f"{path}: {_reason(error)}") from None


def _reason(error: ValidationError) -> str:
    first = error.errors()[0]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    said = first["msg"].removeprefix("Value error, ")
    got = "" if isinstance(first["input"], Mapping) else f", got {first['input']!r:.60}"
    return f"{place}: {said}{got}"


def unknown_keys(table: Table, prefix: str = "") -> Iterator[str]:
    """Dotted names of the keys that no version of the format has, in every table."""
    yield from (prefix + key for key in table.model_extra or {})
    for name in type(table).model_fields:
        value = getattr(table, name)
        if isinstance(value, Table):
            yield from unknown_keys(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            for item in value:
                if isinstance(item, Table):
                    yield from unknown_keys(item, f"{prefix}{name}.")
