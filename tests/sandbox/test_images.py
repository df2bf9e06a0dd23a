"""Images from folders: what is built, how often, and what a failure says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import anyio
import docker
import pytest

from errors import DataError, ImageBuildError
from sandbox import images
from sandbox.docker_engine import Engine
from sandbox.docker_sandbox import DockerSandboxFactory
from sandbox.images import REPOSITORY, content_hash, context_paths, locked_file

pytestmark = pytest.mark.anyio
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PROTEGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "images"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A build context that no other test or run has."""
    folder = tmp_path / "context"
    folder.mkdir()
    (folder / "Dockerfile").write_text("FROM protege-base\nCOPY . /there\nRUN echo $RANDOM > /number\n")
    (folder / "unique").write_text(os.urandom(8).hex())
    return folder


def digest(folder: Path) -> str:
    return content_hash(folder, context_paths(folder), [])


def test_every_byte_name_and_mode_counts_and_times_do_not(folder: Path):
    seen = {digest(folder)}
    for change in (
        lambda: (folder / "unique").write_text("other"),
        lambda: (folder / "unique").chmod(0o755),
        lambda: (folder / "unique").rename(folder / "renamed"),
        lambda: (folder / "empty").mkdir(),
        lambda: (folder / "link").symlink_to("renamed"),
    ):
        change()
        assert digest(folder) not in seen
        seen.add(digest(folder))
    os.utime(folder / "renamed", (1, 1))
    assert digest(folder) in seen


def test_what_dockerignore_names_does_not_count(folder: Path):
    (folder / ".dockerignore").write_text("# why\nsecret*\n!secret2\n")
    before = digest(folder)
    (folder / "secret1").write_text("x")
    assert digest(folder) == before
    (folder / "secret2").write_text("x")
    assert digest(folder) != before


HOLDER = """
import sys, anyio
from pathlib import Path
from sandbox.images import locked_file
async def main():
    async with locked_file(Path(sys.argv[1]), 1.0):
        print("held", flush=True)
        await anyio.sleep_forever()
anyio.run(main)
"""


async def test_a_process_that_is_stopped_over_an_image_is_named_and_one_that_is_killed_lets_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(images, "TELL_S", 0.1)
    path = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, cwd=ROOT) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        holder.send_signal(signal.SIGSTOP)
        with anyio.fail_after(10), pytest.raises(ImageBuildError, match=rf"^process {holder.pid} has held .*Ctrl-Z"):
            async with locked_file(path, 0.5):
                pass
        assert caplog.messages == [
            f"waiting for process {holder.pid}, which is making an image that is needed here, too ({path})"
        ]
        holder.kill()
        async with locked_file(path, 10.0):
            assert path.read_text() == str(os.getpid())


