"""`DockerSandbox` on a real engine: the contract, seen from the engine's machine and from inside alone."""

from __future__ import annotations

import io
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
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


@pytest.mark.parametrize("runtime", ["runc", "runsc"])
async def test_a_runtime_is_passed_through(client: docker.APIClient, make: Make, runtime: str):
    if runtime in client.info()["Runtimes"]:
        sandbox = await make(SandboxConfig(runtime=runtime))
        assert client.inspect_container(sandbox.id)["HostConfig"]["Runtime"] == runtime
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


async def test_root_has_its_capabilities_in_an_image_of_a_plain_user_too(factory: DockerSandboxFactory, tmp_path: Path):
    (tmp_path / "Dockerfile").write_text("FROM protege-base\nUSER user\n")
    image = await factory.build_image(tmp_path, timeout_s=120)
    sandbox = await factory.create(image, SandboxConfig(capabilities=("CHOWN",)))
    await sandbox.run_command("echo mine > /tmp/x; chmod 600 /tmp/x", timeout_s=20)
    seen = "id -un; grep CapEff /proc/self/status; stat -c %u /tmp/x"
    plain = await sandbox.run_command(seen, timeout_s=20)
    assert plain.stdout.decode().split() == ["user", "CapEff:", "0" * 16, "1000"]
    root = await sandbox.run_command(f"chown 4321 /tmp/x; {seen}", timeout_s=20, user="0:0")
    assert root.stdout.decode().split() == ["root", "CapEff:", f"{1:016x}", "4321"]
    with pytest.raises(PermissionError):
        await sandbox.read_file("/tmp/x")
    await sandbox.cleanup()


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


async def test_what_a_command_leaves_readonly_does_not_break_the_next(sandbox: Sandbox):
    await sandbox.run_command("readonly __status=0 __back=/", timeout_s=20)
    result = await sandbox.run_command("pwd; (exit 3)", timeout_s=20, workdir="/tmp")
    assert (result.exit_code, result.stdout) == (3, b"/tmp\n")
    assert b"__status_" not in (await sandbox.run_command("true", timeout_s=20)).stdout


async def test_a_command_that_ends_its_shell_says_so(sandbox: Sandbox):
    ended = await sandbox.run_command("echo out; exit 3", timeout_s=20)
    after = await sandbox.run_command("true", timeout_s=20)
    assert (ended.ended_shell, after.ended_shell, after.shell_lost) == (True, False, True)


async def test_a_sandbox_survives_signals_to_all_processes(sandbox: Sandbox):
    for signal in ("TERM", "HUP", "INT", "QUIT", "USR1", "USR2"):
        await sandbox.run_command(f"kill -{signal} -1", timeout_s=20)
    assert (await sandbox.run_command("echo here", timeout_s=20)).stdout == b"here\n"


async def test_an_upload_that_complains_of_every_file_returns(make: Make, tmp_path: Path):
    for n in range(20_000):
        (tmp_path / f"{n:05}-{'x' * 100}").write_bytes(b"x" * 200)
    sandbox = await make(SandboxConfig(memory_mb=256, tmpfs_mb={"/small": 1}))
    with anyio.fail_after(120), pytest.raises(OSError, match="No space left"):
        await sandbox.upload_dir(tmp_path, "/small/there")
    assert (await sandbox.run_command("echo here", timeout_s=20)).stdout == b"here\n"
    await sandbox.cleanup()


RENAMED = r"""python3 - <<'E'
import ctypes, time
ctypes.CDLL(None).prctl(15, b"a) Z\nb", 0, 0, 0)
time.sleep(900)
E"""


async def test_seen_from_inside_a_process_cannot_pass_for_dead_by_its_name(make: Make, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(docker_sandbox, "host_view", lambda container, init_pid: None)
    sandbox = await make(CONFIG)
    with pytest.raises(TimedOut):
        await sandbox.run_command(RENAMED, timeout_s=3)
    found = await sandbox.run_command("grep -las 'time.sleep\\|python3' /proc/[0-9]*/cmdline; true", timeout_s=20)
    assert not [p for p in found.stdout.split() if b"self" not in p and len(p) > 0 and await alive(sandbox, p)]
    await sandbox.cleanup()


async def alive(sandbox: Sandbox, path: bytes) -> bool:
    """Whether a process of which /proc tells this file is a python."""
    return b"python3" in (await sandbox.run_command(f"tr '\\0' ' ' < {path.decode()}", timeout_s=20)).stdout[:10]


async def test_seen_from_inside_the_timeout_of_another_user_leaves_the_sandbox(
    make: Make, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(docker_sandbox, "host_view", lambda container, init_pid: None)
    sandbox = await make(CONFIG)
    await sandbox.run_command("sleep 900 &", timeout_s=20)
    with pytest.raises(TimedOut):
        await sandbox.run_command("sleep 900", timeout_s=2, user="nobody")
    assert (await sandbox.run_command("kill -0 %1 && echo here", timeout_s=20)).stdout == b"here\n"
    await sandbox.cleanup()


async def test_what_runs_apart_reads_nothing_and_a_failure_is_ours(sandbox: Sandbox):
    said = await sandbox.run_apart('echo "$A"; cat', timeout_s=20, env={"A": "b"}, user="nobody")
    assert said == b"b\n"
    with pytest.raises(SandboxError, match="failed with status 3: no"):
        await sandbox.run_apart("echo no >&2; exit 3", timeout_s=20)


async def test_closed_shells_start_anew_and_the_others_stay(sandbox: Sandbox):
    for user in (None, "nobody"):
        await sandbox.run_command("A=1; cd /tmp", timeout_s=20, user=user)
    await sandbox.close_shells("nobody")
    assert (await sandbox.run_command("echo $A", timeout_s=20)).stdout == b"1\n"
    assert (await sandbox.run_command("echo $A", timeout_s=20, user="nobody")).stdout == b"\n"
