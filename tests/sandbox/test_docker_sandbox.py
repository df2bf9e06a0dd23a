"""`DockerSandbox` on a real engine: the contract, seen from the engine's machine and from inside alone."""

from __future__ import annotations

import io
import tarfile
from collections.abc import AsyncIterator

import docker
import pytest
from sandbox_conformance import CONFIG, Commands, Ends, Make, SandboxConformance

from errors import ConfigError, SandboxError
from sandbox import docker_sandbox
from sandbox.docker_sandbox import DockerSandboxFactory
from sandbox.types import Sandbox, SandboxConfig, TimedOut

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

    async def test_a_fork_bomb_is_ended_and_the_sandbox_goes_on(self, sandbox: Sandbox):
        """Or is not: there may be no process left to end it with. Then the sandbox is removed, and says so."""
        with pytest.raises(SandboxError) as caught:
            await sandbox.run_command("b() { b | b & }; b; sleep 900", timeout_s=2)
        if isinstance(caught.value, TimedOut):
            assert (await sandbox.run_command("echo alive", timeout_s=60)).stdout == b"alive\n"
        else:
            with pytest.raises(SandboxError, match="is gone"):
                await sandbox.run_command("echo alive", timeout_s=60)


async def test_a_runtime_is_passed_through(client: docker.APIClient, make: Make):
    runtime = "runsc"
    if runtime in client.info()["Runtimes"]:
        sandbox = await make(SandboxConfig(runtime=runtime))
        assert (await sandbox.run_command("echo hi", timeout_s=20)).stdout == b"hi\n"
    else:
        with pytest.raises(SandboxError, match=runtime):
            await make(SandboxConfig(runtime=runtime))


async def test_an_image_without_bash_is_named(client: docker.APIClient, factory: DockerSandboxFactory):
    empty = io.BytesIO()
    tarfile.open(fileobj=empty, mode="w").close()
    client.import_image_from_data(empty.getvalue(), repository="protege-test-empty")
    try:
        with pytest.raises(SandboxError, match=r"protege-test-empty ends as soon as it starts.*has bash"):
            sandbox = await factory.create("protege-test-empty")
            await sandbox.run_command("true", timeout_s=20)
    finally:
        client.remove_image("protege-test-empty", force=True)


async def test_a_user_that_the_image_does_not_have_is_named(sandbox: Sandbox):
    with pytest.raises(SandboxError, match="no user nobody-here"):
        await sandbox.run_command("id", timeout_s=20, user="nobody-here")
    assert (await sandbox.run_command("id -un", timeout_s=20)).stdout == b"root\n"


@pytest.mark.parametrize(
    "options",
    [
        {"tmpfs_mb": {"/a": 200, "/b": 100}, "memory_mb": 512},
        {"workdir": "app"},
        {"mounts": {"here": "/there"}},
        {"env": {"A-B": ""}},
    ],
)
async def test_a_config_that_makes_no_sense_is_refused(options: dict):
    with pytest.raises(ConfigError):
        SandboxConfig(**options)


async def test_a_run_may_have_any_name(client: docker.APIClient, image: str):
    factory = await DockerSandboxFactory.connect("mein Lauf/ü " + "x" * 300)
    sandbox = await factory.create(image)
    assert (await sandbox.run_command("true", timeout_s=20)).exit_code == 0
    await sandbox.cleanup()


async def test_more_cpus_than_there_are_become_all_there_are(make: Make):
    sandbox = await make(SandboxConfig(cpus=10_000))
    assert (await sandbox.run_command("true", timeout_s=20)).exit_code == 0