async def test_who_waits_for_a_turn_keeps_no_other_process_from_its_image(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    """Else a queue of builds here would pass for a process there that is stopped."""
    making, made = images.Images(Engine(None), {}), []  # type: ignore[arg-type]
    monkeypatch.setattr(making, "_builds", anyio.CapacityLimiter(1))

    async def make(name: str) -> None:
        async with making._once(name, 10.0):
            made.append(name)
            await anyio.sleep(0.5)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(make, "first")
        tasks.start_soon(make, "second")
        await anyio.sleep(0.1)
        async with locked_file(images.cache_folder() / "second.lock", 0.0):
            assert made == ["first"]
    assert made == ["first", "second"]


HEREDOCS = r"""# escape=`
FROM protege-base
WORKDIR /made
RUN echo "a <<EOF b" > quoted; python3 -c 'print(1<<3, "1 <<SHIFT")' > printed; SHIFT=1; echo $((1<<SHIFT)) > shifted
RUN <<ONE cat > one && <<-'TWO' cat > two
value $((1 + 1))
ONE
	# no comment
	$HOME
	TWO
RUN --mount=type=cache,target=/nowhere `
    # a comment in between
    <<EOF
set -e
printf 'a\n\tb\n' > script
# a comment of the script
echo "`pwd`" >> script
EOF
RUN <<EOF
#!/usr/bin/env python3
open("python", "w").write("EOF \\\n")
EOF
SHELL ["/bin/bash", "-eu", "-c"]
RUN <<EOF
array=(x y)
cat <<<"${array[1]}" > bash
EOF
COPY <<first.txt <<-"second" /made/
1 \
first.txt
	"2"
	second
ONBUILD RUN cat <<EOF > /later
EOF
"""
HEREDOC_FILES = {
    "quoted": "a <<EOF b\n",
    "printed": "8 1 <<SHIFT\n",
    "shifted": "2\n",
    "one": "value 2\n",
    "two": "# no comment\n$HOME\n",
    "script": "a\n\tb\n/made\n",
    "python": "EOF \\\n",
    "bash": "y\n",
    "first.txt": "1 \\\n",
    "second": '"2"\n',
}


@pytest.mark.docker
class TestOnAnEngine:
    @pytest.fixture(autouse=True)
    def no_leftovers(self, client: docker.APIClient, image: str) -> Iterator[None]:
        before = {found["Id"] for found in client.images(REPOSITORY)}
        yield
        for found in client.images(REPOSITORY):
            if found["Id"] not in before:
                client.remove_image(found["Id"], force=True)

    async def test_an_image_is_built_once_however_many_ask(
        self, factory: DockerSandboxFactory, folder: Path, cache: Path
    ):
        names: set[str] = set()

        async def build(builder: DockerSandboxFactory) -> None:
            names.add(await builder.build_image(folder, timeout_s=60))

        other = await DockerSandboxFactory.connect()
        async with anyio.create_task_group() as tasks:
            for n in range(6):
                tasks.start_soon(build, [factory, other][n % 2])
        assert len(names) == 1
        (log,) = cache.glob("*.log")
        assert log.read_text().count("Step 3/3") == 1
        log.unlink()
        assert {await other.build_image(folder, timeout_s=60)} == names
        assert not log.exists()
        sandbox = await factory.create(names.pop())
        assert b"unique" in (await sandbox.run_command("ls /there", timeout_s=10)).stdout

    async def test_what_dockerignore_names_is_not_inside(self, factory: DockerSandboxFactory, folder: Path):
        (folder / ".dockerignore").write_text("unique\n")
        sandbox = await factory.create(await factory.build_image(folder, timeout_s=60))
        assert b"unique" not in (await sandbox.run_command("ls -a /there", timeout_s=10)).stdout

    async def test_a_failing_build_names_its_step_and_its_log(
        self, client: docker.APIClient, factory: DockerSandboxFactory, folder: Path
    ):
        (folder / "Dockerfile").write_text("FROM protege-base\nRUN true\nRUN echo oh no; exit 3\n")
        with pytest.raises(ImageBuildError, match=r"step 3/3, RUN echo oh no; exit 3.*code: 3.*log: ") as caught:
            await factory.build_image(folder, timeout_s=60)
        log = Path(str(caught.value).partition("log: ")[2].rstrip(")"))
        assert "oh no\n" in log.read_text()
        assert [found for found in client.containers(all=True) if "oh no" in found["Command"]] == []

    async def test_a_failure_is_shared_by_who_waited_for_it(self, factory: DockerSandboxFactory, folder: Path):
        (folder / "Dockerfile").write_text("FROM protege-base\nRUN sleep 1; exit 3\n")
        errors: list[ImageBuildError] = []

        async def build() -> None:
            try:
                await factory.build_image(folder, timeout_s=60)
            except ImageBuildError as error:
                errors.append(error)

        async with anyio.create_task_group() as tasks:
            for _ in range(4):
                tasks.start_soon(build)
        assert len(errors) == 4 and len({id(error) for error in errors}) == 1

    @pytest.mark.parametrize("how", ["timeout", "cancelled"])
    async def test_a_build_that_nobody_waits_for_ends(
        self, client: docker.APIClient, factory: DockerSandboxFactory, folder: Path, how: str
    ):
        mark = os.urandom(4).hex()
        (folder / "Dockerfile").write_text(f"FROM protege-base\nRUN : {mark}; sleep 300\n")
        if how == "timeout":
            with pytest.raises(ImageBuildError, match=r"step 2/2.*longer than 2 s"):
                await factory.build_image(folder, timeout_s=2)
        else:
            with anyio.move_on_after(2) as scope:
                await factory.build_image(folder, timeout_s=60)
            assert scope.cancelled_caught
        with anyio.fail_after(20):
            while any(mark in found["Command"] for found in client.containers(all=True)):
                await anyio.sleep(0.2)

    async def test_published_dockerfiles_build_on_local_images(self, folder: Path):
        factory = await DockerSandboxFactory.connect(substitutes={"ubuntu:24.04": "protege-base"})
        (folder / "Dockerfile").write_text("FROM ubuntu:24.04\nARG WHO\nRUN echo $WHO > /who\n")
        image = await factory.build_image(folder, timeout_s=60, args={"WHO": "me"})
        assert image != await factory.build_image(folder, timeout_s=60, args={"WHO": "you"})
        sandbox = await factory.create(image)
        assert await sandbox.read_file("/who") == b"me\n"
        await sandbox.cleanup()
        sandbox = await factory.create("ubuntu:24.04")
        assert (await sandbox.run_command("true", timeout_s=10)).exit_code == 0
        await sandbox.cleanup()

    async def test_heredocs_build_what_dockers_own_builder_makes_of_them(
        self, factory: DockerSandboxFactory, folder: Path
    ):
        (folder / "Dockerfile").write_text(HEREDOCS)
        sandbox = await factory.create(await factory.build_image(folder, timeout_s=120))
        for path, content in HEREDOC_FILES.items():
            assert await sandbox.read_file(f"/made/{path}") == content.encode(), path
        await sandbox.cleanup()

    async def test_what_is_missing_is_named(self, factory: DockerSandboxFactory, tmp_path: Path):
        with pytest.raises(ImageBuildError, match="no image localhost:1/nowhere:1"):
            await factory.create("localhost:1/nowhere:1")
        with pytest.raises(DataError, match="Dockerfile"):
            await factory.build_image(tmp_path, timeout_s=10)


@pytest.mark.parametrize(
    ("image", "asked"),
    [
        ("a/b", ("a/b", "latest")),
        ("host:5000/b:2", ("host:5000/b", "2")),
        ("host:5000/b", ("host:5000/b", "latest")),
        (f"ubuntu@sha256:{'1' * 64}", ("ubuntu", f"sha256:{'1' * 64}")),
    ],
)
@pytest.mark.anyio
async def test_tags_and_digests_are_pulled_by_what_they_are(
    image: str, asked: tuple[str, str], cache: Path, monkeypatch: pytest.MonkeyPatch
):
    class Registry:
        answer = None

        def pull(self, repository: str, tag: str, **options: object) -> list[dict]:
            pulls.append((repository, tag))
            return []

        def __enter__(self):
            return self

        def __exit__(self, *args: object) -> None:
            pass

    pulls: list[tuple[str, str]] = []
    monkeypatch.setattr(images.CuttableClient, "pull", Registry.pull)
    monkeypatch.setattr(images.Images, "_client", lambda self: client())

    async def client() -> Registry:
        return Registry()

    await images.Images(Engine(None), {})._pull(image, 10.0)  # type: ignore[arg-type]
    assert pulls == [asked]
