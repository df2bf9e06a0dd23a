"""An engine that takes calls and answers nothing: what waits for it ends, and once it goes on nothing is left."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import docker
import pytest
import requests
from own_engine import OwnEngine

from errors import SandboxError, SandboxUnavailableError
from sandbox import docker_engine, images
from sandbox.base_image import ensure_base_image
from sandbox.docker_engine import Engine, as_sandbox_errors, connect
from sandbox.docker_sandbox import DockerSandbox, DockerSandboxFactory
from sandbox.reap import SANDBOX_LABEL
from sandbox.types import SandboxConfig, TimedOut

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docker_engine, "SLOW_S", 0.5)
    monkeypatch.setattr(docker_engine, "PING_S", 1.0)
    monkeypatch.setattr(docker_engine, "RETURN_S", 1.0)
    monkeypatch.setattr(images, "CUT_S", 1.0)


class Client:
    """Answers a ping, until it is frozen, and nothing else before it is let go."""

    def __init__(self) -> None:
        self.goes_on = threading.Event()
        self.frozen = False
        self.pings = 0

    def ping(self) -> bool:
        self.pings += 1
        return self.goes_on.wait(60) if self.frozen else True

    def work(self) -> str:
        self.goes_on.wait(60)
        return "done"


@pytest.fixture
def scripted() -> Iterator[Any]:
    client = Client()
    yield client
    client.goes_on.set()


async def test_a_slow_engine_is_waited_for_while_it_answers_pings(scripted: Any):
    engine = Engine(scripted)
    threading.Timer(1.3, scripted.goes_on.set).start()
    assert await engine.in_thread(scripted.work) == "done"
    assert scripted.pings == 2


async def test_a_frozen_engine_is_asked_once_for_all_and_fails_all_of_them(scripted: Any):
    engine, failures = Engine(scripted), []
    scripted.frozen = True

    async def ask() -> None:
        try:
            await engine.in_thread(scripted.work)
        except SandboxError as error:
            failures.append(str(error))

    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            for _ in range(3 * docker_engine.CALLS_AT_ONCE):
                tasks.start_soon(ask)
    assert len(failures) == 3 * docker_engine.CALLS_AT_ONCE
    assert set(failures) == {"the container engine does not answer: a ping took more than 1 s"}
    assert scripted.pings == 1, "those whose turn came later had asked before it was known"
    scripted.goes_on.set()
    assert await engine.answers() and await engine.in_thread(scripted.work) == "done"


async def test_who_is_cancelled_does_not_wait_for_a_frozen_engine(scripted: Any):
    scripted.frozen = True
    started = time.monotonic()
    with anyio.move_on_after(0.1) as scope:
        await Engine(scripted).in_thread(scripted.work)
    assert scope.cancelled_caught and time.monotonic() - started < 5


async def test_an_engine_that_lives_and_never_does_the_work_is_not_asked_for_ever(scripted: Any):
    """As one whose storage hangs: it answers pings, and no call that makes a container."""
    tries = 0

    async def make() -> None:
        nonlocal tries
        tries += 1
        with as_sandbox_errors("creating a sandbox"):
            raise requests.ReadTimeout("read timed out")

    with anyio.fail_after(10), pytest.raises(SandboxError, match="is stuck: creating a sandbox: read timed out"):
        await Engine(scripted).outlast(make)
    assert tries == 3


def test_an_address_that_takes_connections_and_says_nothing_is_named_soon(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(docker_engine, "CONNECT_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("DOCKER_HOST", f"tcp://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(SandboxUnavailableError, match=r"no container engine answers at tcp://127\.0\.0\.1"):
            connect()
        assert time.monotonic() - started < 10


# --- a real one


def freeze(engine: OwnEngine) -> None:
    assert engine._daemon is not None
    os.kill(engine._daemon.pid, signal.SIGSTOP)


def thaw(engine: OwnEngine) -> None:
    assert engine._daemon is not None
    os.kill(engine._daemon.pid, signal.SIGCONT)


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Iterator[OwnEngine]:
    monkeypatch.setattr(docker_engine, "PING_S", 5.0)  # this machine may have other work
    with OwnEngine() as engine:
        monkeypatch.setenv("DOCKER_HOST", engine.host)
        engine.start()
        try:
            yield engine
        finally:
            thaw(engine)


async def gone(client: docker.APIClient, holds: Any, within_s: float = 20.0) -> None:
    with anyio.fail_after(within_s):
        while await anyio.to_thread.run_sync(holds):
            await anyio.sleep(0.2)


@pytest.mark.docker
@pytest.mark.slow
async def test_sandboxes_of_an_engine_that_freezes_are_left_in_time_and_end_when_it_goes_on(own: OwnEngine):
    image = ensure_base_image()
    factory = await DockerSandboxFactory.connect("frozen")
    sandboxes = [await factory.create(image, SandboxConfig(memory_mb=128)) for _ in range(6)]

    async def live(sandbox: DockerSandbox) -> None:
        try:
            await sandbox.run_command("sleep 900", timeout_s=900)
        finally:
            await sandbox.cleanup()

    async def is_asked_for() -> None:
        await anyio.sleep(1.0)
        await factory.create(image, SandboxConfig(memory_mb=128))

    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as tasks:
            for sandbox in sandboxes:
                tasks.start_soon(live, sandbox)
            tasks.start_soon(is_asked_for)
            await anyio.sleep(0.5)
            freeze(own)
            await anyio.sleep(1.0)
            cancelled = time.monotonic()
            scope.cancel()
    assert time.monotonic() - cancelled < 25
    thaw(own)
    with connect() as client:
        listed = partial(client.containers, filters={"label": SANDBOX_LABEL})  # those that run
        await gone(client, listed)


@pytest.mark.docker
@pytest.mark.slow
async def test_a_command_whose_end_a_frozen_engine_does_not_tell_of_has_not_run_out_of_time(own: OwnEngine):
    sandbox = await (await DockerSandboxFactory.connect("frozen")).create(ensure_base_image())
    await sandbox.run_command("true", timeout_s=10)
    freeze(own)
    with pytest.raises(SandboxError, match="the engine does not answer") as caught:
        await sandbox.run_command("true", timeout_s=1)
    assert not isinstance(caught.value, TimedOut), "which a model would be told"


@pytest.mark.docker
@pytest.mark.slow
async def test_a_build_on_an_engine_that_freezes_fails_in_time(own: OwnEngine, tmp_path: Path):
    ensure_base_image()
    factory = await DockerSandboxFactory.connect("frozen")
    (tmp_path / "Dockerfile").write_text("FROM protege-base\nRUN sleep 900\n")

    async def freezes() -> None:
        await anyio.sleep(3.0)
        freeze(own)

    started = time.monotonic()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(freezes)
        with pytest.raises(SandboxError, match="does not answer"):
            await factory.build_image(tmp_path, timeout_s=900)
    assert time.monotonic() - started < 30


@pytest.mark.docker
async def test_a_pull_from_a_registry_that_says_nothing_is_given_up_when_it_is_said(
    image: str, factory: DockerSandboxFactory
):
    """The engine begins its answer when the registry has begun its own."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        with anyio.move_on_after(0.5) as scope:
            await factory.ensure_image(f"127.0.0.1:{silent.getsockname()[1]}/x", timeout_s=900)
        assert scope.cancelled_caught and time.monotonic() - started < 5
