"""One Harbor task folder, read and checked: what to say, where to run, how to grade.

    task.toml  instruction.md  environment/Dockerfile  tests/test.sh  solution/solve.sh
    steps/NAME/{instruction.md, tests/, solution/, workdir/}     instead, where task.toml has [[steps]]

Nothing of the host's environment reaches a task unless the user allows the variable by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from envs.harbor.compose import NotOneContainer, compose_file, environment_of, ignored_keys
from envs.harbor.config import Environment, StepTable, TaskToml, read_task_toml, unknown_keys
from errors import ConfigError, DataError
from sandbox.archives import check_folder
from sandbox.dockerfile import for_any_engine

_CANARY = re.compile(r"(<!--.*canary.*-->|#.*canary.*)", re.IGNORECASE)
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


class UnsupportedTaskError(DataError):
    """A valid task that needs something which a single container here cannot give it."""


@dataclass(frozen=True)
class Artifact:
    """A file or a folder of the agent's. `exclude`: patterns of names in it."""

    source: str
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class VerifierPlace:
    """A container of the verifier's own. `bundled`: the tests are in its image; else they are uploaded."""

    image: str | None
    context: Path
    build_timeout_s: float
    cpus: float | None
    memory_mb: int | None
    network: bool
    env: Mapping[str, str]  # may hold ${VARIABLES}
    workdir: str | None
    bundled: bool


@dataclass(frozen=True)
class Grading:
    """How one step is graded. `tests` are folders whose contents go to /tests, the later over the earlier."""

    tests: tuple[Path, ...]
    timeout_s: float
    env: Mapping[str, str]  # may hold ${VARIABLES}
    user: str | None
    apart: VerifierPlace | None = None  # None: in the agent's sandbox
    artifacts: tuple[Artifact, ...] = ()  # what is carried over, if apart


@dataclass(frozen=True)
class Step:
    """One instruction, and what belongs to it. A task without `[[steps]]` is one step without a name."""

    name: str
    instruction: str
    agent_timeout_s: float | None  # of the whole attempt; None: no limit
    agent_user: str | None
    grading: Grading
    solution: Path | None  # folder with solve.sh
    workdir: Path | None  # files that the step brings, and perhaps a setup.sh
    min_reward: Mapping[str, float] | None  # below it, later steps are not attempted


@dataclass(frozen=True)
class HarborTask:
    """A task that can be run here. `notes` name what it asks for and does not get."""

    task_id: str
    folder: Path
    steps: tuple[Step, ...]
    reward_strategy: str  # of several steps: mean | final
    image: str | None  # a prebuilt image wins over the Dockerfile
    build_timeout_s: float
    cpus: float | None
    memory_mb: int | None
    network: bool
    env: Mapping[str, str]  # may hold ${VARIABLES}
    workdir: str | None
    solution_env: Mapping[str, str]
    notes: tuple[str, ...] = ()

    @property
    def context(self) -> Path:
        """The folder that the image is built from."""
        return self.folder / "environment"

    @property
    def instruction(self) -> str:
        """The first step's: what the student reads first."""
        return self.steps[0].instruction

    def variables(self) -> Iterator[tuple[str, Mapping[str, str]]]:
        """Every table of variables, by the name of its field in task.toml."""
        yield "environment.env", self.env
        yield "solution.env", self.solution_env
        for step in self.steps:
            verifier = f"steps.{step.name}.verifier" if step.name else "verifier"
            yield f"{verifier}.env", step.grading.env
            if step.grading.apart is not None:
                yield f"{verifier}.environment.env", step.grading.apart.env


def load_task(folder: Path, task_id: str | None = None) -> HarborTask:
    """Read a task folder. `task_id` defaults to the folder's name.

    Raises:
        DataError: naming the file and the field that is missing or wrong, or a link that leads out of its folder.
        UnsupportedTaskError: the task needs several containers at once, Windows, an allowlist, or BuildKit.
    """
    toml_path = folder / "task.toml"
    if not toml_path.is_file():
        old = " (it has task.yaml: convert it with `harbor task migrate`)" if (folder / "task.yaml").exists() else ""
        raise DataError(f"{folder}: a Harbor task needs task.toml{old}")
    config = read_task_toml(toml_path)
    _refuse(folder, config)
    steps = [_step(folder, config, table) for table in config.steps] or [_only_step(folder, config)]
    environment = config.environment
    memory = environment.memory_mb if environment.memory_mb is not None else environment.memory
    apart = {s.grading.apart.context for s in steps if s.grading.apart and s.grading.apart.image is None}
    for context in apart | ({folder / "environment"} if environment.docker_image is None else set()):
        _check_dockerfile(context / "Dockerfile")
    for step in steps:
        bundled = step.grading.apart is not None and step.grading.apart.bundled  # its tests are built, not uploaded
        for part in (*(() if bundled else step.grading.tests), *filter(None, (step.solution, step.workdir))):
            check_folder(part)
    return HarborTask(
        task_id=task_id or folder.resolve().name,
        folder=folder.absolute(),
        steps=tuple(steps),
        reward_strategy=config.multi_step_reward_strategy or "mean",
        image=environment.docker_image,
        build_timeout_s=environment.build_timeout_sec,
        cpus=environment.cpus,
        memory_mb=None if memory is None else round(memory),
        network=_agent_network(config) == "public",
        env=_compose_env(folder / "environment") | environment.env,
        workdir=environment.workdir,
        solution_env=config.solution.env,
        notes=tuple(_notes(folder, config)),
    )


