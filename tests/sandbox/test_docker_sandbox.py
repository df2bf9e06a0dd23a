"""`DockerSandbox` on a real engine: the contract, seen from the engine's machine and from inside alone."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from sandbox_conformance import CONFIG, Commands, Ends, Make, SandboxConformance

from sandbox import docker_sandbox
from sandbox.docker_sandbox import DockerSandboxFactory
from sandbox.types import Sandbox, SandboxConfig

pytestmark = [pytest.mark.anyio, pytest.mark.docker]


@pytest.fixture
def make(factory: DockerSandboxFactory, image: str) -> Make:
    async def make(config: SandboxConfig) -> Sandbox:
        return await factory.create(image, config)

    return make


@pytest.fixture
async def sandbox(make: Make) -> AsyncIterator[Sandbox]:
    sandbox = await make(CONFIG)
    yield sandbox
    await sandbox.cleanup()


class TestDockerSandbox(SandboxConformance):
    pass


class TestDockerSandboxOfAnotherMachine(Commands, Ends):
    """As where the engine's processes cannot be seen from here."""

    @pytest.fixture(autouse=True)
    def far_away(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(docker_sandbox, "host_view", lambda container, init_pid: None)
