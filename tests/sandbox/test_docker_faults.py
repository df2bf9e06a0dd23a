"""What happens to sandboxes when things die: containers, owners, tasks. Nothing is left, and no account is false."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path

import anyio
import docker
import psutil
import pytest
from own_engine import OwnEngine

from errors import SandboxError
from sandbox import shell
from sandbox.base_image import ensure_base_image
from sandbox.docker_engine import connect
from sandbox.docker_sandbox import DockerSandbox, DockerSandboxFactory
from sandbox.reap import SANDBOX_LABEL, reap
from sandbox.types import SandboxConfig, TimedOut

pytestmark = [pytest.mark.anyio, pytest.mark.docker]

ROOT = Path(__file__).parents[2]
SMALL = SandboxConfig(memory_mb=256, pids=64)

KILL_KEEPER = """
for p in /proc/[0-9]*; do [[ $(tr '\\0' ' ' < $p/cmdline) == "bash -p"* ]] && kill -9 ${p#/proc/}; done
sleep 5
"""

OWNER = """
import sys, anyio
from sandbox.docker_sandbox import DockerSandboxFactory
async def main():
    factory = await DockerSandboxFactory.connect(sys.argv[1])
    sandbox = await factory.create(sys.argv[2])
    await sandbox.run_command(sys.argv[3], timeout_s=10)
    print(sandbox.id, flush=True)
    await anyio.sleep_forever()
anyio.run(main)
"""


def names(client: docker.APIClient, run: str) -> list[str]:
    found = client.containers(all=True, filters={"label": f"{SANDBOX_LABEL}={run}"})
    return [container["Names"][0].lstrip("/") for container in found]


async def failure_of(work: Awaitable[object]) -> SandboxError | None:
    """For task groups, in which `pytest.raises` would end pytest itself when nothing is raised."""
    try:
        await work
    except SandboxError as error:
        return error
    return None


async def until(holds: Callable[[], bool], within_s: float = 10.0) -> None:
    with anyio.fail_after(within_s):
        while not holds():
            await anyio.sleep(0.05)


@pytest.mark.parametrize("kill", ["kill", "remove", "from inside"])
@pytest.mark.parametrize("busy", [True, False])
async def test_a_container_that_dies_is_our_failure_and_not_the_commands(
    client: docker.APIClient, factory: DockerSandboxFactory, image: str, kill: str, busy: bool
):
    sandbox = await factory.create(image, SMALL)
    await sandbox.run_command("A=1", timeout_s=10)

    async def strike() -> None:
        await anyio.sleep(0.5)
        if kill == "kill":
            await anyio.to_thread.run_sync(client.kill, sandbox.id)
        elif kill == "remove":
            await anyio.to_thread.run_sync(partial(client.remove_container, sandbox.id, force=True))
        else:
            await sandbox.run_command(KILL_KEEPER, timeout_s=8)

    if busy and kill != "from inside":
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(strike)
            failure = await failure_of(sandbox.run_command("sleep 900", timeout_s=30))
        assert isinstance(failure, SandboxError) and not isinstance(failure, TimedOut)
    else:
        assert (await failure_of(strike()) is not None) == (kill == "from inside")
    with pytest.raises(SandboxError):
        await sandbox.run_command("echo $A", timeout_s=10)
    await sandbox.cleanup()


async def test_a_frozen_sandbox_is_given_up_and_removed(
    client: docker.APIClient, factory: DockerSandboxFactory, image: str, monkeypatch: pytest.MonkeyPatch
):
    writing, running = await factory.create(image, SMALL), await factory.create(image, SMALL)
    for sandbox in (writing, running):
        await sandbox.write_file("/tmp/x", b"1")
        await sandbox.run_command("true", timeout_s=10)
        client.pause(sandbox.id)
    monkeypatch.setattr(shell, "STALLED_S", 1.0)
    with anyio.fail_after(30):
        assert "nothing has gone into it" in str(await failure_of(writing.write_file("/tmp/y", bytes(10**7))))
        failure = await failure_of(running.run_command("echo x", timeout_s=1.0))
    assert failure is not None and not isinstance(failure, TimedOut)
    assert names(client, factory._run) == []


@pytest.fixture
def owner(image: str, request: pytest.FixtureRequest):
    """A process that owns a sandbox, in which something runs: its run, its sandbox's name, itself."""
    work = getattr(request, "param", "sleep 900 &")
    run = f"owner{os.getpid()}-{time.monotonic_ns()}"
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, run, image, work], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    yield run, process.stdout.readline().strip(), process
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize("owner", ["sleep 900 &", "b() { b | b & }; b"], indirect=True, ids=["at rest", "fork bomb"])
async def test_the_sandbox_of_a_killed_owner_ends_by_itself(client: docker.APIClient, owner):
    run, name, process = owner
    assert names(client, run) == [name]
    process.send_signal(signal.SIGKILL)
    await until(lambda: names(client, run) == [], within_s=30.0)


@pytest.fixture
def engine(client: docker.APIClient, monkeypatch: pytest.MonkeyPatch) -> Iterator[docker.APIClient]:
    """One on which nobody else's run begins, which would reap as well."""
    with OwnEngine() as engine:
        monkeypatch.setenv("DOCKER_HOST", engine.host)
        engine.start()
        ensure_base_image()
        with connect() as own:
            yield own


