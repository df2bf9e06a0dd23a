"""The engine is restarted in the middle of a run: an engine of the test's own, so that no one else's is."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import anyio
import docker
import pytest

from errors import SandboxError, SandboxUnavailableError
from sandbox.base_image import ensure_base_image
from sandbox.docker_engine import connect
from sandbox.docker_sandbox import DockerSandboxFactory
from sandbox.reap import SANDBOX_LABEL
from sandbox.types import TimedOut

pytestmark = [pytest.mark.anyio, pytest.mark.docker, pytest.mark.slow]

START_TIMEOUT_S = 60.0


@pytest.fixture
def restart(client: docker.APIClient, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Starts the engine that DOCKER_HOST names during this test; called again, restarts it."""
    if os.geteuid() != 0 or not shutil.which("dockerd") or not shutil.which("unshare"):
        pytest.skip("only root can start an engine of its own, and needs dockerd and unshare for it")
    folder = Path(tempfile.mkdtemp(prefix="engine"))  # pytest's paths are too long for the engine's sockets
    monkeypatch.setenv("DOCKER_HOST", f"unix://{folder}/docker.sock")
    folders = [f"--{name}={folder}/{name}" for name in ("data-root", "exec-root", "pidfile")]
    # In a network namespace of its own: an engine without a bridge removes the machine's, which is the other engine's.
    command = [
        "unshare",
        "--net",
        "dockerd",
        f"--host=unix://{folder}/docker.sock",
        *folders,
        "--bridge=none",
        "--iptables=false",
    ]
    daemons: list[subprocess.Popen[bytes]] = []

    def stop() -> None:
        if daemons:
            daemons[-1].terminate()
            daemons[-1].wait(60)

    def start() -> None:
        stop()
        with (folder / "log").open("ab") as log:
            daemons.append(subprocess.Popen(command, stdout=log, stderr=log))
        until = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                return connect().close()
            except SandboxUnavailableError:
                if daemons[-1].poll() is not None or time.monotonic() > until:
                    pytest.skip(f"no second engine starts here: {(folder / 'log').read_text()[-500:]}")
                time.sleep(0.2)

    try:
        start()
        yield start
    finally:
        stop()
        shutil.rmtree(folder)


async def test_commands_fail_as_ours_and_the_run_goes_on_with_new_sandboxes(restart: Callable[[], None]):
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
        await anyio.to_thread.run_sync(restart)
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