# --- what is refused, and what is named


def _refuse(folder: Path, config: TaskToml) -> None:
    for place in (folder / "environment", folder / "tests", *(folder.glob("steps/*/tests"))):
        if (compose := compose_file(place)) is not None:
            try:
                environment_of(compose)
            except NotOneContainer as error:
                raise UnsupportedTaskError(
                    f"{compose}: {error}. Tasks of several containers are not supported, only a Dockerfile or a "
                    "docker_image. Leave the task out"
                ) from None
    for artifact in [*config.artifacts, *(a for step in config.steps for a in step.artifacts)]:
        if artifact.service not in (None, "main"):
            raise UnsupportedTaskError(f"{folder}/task.toml: artifacts: service={artifact.service!r}: only 'main' runs")
    if config.environment.os != "linux":
        raise UnsupportedTaskError(f"{folder}/task.toml: environment.os={config.environment.os!r}: only 'linux' runs")
    if _agent_network(config) == "allowlist":
        raise UnsupportedTaskError(
            f"{folder}/task.toml: network_mode='allowlist': a sandbox has the whole network or none. "
            "Say 'public' or 'no-network', or leave the task out"
        )
    if config.environment.docker_image is None and not (folder / "environment" / "Dockerfile").is_file():
        raise DataError(f"{folder}: environment/Dockerfile is missing, and task.toml names no environment.docker_image")


