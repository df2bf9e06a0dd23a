"""A runtime other than the engine's own, on an engine of the test's own that knows it: `runtime=` is honoured."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

import docker
import pytest
from own_engine import OwnEngine
from sandbox_conformance import CONFIG, Make, SandboxConformance

from sandbox.base_image import ensure_base_image
from sandbox.docker_engine import connect
from sandbox.docker_sandbox import DockerSandboxFactory
from sandbox.types import Sandbox, SandboxConfig

pytestmark = [pytest.mark.anyio, pytest.mark.docker, pytest.mark.slow]

# Debian's: one in C that shares no code with runc, and gVisor, whose containers have a kernel of their own.
OPTIONS = {"crun": (), "runsc": ("--network=none",)}  # gVisor would set up a network from this engine's, which has none

STAT = "this version's kernel refuses the call that coreutils 9's stat makes"
KILLED = "the kernel ends all of gVisor for want of memory or threads: the sandbox is lost, which drops the episode"
KNOWN = {  # of gVisor 20221219, Debian 12's
    "test_modes_owners_and_replacement": STAT,
    "test_a_folder_goes_and_comes_back": STAT,
    "test_a_fork_bomb_is_ended_and_the_sandbox_goes_on": KILLED,
    "test_memory_that_is_not_there_is_told": KILLED,
}


@pytest.fixture(autouse=True)
def known(request: pytest.FixtureRequest, runtime: str) -> None:
    if runtime == "runsc" and (reason := KNOWN.get(request.node.originalname)) is not None:
        request.applymarker(pytest.mark.xfail(reason=reason))


@pytest.fixture(scope="module", params=OPTIONS)
def runtime(request: pytest.FixtureRequest) -> str:
    if shutil.which(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    return request.param


@pytest.fixture(scope="module")
def engine(client: docker.APIClient, runtime: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnEngine]:
    """The engine that DOCKER_HOST names during these tests."""
    program = tmp_path_factory.mktemp("runtime") / runtime
    program.write_text(f'#!/bin/sh\nexec {shutil.which(runtime)} {" ".join(OPTIONS[runtime])} "$@"\n')
    program.chmod(0o755)
    with OwnEngine(f"--add-runtime={runtime}={program}") as engine, pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOCKER_HOST", engine.host)
        engine.start()
        ensure_base_image()
        yield engine


@pytest.fixture
async def make(engine: OwnEngine, runtime: str) -> AsyncIterator[Make]:
    factory = await DockerSandboxFactory.connect("other-runtime")
    made: list[Sandbox] = []

    async def make(config: SandboxConfig) -> Sandbox:
        # gVisor's kernel is a program that has threads, which count as the sandbox's.
        pids = max(256, config.pids) if runtime == "runsc" else config.pids
        made.append(await factory.create(ensure_base_image(), replace(config, runtime=runtime, pids=pids)))
        return made[-1]

    yield make
    for sandbox in made:
        await sandbox.cleanup()


@pytest.fixture
async def sandbox(make: Make) -> Sandbox:
    return await make(CONFIG)


class TestOnAnotherRuntime(SandboxConformance):
    async def test_it_is_the_one_that_was_asked_for(self, engine: OwnEngine, runtime: str, sandbox: Sandbox):
        with connect() as client:
            found = client.inspect_container(sandbox.id)
        assert found["HostConfig"]["Runtime"] == runtime
        ask = [runtime, "--root", engine.runtime_state, "list", "--quiet"]
        assert found["Id"] in subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split()
