"""What tests of sandboxes share: an engine or a reason to skip, and the removal of all that a test has started."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator

import docker
import docker.errors
import pytest

from errors import SandboxUnavailableError
from sandbox.base_image import ensure_base_image
from sandbox.docker_engine import connect
from sandbox.docker_sandbox import DockerSandboxFactory
from sandbox.reap import SANDBOX_LABEL

pytest.register_assert_rewrite("sandbox_conformance")

RUN = f"test{os.getpid()}"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def client() -> Iterator[docker.APIClient]:
    """The engine. Without one, tests that need it are skipped, or fail if REQUIRE_DOCKER=1."""
    try:
        client = connect()
    except SandboxUnavailableError as error:
        if os.environ.get("REQUIRE_DOCKER") == "1":
            raise
        pytest.skip(str(error))
    with client:
        yield client


@pytest.fixture(scope="session")
def image(client: docker.APIClient) -> str:
    """What sandboxes run here: the base image, or one like it with another bash or busybox in it."""
    return os.environ.get("SANDBOX_TEST_IMAGE") or ensure_base_image()


@pytest.fixture
async def factory(client: docker.APIClient) -> AsyncIterator[DockerSandboxFactory]:
    """Everything that it makes is gone after the test, whatever the test did."""
    yield await DockerSandboxFactory.connect(RUN)
    for container in client.containers(all=True, filters={"label": f"{SANDBOX_LABEL}={RUN}"}):
        try:
            client.remove_container(container["Id"], force=True, v=True)
        except docker.errors.APIError as error:
            assert error.status_code in (404, 409)  # on its way
