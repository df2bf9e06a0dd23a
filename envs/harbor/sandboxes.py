"""The container engine as a group builder may carry it: picklable, connected to on first use."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import anyio
from anyio.lowlevel import RunVar

from envs.harbor.task import HarborTask, VerifierPlace
from sandbox import dockerfile
from sandbox.docker_sandbox import DockerSandboxFactory
from sandbox.types import Sandbox, SandboxConfig, SandboxFactory

_connections: RunVar[dict[DockerSandboxes, _Connection]] = RunVar(
    "harbor_connections"
)  # a factory is of one event loop


class _Connection:
    """A factory that many may ask for at once, and one makes."""

    def __init__(self, run: str, substitutes: Mapping[str, str]) -> None:
        self._run, self._substitutes = run, substitutes
        self._lock = anyio.Lock()
        self._factory: DockerSandboxFactory | None = None

    async def factory(self) -> DockerSandboxFactory:
        async with self._lock:
            if self._factory is None:
                self._factory = await DockerSandboxFactory.connect(self._run, self._substitutes)
            return self._factory


@dataclass(frozen=True)
class DockerSandboxes:
    """A `SandboxFactory` by the name of its run: one connection per process and event loop, whoever asks.

    `substitutes`: pairs of an image and the local one to take instead."""

    run: str
    substitutes: tuple[tuple[str, str], ...] = ()

    async def _factory(self) -> DockerSandboxFactory:
        try:
            connections = _connections.get()
        except LookupError:
            _connections.set(connections := {})
        return await connections.setdefault(self, _Connection(self.run, dict(self.substitutes))).factory()

    async def create(self, image: str, config: SandboxConfig) -> Sandbox:
        return await (await self._factory()).create(image, config)

    async def build_image(self, folder: Path, *, timeout_s: float, dockerfile: str = "Dockerfile") -> str:
        factory = await self._factory()
        return await factory.build_image(folder, timeout_s=timeout_s, dockerfile=dockerfile)


async def image_of(place: HarborTask | VerifierPlace, sandboxes: SandboxFactory) -> str:
    """A place's image: the prebuilt one that it names, or that of its Dockerfile, built once however many ask.

    Raises `ImageBuildError`.
    """
    if place.image is not None:
        return place.image
    return await sandboxes.build_image(place.context, timeout_s=place.build_timeout_s)


def base_images(tasks: Collection[HarborTask]) -> set[str]:
    """What their Dockerfiles are `FROM`, without tags, and without stages of their own."""
    bases: set[str] = set()
    places = [task for task in tasks] + [s.grading.apart for task in tasks for s in task.steps if s.grading.apart]
    for place in places:
        if place.image is None:
            text = (place.context / "Dockerfile").read_text(encoding="utf-8", errors="replace")
            bases |= {image.partition(":")[0] for image in dockerfile.base_images(text)}
    return bases
