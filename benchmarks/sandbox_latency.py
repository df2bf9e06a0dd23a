"""What a command costs in a sandbox, and many sandboxes at once; beside `docker exec` and inspect_ai's Docker sandbox.

    python -m benchmarks.sandbox_latency inspect_python=VENV/bin/python

The same image on the same engine, in one run, one after the other. `docker exec` is the low-level SDK's, as fast
as that can be called. `inspect_python` is an interpreter that has `inspect_ai` (it is no dependency of ours, and
needs `docker compose`); without it that row is left out.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anyio
import chz

from recipes.cli import run_cli
from sandbox.base_image import ensure_base_image
from sandbox.docker_engine import connect
from sandbox.docker_sandbox import DockerSandbox, DockerSandboxFactory
from sandbox.types import SandboxConfig

THROUGHPUT_S = 5.0


@chz.chz
class Config:
    commands: int = chz.field(default=500, doc="commands of ours; a tenth as many of the others'")
    sandboxes: int = chz.field(default=32, doc="created at once")
    inspect_python: str | None = chz.field(default=None, doc="an interpreter that has inspect_ai")


def main(config: Config) -> None:
    image = ensure_base_image()
    ours = anyio.run(our_commands, image, config.commands)
    execs = engine_commands(image, config.commands // 10)
    rows = {"run_command": ours["echo"], "write 1 KB": ours["write"], "read 1 KB": ours["read"], "docker exec": execs}
    if config.inspect_python is not None:
        rows["inspect_ai exec"] = inspect_commands(config.inspect_python, image, config.commands // 10)
    print("| what | median ms | p99 ms | run_command is faster by |\n|---|---|---|---|")
    for name, times in rows.items():
        ratio = statistics.median(times) / statistics.median(ours["echo"])
        p99 = sorted(times)[int(0.99 * (len(times) - 1))]
        print(f"| {name} | {statistics.median(times) * 1e3:.2f} | {p99 * 1e3:.2f} | {ratio:.0f}x |")
    rates = engine_throughput(image, config.sandboxes), anyio.run(our_throughput, image, config.sandboxes)
    print(f"\nCommands a second, {config.sandboxes} sandboxes at once: docker exec {rates[0]:.0f}, ours {rates[1]:.0f}")
    engine_s = engine_lives(image, config.sandboxes)
    ours_s = anyio.run(our_lives, image, config.sandboxes)
    print(f"\n{config.sandboxes} at once, created and removed: engine alone {engine_s:.1f} s, ours {ours_s[0]:.1f} s;")
    print(f"ours with a first command in each: {ours_s[1]:.1f} s")


async def timed(times: list[float], work: Callable[[], Awaitable[object]]) -> None:
    started = time.perf_counter()
    await work()
    times.append(time.perf_counter() - started)


async def our_commands(image: str, count: int) -> dict[str, list[float]]:
    sandbox = await (await DockerSandboxFactory.connect()).create(image)
    times: dict[str, list[float]] = {"echo": [], "write": [], "read": []}
    try:
        await sandbox.run_command("true", timeout_s=60)
        await sandbox.write_file("/tmp/file", bytes(1024))
        for _ in range(count):
            await timed(times["echo"], lambda: sandbox.run_command("echo hi", timeout_s=60))
        for _ in range(count // 5):
            await timed(times["write"], lambda: sandbox.write_file("/tmp/file", bytes(1024)))
            await timed(times["read"], lambda: sandbox.read_file("/tmp/file"))
    finally:
        await sandbox.cleanup()
    return times


def engine_commands(image: str, count: int) -> list[float]:
    with connect() as client:
        host = client.create_host_config(network_mode="none", auto_remove=True, init=True)
        container = client.create_container(image, ["sleep", "600"], host_config=host)["Id"]
        client.start(container)
        times = []
        for _ in range(count):
            started = time.perf_counter()
            assert client.exec_start(client.exec_create(container, ["echo", "hi"])["Id"]) == b"hi\n"
            times.append(time.perf_counter() - started)
        client.remove_container(container, force=True)
    return times


async def our_throughput(image: str, count: int) -> float:
    factory = await DockerSandboxFactory.connect()
    sandboxes = [await factory.create(image) for _ in range(count)]
    done = 0

    async def work(sandbox: DockerSandbox, until: float) -> None:
        nonlocal done
        while time.perf_counter() < until:
            assert (await sandbox.run_command("echo hi", timeout_s=60)).stdout == b"hi\n"
            done += 1

    try:
        for sandbox in sandboxes:
            await sandbox.run_command("true", timeout_s=60)
        async with anyio.create_task_group() as tasks:
            for sandbox in sandboxes:
                tasks.start_soon(work, sandbox, time.perf_counter() + THROUGHPUT_S)
    finally:
        for sandbox in sandboxes:
            await sandbox.cleanup()
    return done / THROUGHPUT_S


def engine_throughput(image: str, count: int) -> float:
    with connect() as client, ThreadPoolExecutor(count) as pool:
        host = client.create_host_config(network_mode="none", auto_remove=True, init=True)
        containers = [client.create_container(image, ["sleep", "600"], host_config=host)["Id"] for _ in range(count)]
        for container in containers:
            client.start(container)

        def work(container: str) -> int:
            done, until = 0, time.perf_counter() + THROUGHPUT_S
            while time.perf_counter() < until:
                assert client.exec_start(client.exec_create(container, ["echo", "hi"])["Id"]) == b"hi\n"
                done += 1
            return done

        total = sum(pool.map(work, containers))
        for container in containers:
            client.remove_container(container, force=True)
    return total / THROUGHPUT_S


def inspect_commands(python: str, image: str, count: int) -> list[float]:
    peer = Path(__file__).with_name("sandbox_inspect_peer.py")
    done = subprocess.run([python, str(peer), image, str(count)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{python} {peer.name} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def engine_lives(image: str, count: int) -> float:
    """Containers of the same kind, created, started and removed by as many threads as the factory uses."""
    with connect() as client:
        cores = int(client.info()["NCPU"])

        def live(_: int) -> None:
            host = client.create_host_config(network_mode="none", auto_remove=True, init=True, cap_drop=["ALL"])
            container = client.create_container(image, ["sleep", "600"], host_config=host)["Id"]
            client.start(container)
            client.remove_container(container, force=True)

        started = time.perf_counter()
        with ThreadPoolExecutor(2 * cores) as pool:
            list(pool.map(live, range(count)))
        return time.perf_counter() - started


async def our_lives(image: str, count: int) -> tuple[float, float]:
    factory = await DockerSandboxFactory.connect()
    seconds = []
    for with_command in (False, True):

        async def live(with_command: bool) -> None:
            sandbox = await factory.create(image, SandboxConfig())
            try:
                if with_command:
                    assert (await sandbox.run_command("echo hi", timeout_s=120)).stdout == b"hi\n"
            finally:
                await sandbox.cleanup()

        started = time.perf_counter()
        async with anyio.create_task_group() as tasks:
            for _ in range(count):
                tasks.start_soon(live, with_command)
        seconds.append(time.perf_counter() - started)
    return seconds[0], seconds[1]


if __name__ == "__main__":
    run_cli(main, Config)
