"""What the recipes for Harbor tasks share: their options, and what those turn into."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import chz

from envs.datasets import Row
from envs.harbor.attempt import HarborSettings
from envs.harbor.dataset import HarborDataset, load_harbor_dataset
from envs.harbor.env import SYSTEM_PROMPT, TOOL_SCHEMA, HarborEnvGroupBuilder, with_solution
from envs.harbor.sandboxes import DockerSandboxes, base_images
from envs.rendering import Renderer
from errors import ConfigError, SandboxUnavailableError
from recipes.setup import CheckedModels
from sandbox.base_image import REPOSITORY, ensure_base_image
from sandbox.docker_engine import connect
from sandbox.reap import reap


@chz.chz
class HarborOptions:
    """Which tasks, and how they are run."""

    dataset: str = chz.field(
        default="starter", doc="starter (the tasks that ship), a folder of Harbor tasks, or a name in Harbor's cache"
    )
    task_names: tuple[str, ...] = chz.field(default=(), doc="only these tasks, by id or folder name")
    max_tasks: int | None = chz.field(default=None, doc="use at most this many tasks")
    unsupported_tasks: Literal["error", "skip"] = chz.field(
        default="error", doc="tasks that cannot run here (docker-compose, …): refuse the dataset, or go on without them"
    )
    system_prompt: str | None = chz.field(default=SYSTEM_PROMPT, doc="opens every episode; '' for none")
    max_turns: int = chz.field(default=10, doc="turns of an episode")
    max_trajectory_tokens: int = chz.field(default=24576, doc="longest episode: prompt, all turns, all output")
    max_tokens: int = chz.field(default=2048, doc="longest answer of one turn, in tokens")
    command_timeout_s: float = chz.field(default=120.0, doc="longest a command may run")
    max_output_bytes: int = chz.field(default=16384, doc="of each stream of a command, what the student is shown")
    agent_timeout_multiplier: float = chz.field(default=1.0, doc="factor on the agent's time that a task gives")
    network: Literal["task", "none"] = chz.field(default="task", doc="task: on for tasks that say so; none: never")
    pass_env: tuple[str, ...] = chz.field(default=(), doc="variables of this machine that tasks may read, by name")
    keep_services: bool = chz.field(
        default=False,
        doc="what listens on a TCP port goes on during the tests: some tasks need it; it can forge rewards",
    )
    substitute_images: tuple[str, ...] = chz.field(
        default=(), doc="local images to take instead of others, as ubuntu:24.04=my-base, in Dockerfiles and by name"
    )
    sandbox_runtime: str | None = chz.field(
        default=None, doc="the engine's runtime to run sandboxes with, as runsc (gVisor) or kata-runtime"
    )
    max_sandboxes: int = chz.field(default=64, doc="sandboxes that exist at once; further episodes wait")

    @chz.validate
    def _harbor_ranges(self) -> None:
        for name in (
            "max_tasks", "max_turns", "max_trajectory_tokens", "max_tokens", "command_timeout_s",
            "agent_timeout_multiplier", "max_sandboxes",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name}={value}: expected more than 0")
        self.substitutes()
        if self.max_output_bytes < 100:
            raise ConfigError(f"max_output_bytes={self.max_output_bytes}: expected 100 or more")

    def tasks(self, *, eval_size: int, seed: int) -> HarborDataset:
        """Raises `DataError`, and `ConfigError` for a variable that is not let in."""
        return load_harbor_dataset(
            self.dataset,
            eval_size=eval_size,
            seed=seed,
            max_tasks=self.max_tasks,
            task_names=self.task_names,
            unsupported=self.unsupported_tasks,
            pass_env=self.allowed_env(),
        )

    def allowed_env(self) -> dict[str, str]:
        missing = [name for name in self.pass_env if name not in os.environ]
        if missing:
            raise ConfigError(f"pass_env={','.join(self.pass_env)}: {missing[0]} is not set on this machine")
        return {name: os.environ[name] for name in self.pass_env}

    def substitutes(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for given in self.substitute_images:
            image, _, other = given.rpartition("=")
            if not (image and other):
                raise ConfigError(f"substitute_images={given}: expected IMAGE=LOCAL_IMAGE, as ubuntu:24.04=my-base")
            found[image] = other
        return found

    def settings(self) -> HarborSettings:
        return HarborSettings(
            command_timeout_s=self.command_timeout_s,
            max_output_bytes=self.max_output_bytes,
            network=self.network,
            runtime=self.sandbox_runtime,
            agent_timeout_multiplier=self.agent_timeout_multiplier,
            keep_services=self.keep_services,
            max_sandboxes=self.max_sandboxes,
            pass_env=self.allowed_env(),
        )


def group_builder(
    options: HarborOptions,
    data: HarborDataset,
    row: Row,
    *,
    renderer: Renderer,
    teacher: str,
    sandboxes: DockerSandboxes,
    group_size: int,
    rewarded: bool,
    teacher_sees_solution: bool = False,
) -> HarborEnvGroupBuilder:
    """`group_size` attempts at the task of a row."""
    return HarborEnvGroupBuilder(
        dataset=data.name,
        teacher=teacher,
        task=data.tasks[row.row_id],
        renderer=renderer,
        sandboxes=sandboxes,
        settings=options.settings(),
        group_size=group_size,
        max_turns=options.max_turns,
        max_tokens=options.max_tokens,
        max_trajectory_tokens=options.max_trajectory_tokens,
        rewarded=rewarded,
        teacher_sees_solution=teacher_sees_solution,
    )


# --- checks


def check_lengths(options: HarborOptions, data: HarborDataset, models: CheckedModels) -> None:
    """Raises `ConfigError` for episodes that the models cannot read, or prompts that leave no room in them."""
    length = models.context_length
    if length is not None and options.max_trajectory_tokens > length:
        raise ConfigError(f"max_trajectory_tokens={options.max_trajectory_tokens}: {models.context_limit}")
    for renderer in {id(r): r for r in (models.student_renderer, models.teacher_renderer)}.values():
        for task in data.tasks.values():
            tokens = prompt_tokens(renderer, data, task.task_id)
            if tokens >= options.max_trajectory_tokens:
                raise ConfigError(
                    f"max_trajectory_tokens={options.max_trajectory_tokens}: task {task.task_id} opens with {tokens} "
                    "tokens. Raise it, or leave the task out with task_names"
                )


def check_solutions(options: HarborOptions, data: HarborDataset, models: CheckedModels) -> None:
    """Raises `DataError` for a task without a solution to show, `ConfigError` for one without room for it."""
    renderer = models.teacher_renderer
    for task in data.tasks.values():
        more = len(renderer.prompt(with_solution(task), [TOOL_SCHEMA])) - prompt_tokens(renderer, data, task.task_id)
        if models.context_length is not None and options.max_trajectory_tokens + more > models.context_length:
            raise ConfigError(
                f"max_trajectory_tokens={options.max_trajectory_tokens}: with the solution of task {task.task_id} a "
                f"teacher reads {more} tokens more, and the models' context is {models.context_length}. Lower it, or "
                "leave the task out with task_names"
            )


def prompt_tokens(renderer: Renderer, data: HarborDataset, task_id: str) -> int:
    messages = [{"role": "user", "content": data.tasks[task_id].instruction}]
    return len(renderer.prompt(messages, [TOOL_SCHEMA]))


def engine_problem() -> str | None:
    """Why there are no sandboxes; None if there are. Asks the container engine, starts nothing."""
    try:
        connect().close()
    except SandboxUnavailableError as error:
        return str(error)
    return None


def prepare_engine(data: HarborDataset, runtime: str | None) -> None:
    """Remove what a killed run left, and make the base image that the tasks ask for.

    Raises `SandboxUnavailableError`, `ImageBuildError`, and `ConfigError` for a runtime that the engine does not have.
    """
    if (problem := engine_problem()) is not None:
        raise SandboxUnavailableError(problem)
    if runtime is not None and "." not in runtime:  # as io.containerd.kata.v2, which an engine looks for itself
        with connect() as client:
            known = sorted(client.info().get("Runtimes") or {})
        if runtime not in known:
            raise ConfigError(
                f"sandbox_runtime={runtime}: the engine has {', '.join(known)}. Install it and name it in the engine's "
                "configuration (/etc/docker/daemon.json: runtimes), or take one that is there"
            )
    if removed := reap():
        print(f"removed {len(removed)} sandboxes that earlier runs left")
    if REPOSITORY in base_images(data.tasks.values()):
        ensure_base_image()


def check_task_lines(options: HarborOptions, data: HarborDataset) -> list[str]:
    """What a dry run says of the tasks."""
    tasks = data.tasks.values()
    networked = sum(task.network for task in tasks)
    network = f"{networked} of {len(tasks)} tasks have the network" if options.network == "task" else "no network"
    built = sum(task.image is None for task in tasks)
    return [
        f"{data.name}: {len(data.train)} training tasks, {len(data.test)} held out",
        f"{built} images to build, {len(tasks) - built} by name; {network}",
        f"container engine: {engine_problem() or 'answers'}",
    ]


def sandboxes_of(path: Path, options: HarborOptions) -> DockerSandboxes:
    """Sandboxes labelled with the run's folder."""
    return DockerSandboxes(path.name, tuple(options.substitutes().items()))