def _check_dockerfile(path: Path) -> None:
    try:
        for_any_engine(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    except DataError as error:
        raise UnsupportedTaskError(f"{path}: {error}") from None


def _agent_network(config: TaskToml) -> str:
    """The agent's own mode wins: one sandbox serves both phases, and a model gets no network it was denied."""
    modes = [m for m in (config.agent.network_mode, *(s.agent.network_mode for s in config.steps)) if m is not None]
    hosts = config.environment.allowed_hosts + config.agent.allowed_hosts
    chosen = "no-network" if "no-network" in modes else modes[0] if modes else config.environment.network()
    return "no-network" if chosen == "allowlist" and not hosts else chosen


def _notes(folder: Path, config: TaskToml) -> Iterator[str]:
    environment = config.environment
    yield from (f"{key}: unknown key" for key in unknown_keys(config))
    if environment.storage_mb or environment.storage:
        yield "environment.storage_mb: the disk has no limit of its own"
    if environment.gpus or environment.gpu_types:
        yield "environment.gpus: sandboxes have no GPU"
    if environment.mcp_servers:
        yield "environment.mcp_servers: the student has bash only"
    if environment.skills_dir:
        yield "environment.skills_dir: the student has no skills"
    if environment.healthcheck or any(step.healthcheck for step in config.steps):
        yield "healthcheck: not run"
    for place in (folder / "environment", folder / "tests", *sorted(folder.glob("steps/*/tests"))):
        if (compose := compose_file(place)) is not None:
            yield from (f"{compose.name}: services.main.{key}" for key in ignored_keys(compose))
    apart = any(_is_apart(config, step) for step in config.steps or [None])
    if not apart and (config.artifacts or any(step.artifacts for step in config.steps)):
        yield "artifacts: not collected"
    network = _agent_network(config)
    for where, mode in _verifier_networks(config):
        if mode is not None and mode != network and not apart:
            yield f"{where}.network_mode={mode}: the verifier has what the agent has ({network})"
    if network != environment.network() and environment.network() != "allowlist":
        yield f"environment.network_mode={environment.network()}: the agent's {network} holds throughout"
    if environment.docker_image and (folder / "environment" / "Dockerfile").is_file():
        yield "environment/Dockerfile: not built, environment.docker_image wins"


def _verifier_networks(config: TaskToml) -> Iterator[tuple[str, str | None]]:
    yield "verifier", config.verifier.network_mode
    for step in config.steps:
        yield f"steps.{step.name}.verifier", step.verifier.network_mode


# --- steps


def _only_step(folder: Path, config: TaskToml) -> Step:
    return Step(
        name="",
        instruction=_instruction(folder / "instruction.md"),
        agent_timeout_s=config.agent.timeout_sec,
        agent_user=config.agent.user,
        grading=_grading(folder, config, None),
        solution=_solution(folder / "solution"),
        workdir=None,
        min_reward=None,
    )


def _step(folder: Path, config: TaskToml, table: StepTable) -> Step:
    here = folder / "steps" / table.name
    if not here.is_dir():
        raise DataError(f"{folder}/task.toml: steps: {here} is missing")
    least = table.min_reward
    if least is not None and not isinstance(least, dict):
        least = {"reward": least}
    return Step(
        name=table.name,
        instruction=_instruction(here / "instruction.md"),
        agent_timeout_s=table.agent.timeout_sec or config.agent.timeout_sec,
        agent_user=table.agent.user or config.agent.user,
        grading=_grading(folder, config, table),
        solution=_solution(here / "solution") or _solution(folder / "solution"),
        workdir=here / "workdir" if (here / "workdir").is_dir() else None,
        min_reward=least,
    )


def _grading(folder: Path, config: TaskToml, table: StepTable | None) -> Grading:
    verifier, own = config.verifier, table.verifier if table else config.verifier
    places = [folder / "tests", *([folder / "steps" / table.name / "tests"] if table else [])]
    tests = tuple(place.absolute() for place in places if place.is_dir())
    apart = _place_apart(folder, config, table) if _is_apart(config, table) else None
    if not (apart and apart.bundled) and not any((place / "test.sh").is_file() for place in tests):
        raise DataError(f"{places[-1]}/test.sh is missing: a Harbor task is graded by it")
    wanted = [*config.artifacts, *(table.artifacts if table else [])]
    for artifact in wanted if apart else ():
        path = PurePosixPath(config.environment.workdir or "", artifact.source)
        if path == PurePosixPath("/") or any(path.is_relative_to(taken) for taken in ("/tests", "/logs/verifier")):
            raise DataError(
                f"{folder}/task.toml: artifacts: {artifact.source!r} would take the place of the verifier's own files: "
                "expected a path that is neither /, nor in /tests or /logs/verifier"
            )
    return Grading(
        tests=tests,
        timeout_s=own.timeout_sec if "timeout_sec" in own.model_fields_set else verifier.timeout_sec,
        env=verifier.env | own.env,
        user=own.user or verifier.user,
        apart=apart,
        artifacts=tuple(Artifact(a.source, tuple(a.exclude)) for a in wanted),
    )


def _is_apart(config: TaskToml, table: StepTable | None) -> bool:
    own = table.verifier.separate if table is not None else None
    return bool(config.verifier.separate if own is None else own)


def _place_apart(folder: Path, config: TaskToml, table: StepTable | None) -> VerifierPlace:
    """The step's own image or Dockerfile, else the task's for its tests, else the agent's image made anew."""
    candidates: list[tuple[Environment | None, Path]] = [(config.verifier.environment, folder / "tests")]
    if table is not None:
        candidates.insert(0, (table.verifier.environment, folder / "steps" / table.name / "tests"))
    image, context, bundled = config.environment.docker_image, folder / "environment", False
    for given, tests in candidates:
        if (given is not None and given.docker_image) or (tests / "Dockerfile").is_file():
            image, context, bundled = given.docker_image if given is not None else None, tests, True
            break
    environment = next((given for given, _ in candidates if given is not None), config.environment)
    own = table.verifier.network_mode if table else None
    mode = own or config.verifier.network_mode or environment.network()
    if mode == "allowlist":
        raise UnsupportedTaskError(
            f"{folder}/task.toml: verifier.network_mode='allowlist': a sandbox has the whole network or none"
        )
    memory = environment.memory_mb if environment.memory_mb is not None else environment.memory
    return VerifierPlace(
        image=image,
        context=context.absolute(),
        build_timeout_s=environment.build_timeout_sec,
        cpus=environment.cpus,
        memory_mb=None if memory is None else round(memory),
        network=mode == "public",
        env=_compose_env(context) | environment.env,
        workdir=environment.workdir,
        bundled=bundled,
    )


def _compose_env(folder: Path) -> dict[str, str]:
    return {} if (compose := compose_file(folder)) is None else environment_of(compose)


def _solution(folder: Path) -> Path | None:
    return folder.absolute() if (folder / "solve.sh").is_file() else None


def _instruction(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason} at byte {error.start + 1})") from None
    text = strip_canary(text)
    if not text.strip():
        raise DataError(f"{path}: is empty; it is what the student is told to do")
    return text


def strip_canary(text: str) -> str:
    """Without the comment lines that open a benchmark's files so that a corpus can be searched for them."""
    lines = text.splitlines(keepends=True)
    start = next((i for i, line in enumerate(lines) if not _CANARY.fullmatch(line.strip())), len(lines))
    return "".join(lines[start:]).lstrip("\r\n") if start else text


# --- variables of the host


def check_variables(task: HarborTask, allowed: Mapping[str, str]) -> None:
    """Raises `ConfigError` if a variable of the host that the task needs is not allowed or not set."""
    for where, env in task.variables():
        resolve_variables(env, allowed, f"{task.folder}/task.toml: {where}")


def resolve_variables(env: Mapping[str, str], allowed: Mapping[str, str], where: str) -> dict[str, str]:
    """`${NAME}` and `${NAME:-default}` from `allowed`, the variables of the host that the user lets in.

    Raises:
        ConfigError: a variable without a default is not among them.
    """

    def value(found: re.Match[str]) -> str:
        name, default = found.groups()
        if name in allowed:
            return allowed[name]
        if default is not None:
            return default
        raise ConfigError(
            f"{where} asks for this machine's ${name}. A task sees only the variables that you let in: "
            f"set it and add pass_env={name}, or leave the task out"
        )

    return {key: _VARIABLE.sub(value, text) for key, text in env.items()}
