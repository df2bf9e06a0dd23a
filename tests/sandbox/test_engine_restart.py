"""The engine is restarted in the middle of a run: an engine of the test's own, so that no one else's is."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import anyio
import docker
import pytest
from own_engine import OwnEngine

from errors import SandboxError
from sandbox import docker_engine
from sandbox.base_image import ensure_base_image
from sandbox.docker_engine import connect
from sandbox.docker_sandbox import DockerSandboxFactory
from sandbox.reap import SANDBOX_LABEL
from sandbox.types import TimedOut

pytestmark = [pytest.mark.anyio, pytest.mark.docker, pytest.mark.slow]


@pytest.fixture
def engine(client: docker.APIClient, monkeypatch: pytest.MonkeyPatch) -> Iterator[OwnEngine]:
    """The engine that DOCKER_HOST names during this test."""
    with OwnEngine() as engine:
        monkeypatch.setenv("DOCKER_HOST", engine.host)
        engine.start()
        yield engine


async def test_commands_fail_as_ours_and_the_run_goes_on_with_new_sandboxes(engine: OwnEngine):
    image = ensure_base_image()
    factory = await DockerSandboxFactory.connect("restarted")
    busy, idle = await factory.create(image), await factory.create(image)
    await idle.run_command("A=1", timeout_s=10)
    failures: list[SandboxError] = []

    async def work() -> None:
        try:
            await busy.run_command("sleep 900", timeout_s=120)
        except SandboxError as error:
            failures.append(error)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(work)
        await anyio.sleep(0.5)
        await anyio.to_thread.run_sync(engine.restart)
    assert not isinstance(failures[0], TimedOut)
    with pytest.raises(SandboxError):
        await idle.run_command("echo $A", timeout_s=10)
    await busy.cleanup()
    await idle.cleanup()
    sandbox = await factory.create(image)
    assert (await sandbox.run_command("echo new", timeout_s=10)).stdout == b"new\n"
    await sandbox.cleanup()
    with connect() as client:
        listed = partial(client.containers, all=True, filters={"label": SANDBOX_LABEL})
        assert await anyio.to_thread.run_sync(listed) == []


async def test_sandboxes_asked_for_while_the_engine_is_away_are_made_when_it_is_back(engine: OwnEngine, tmp_path: Path):
    image = ensure_base_image()
    factory = await DockerSandboxFactory.connect("waiting")
    (tmp_path / "Dockerfile").write_text("FROM protege-base\nRUN cat > /greeting <<'E'\nhello\nE\n")
    said: list[bytes] = []

    async def live(folder: Path | None) -> None:
        name = image if folder is None else await factory.build_image(folder, timeout_s=60)
        sandbox = await factory.create(name)
        said.append((await sandbox.run_command("cat /greeting || echo here", timeout_s=30)).stdout)
        await sandbox.cleanup()

    await anyio.to_thread.run_sync(engine.stop)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(live, None)
        tasks.start_soon(live, tmp_path)
        await anyio.sleep(1.0)
        assert said == []
        await anyio.to_thread.run_sync(engine.start)
    assert sorted(said) == [b"hello\n", b"here\n"]


async def test_an_engine_that_stays_away_is_waited_for_no_longer_than_said(
    engine: OwnEngine, monkeypatch: pytest.MonkeyPatch
):
    image = ensure_base_image()
    factory = await DockerSandboxFactory.connect("waiting")
    monkeypatch.setattr(docker_engine, "RETURN_S", 1.0)
    await anyio.to_thread.run_sync(engine.stop)
    with anyio.fail_after(20), pytest.raises(SandboxError):
        await factory.create(image)
