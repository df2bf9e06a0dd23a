"""The container engine as a group builder may carry it: picklable, connected to on first use."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import anyio
from anyio.lowlevel import RunVar

from envs.harbor.task import HarborTask
from sandbox.docker_sandbox import DockerSandboxFactory
from sandbox.types import Sandbox, SandboxConfig, SandboxFactory

_connections: RunVar[dict[str, _Connection]] = RunVar("harbor_connections")  # a factory is of one event loop


class _Connection:
    """A factory that many may ask for at once, and one makes."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._lock = anyio.Lock()
        self._factory: DockerSandboxFactory | None = None

    async def factory(self) -> DockerSandboxFactory:
        async with self._lock:
            if self._factory is None:
                self._factory = await DockerSandboxFactory.connect(self._run)
            return self._factory


@dataclass(frozen=True)
class DockerSandboxes:
    """A `SandboxFactory` by the name of its run: one connection per process and event loop, whoever asks."""

    run: str

    async def _factory(self) -> DockerSandboxFactory:
        try:
            connections = _connections.get()
        except LookupError:
            _connections.set(connections := {})
        return await connections.setdefault(self.run, _Connection(self.run)).factory()

    async def create(self, image: str, config: SandboxConfig) -> Sandbox:
        return await (await self._factory()).create(image, config)

    async def build_image(self, folder: Path, *, timeout_s: float, dockerfile: str = "Dockerfile") -> str:
        factory = await self._factory()
        return await factory.build_image(folder, timeout_s=timeout_s, dockerfile=dockerfile)


async def image_of(task: HarborTask, sandboxes: SandboxFactory) -> str:
    """A task's image: the prebuilt one that it names, or that of its Dockerfile, built once however many ask.

    Raises `ImageBuildError`.
    """
    if task.image is not None:
        return task.image
    return await sandboxes.build_image(task.context, timeout_s=task.build_timeout_s)


def base_images(tasks: Iterable[HarborTask]) -> set[str]:
    """What their Dockerfiles are `FROM`, without tags, and without stages of their own."""
    bases: set[str] = set()
    for task in tasks:
        if task.image is None:
            text = (task.context / "Dockerfile").read_text(encoding="utf-8", errors="replace")
            found = re.findall(r"^\s*FROM\s+(?:--\S+\s+)*(\S+)(?:\s+AS\s+(\S+))?", text, re.IGNORECASE | re.MULTILINE)
            stages = {stage.lower() for _, stage in found}
            bases |= {image.partition(":")[0] for image, _ in found if image.lower() not in stages}
    return bases