async def test_what_a_killed_owner_left_is_reaped_and_a_living_owners_is_not(
    engine: docker.APIClient, image: str, owner
):
    client, (run, name, process) = engine, owner
    mine = await (await DockerSandboxFactory.connect("mine")).create(image, SMALL)
    assert name not in [reaped.name for reaped in reap(client)]
    client.pause(name)  # its keeper cannot see that the owner dies
    process.send_signal(signal.SIGKILL)
    process.wait()
    await anyio.sleep(1.0)
    assert names(client, run) == [name]
    command = [sys.executable, "-m", "sandbox.reap"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"removed {name}: its owner, process {process.pid}, is dead\n" in said
    assert names(client, run) == []
    assert (await mine.run_command("echo here", timeout_s=10)).stdout == b"here\n"
    await mine.cleanup()


async def test_many_are_created_at_once(client: docker.APIClient, factory: DockerSandboxFactory, image: str):
    answers: list[bytes] = []

    async def live(n: int) -> None:
        sandbox = await factory.create(image, SMALL)
        answers.append((await sandbox.run_command(f"echo {n}", timeout_s=60)).stdout)
        await sandbox.cleanup()

    async with anyio.create_task_group() as tasks:
        for n in range(32):
            tasks.start_soon(live, n)
    assert sorted(answers) == sorted(f"{n}\n".encode() for n in range(32))


@pytest.mark.parametrize("delay_s", [0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5])
async def test_cancelling_at_any_moment_leaves_nothing(
    client: docker.APIClient, factory: DockerSandboxFactory, image: str, delay_s: float, tmp_path: Path
):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "data").write_bytes(bytes(50_000_000))

    async def live() -> None:
        sandbox = await factory.create(image, SMALL)
        try:
            await sandbox.run_command("sleep 0.05", timeout_s=60)
            await sandbox.write_file("/tmp/x", bytes(20_000_000))
            await sandbox.upload_dir(tmp_path / "source", "/tmp/there")
            await sandbox.read_file("/tmp/x")
        finally:
            await sandbox.cleanup()

    with anyio.move_on_after(delay_s):
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(live)
    run = factory._run
    await until(lambda: names(client, run) == [])


async def test_a_flood_takes_bounded_memory_and_leaves_the_others_running(factory: DockerSandboxFactory, image: str):
    flooding, other = await factory.create(image, SMALL), await factory.create(image, SMALL)
    await other.run_command("true", timeout_s=10)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answers = 0

    async def flood() -> None:
        failure = await failure_of(flooding.run_command("yes", timeout_s=4))
        assert isinstance(failure, TimedOut) and failure.result.stdout_bytes > 10**7
        assert len(failure.result.stdout) == SMALL.max_output_bytes

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(flood)
        await anyio.sleep(1.0)
        while answers < 20:
            assert (await other.run_command("echo here", timeout_s=2)).stdout == b"here\n"
            answers += 1
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 64  # MiB


async def test_waiting_costs_no_cpu_and_no_thread_each(factory: DockerSandboxFactory, image: str):
    sandboxes = [await factory.create(image, SMALL) for _ in range(6)]
    async with anyio.create_task_group() as tasks:
        for sandbox in sandboxes:
            tasks.start_soon(partial(sandbox.run_command, "sleep 4", timeout_s=60))
        await anyio.sleep(1.5)
        threads, used = threading.active_count(), time.process_time()
        await anyio.sleep(2.0)
        assert time.process_time() - used < 0.4
        assert threading.active_count() <= threads <= 2 * (os.cpu_count() or 1) + 16 + 4


@pytest.mark.slow
async def test_hundreds_of_lives_leave_no_container_descriptor_or_thread(
    client: docker.APIClient, factory: DockerSandboxFactory, image: str
):
    async def live(sandbox_number: int) -> None:
        sandbox = await factory.create(image, SMALL)
        try:
            await live_one(sandbox, sandbox_number)
        finally:
            await sandbox.cleanup()

    async def live_one(sandbox: DockerSandbox, n: int) -> None:
        fate = n % 5
        if fate == 0:
            failure = await failure_of(sandbox.run_command("sleep 900 & sleep 900", timeout_s=0.3))
            assert isinstance(failure, TimedOut)
        elif fate == 1:
            assert (await sandbox.run_command("sleep 900 & exit 3", timeout_s=30)).exit_code == 3
        elif fate == 2:
            client.kill(sandbox.id)
            failure = await failure_of(sandbox.run_command("echo x", timeout_s=30))
            assert failure is not None and not isinstance(failure, TimedOut)
        elif fate == 3:
            with anyio.move_on_after(0.2):
                await sandbox.run_command("sleep 900", timeout_s=30)
        else:
            await sandbox.write_file("/tmp/f", b"x")
            assert await sandbox.read_file("/tmp/f") == b"x"

    async def lives(first: int, count: int) -> None:
        for n in range(first, first + count):
            await live(n)

    await lives(0, 5)
    me = psutil.Process()
    descriptors = me.num_fds()
    async with anyio.create_task_group() as tasks:
        for worker in range(8):
            tasks.start_soon(lives, worker * 25, 25)
    assert names(client, factory._run) == []
    assert me.num_fds() <= descriptors + 32  # connections that the SDK keeps for later; a leak would be one per life
    assert threading.active_count() <= 2 * (os.cpu_count() or 1) + 16 + 8
