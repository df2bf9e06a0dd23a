"""Images: built from a folder with a Dockerfile once per content, or pulled by name once.

A built image is tagged with a hash of all that goes into it, so another task, process or run finds it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any

import anyio
import docker
import docker.errors
import requests
from anyio import CancelScope, CapacityLimiter, to_thread
from docker.utils import parse_repository_tag
from docker.utils.build import create_archive, exclude_paths

from errors import DataError, ImageBuildError
from sandbox.base_image import REPOSITORY as BASE_IMAGE
from sandbox.base_image import ensure_base_image
from sandbox.calls import call_in_thread
from sandbox.docker_engine import ENGINE_ERRORS, Engine, connect, said_by, suppress_os_errors
from sandbox.dockerfile import base_images, for_any_engine, substitute, with_substitutes

logger = logging.getLogger(__name__)

REPOSITORY = "protege-image"
FORMAT = "1"  # raise it when the same folder would be built otherwise
PULL_TIMEOUT_S = 1800.0
LOCK_POLL_S = 0.2
ROUND_IT_S = 60.0  # what making an image takes besides the making: connecting, sending it, cutting it off
TELL_S = 10.0  # who waits longer for another process says so
CUT_S = 5.0  # that an answer which is cut off may take to end; it is left behind where the engine has not begun it
STEP = re.compile(r"^STEP (\d+/\d+) ?: (.*)", re.IGNORECASE)


def cache_folder() -> Path:
    """$PROTEGE_CACHE/images: build logs, and the locks that keep two processes from building the same."""
    folder = Path(os.environ.get("PROTEGE_CACHE", "~/.cache/protege")).expanduser() / "images"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Images:
    """The images of one engine. `substitutes` name images to take instead of others, in Dockerfiles and by name."""

    def __init__(self, engine: Engine, substitutes: Mapping[str, str]) -> None:
        self._engine = engine
        self._substitutes = dict(substitutes)
        self._builds = CapacityLimiter(max(1, engine.cores))
        self._locks: dict[str, anyio.Lock] = {}
        self._failures: dict[str, tuple[float, ImageBuildError]] = {}

    async def ensure(self, image: str, timeout_s: float = PULL_TIMEOUT_S) -> str:
        """The name to use for `image`; pulled if the engine does not have it. Raises `ImageBuildError`."""
        image = substitute(image, self._substitutes)
        if image.partition(":")[0] == BASE_IMAGE:
            await self._engine.in_thread(ensure_base_image)
        if not await self._has(image):
            async with self._once(image, timeout_s):
                if not await self._has(image):  # pulled by who was first
                    await self._pull(image, timeout_s)
        return image

    async def build(
        self, folder: Path, timeout_s: float, dockerfile: str = "Dockerfile", args: Mapping[str, str] | None = None
    ) -> str:
        """The built image's name. Raises `DataError` without a Dockerfile, `ImageBuildError` if a step fails."""
        text = read_dockerfile(folder / dockerfile)
        bases = base_images(text, args)
        text, extra = for_any_engine(with_substitutes(text, self._substitutes, args))
        after = base_images(text, args)
        local = [image for image in after if image not in bases or image.partition(":")[0] == BASE_IMAGE]
        if any(image.partition(":")[0] == BASE_IMAGE for image in local):
            await self._engine.in_thread(ensure_base_image)
        ids = [await self._id(image) for image in local]
        paths = await to_thread.run_sync(context_paths, folder)
        digest = await to_thread.run_sync(
            content_hash, folder, paths, [FORMAT, text, json.dumps([args or {}, extra]), *ids]
        )
        name = f"{REPOSITORY}:{digest[:24]}"
        if await self._has(name):
            return name
        async with self._once(name, timeout_s):
            if not await self._has(name):  # built by who was first
                await self._build(Build(folder, paths, text, extra, dict(args or {}), name), timeout_s)
        return name

    @contextlib.asynccontextmanager
    async def _once(self, name: str, timeout_s: float) -> AsyncIterator[None]:
        """One task of one process at a time. Who waited while another failed at it fails with the same error."""
        asked = time.monotonic()
        async with self._locks.setdefault(name, anyio.Lock()):
            failed = self._failures.get(name)
            if failed is not None and failed[0] >= asked:
                raise failed[1]
            try:  # a turn first: who holds the lock works, and another process can tell how long that may take
                lock = cache_folder() / f"{safe_name(name)}.lock"
                async with self._builds, locked_file(lock, timeout_s + ROUND_IT_S):
                    yield
            except ImageBuildError as error:
                self._failures[name] = (time.monotonic(), error)
                raise

    async def _has(self, image: str) -> bool:
        return bool(await self._id(image))

    async def _id(self, image: str) -> str:
        """Empty: the engine does not have it."""

        def look() -> str:
            try:
                return str(self._engine.client.inspect_image(image)["Id"])
            except docker.errors.ImageNotFound:
                return ""

        return await self._engine.call(f"looking for image {image}", look)

    async def _client(self) -> CuttableClient:
        """One of its own for every long answer, so that cutting one leaves the others alone."""
        return await self._engine.in_thread(connect, CuttableClient)

    async def _build(self, build: Build, timeout_s: float) -> None:
        log = cache_folder() / f"{safe_name(build.name)}.log"
        with tempfile.TemporaryFile() as context:
            await to_thread.run_sync(build.write_context, context)
            context.seek(0)
            answer = Answer(await self._client(), lambda client: client.build(**build.options(context)), log)
            await self._follow(answer, f"building {build.folder}", timeout_s)

    async def _pull(self, image: str, timeout_s: float) -> None:
        repository, tag = parse_repository_tag(image)  # a digest is a tag to the engine
        log = cache_folder() / f"{safe_name(image)}.log"
        ask = partial(CuttableClient.pull, repository=repository, tag=tag or "latest", stream=True, decode=True)
        answer = Answer(await self._client(), ask, log)
        await self._follow(answer, f"the engine has no image {image}, and pulling it", timeout_s)

    async def _follow(self, answer: Answer, what: str, timeout_s: float) -> None:
        """Reads the engine's answer to its end, which is the end of the work, too. Cancelling it ends the work."""
        reading = call_in_thread(answer.read)
        try:
            with anyio.move_on_after(timeout_s) as limit:
                await self._engine.outcome(reading)
            if limit.cancelled_caught:
                answer.problem = f"took longer than {timeout_s:g} s"
        finally:
            answer.cut()
            with CancelScope(shield=True):
                await asyncio.wait([reading], timeout=CUT_S)
        if answer.problem:
            raise ImageBuildError(f"{what} failed{answer.where()}: {answer.problem} (log: {answer.log})")


class Build:
    """One image to be built: its name, and what goes into it."""

    def __init__(
        self,
        folder: Path,
        paths: list[str],
        dockerfile: str,
        extra: Mapping[str, str],
        args: dict[str, str],
        name: str,
    ) -> None:
        self.folder = folder
        self.name = name
        self._paths = paths
        self._dockerfile = dockerfile
        self._extra = extra  # files by their path, besides those of the folder
        self._args = args

    def write_context(self, target: IO[bytes]) -> None:
        extra = [(self._dockerfile_name, self._dockerfile), *self._extra.items()]
        create_archive(str(self.folder), self._paths, target, extra_files=extra)

    @property
    def _dockerfile_name(self) -> str:
        return f".dockerfile-{safe_name(self.name)}"

    def options(self, context: IO[bytes]) -> dict[str, Any]:
        """Arguments of the SDK's `build`."""
        return {
            "fileobj": context,
            "custom_context": True,
            "dockerfile": self._dockerfile_name,
            "tag": self.name,
            "buildargs": self._args,
            "rm": True,
            "forcerm": True,  # a failed step would leave its container
            "decode": True,
        }


class CuttableClient(docker.APIClient):
    """Remembers the answer that it is reading, so that another thread can cut it off."""

    answer: requests.Response | None = None

    def send(self, request: requests.PreparedRequest, **kwargs: Any) -> requests.Response:
        self.answer = super().send(request, **kwargs)
        return self.answer


class Answer:
    """A long answer of the engine, kept in a log file as it comes; its connection is the work's life."""

    def __init__(
        self, client: CuttableClient, ask: Callable[[CuttableClient], Iterator[dict[str, Any]]], log: Path
    ) -> None:
        self.log = log
        self.problem = ""
        self._step = ""
        self._ask = ask
        self._client = client
        self._cut = False

    def read(self) -> None:
        """Blocks until the work has ended, or `cut`."""
        try:
            with self.log.open("w", encoding="utf-8") as log, self._client:
                messages = self._ask(self._client)  # blocks until the engine begins to answer
                for message in () if self._cut else messages:
                    log.write(self._text_of(message))
                    log.flush()
        except (*ENGINE_ERRORS, ValueError) as error:
            self.problem = self.problem or said_by(error)

    def cut(self) -> None:
        """Once the engine has begun to answer, its work ends with this. Before, `read` may go on, and ends when it
        has."""
        self._cut = True
        with suppress_os_errors():
            if self._client.answer is not None:
                raw: Any = self._client.answer.raw
                raw._fp.fp.raw._sock.shutdown(socket.SHUT_RDWR)

    def where(self) -> str:
        return f" at {self._step}" if self._step else ""

    def _text_of(self, message: dict[str, Any]) -> str:
        if "error" in message:
            self.problem = self.problem or str(message["error"]).strip()
            return f"{message['error']}\n"
        text = str(message.get("stream", ""))
        if found := STEP.match(text):
            self._step = f"step {found[1]}, {found[2].strip()}"
        if "status" in message and "progress" not in message:
            return f"{message.get('id', '')} {message['status']}\n".lstrip()
        return text


def read_dockerfile(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}. An image needs a folder with a Dockerfile") from error


def context_paths(folder: Path) -> list[str]:
    """The paths that are sent to the engine: all but what .dockerignore names."""
    ignore = folder / ".dockerignore"
    lines = ignore.read_text(encoding="utf-8").splitlines() if ignore.exists() else []
    patterns = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    return sorted(exclude_paths(str(folder), patterns))


def content_hash(folder: Path, paths: list[str], texts: list[str]) -> str:
    """Of every path, mode, link and byte of the context, and of `texts`. Times do not count."""
    digest = hashlib.sha256()

    def add(*parts: bytes) -> None:
        for part in parts:
            digest.update(len(part).to_bytes(8, "big") + part)

    add(*(text.encode() for text in texts))
    for name in paths:
        path = folder / name
        kind = b"link" if path.is_symlink() else b"folder" if path.is_dir() else b"file"
        add(os.fsencode(name), kind, b"" if kind == b"link" else str(path.stat().st_mode & 0o7777).encode())
        if kind == b"link":
            add(os.fsencode(os.readlink(path)))
        elif path.is_file():
            with path.open("rb") as file:
                add(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


@contextlib.asynccontextmanager
async def locked_file(path: Path, timeout_s: float) -> AsyncIterator[None]:
    """Held by one process at a time; let go by the kernel if that dies. Raises `ImageBuildError` if another holds it
    for `timeout_s`."""
    with path.open("a+") as file:
        await _lock(file, path, timeout_s)
        file.truncate(0)
        file.write(str(os.getpid()))  # for those who wait
        file.flush()
        yield


async def _lock(file: IO[str], path: Path, timeout_s: float) -> None:
    began, told = time.monotonic(), False
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waited = time.monotonic() - began
        file.seek(0)
        holder = f"process {file.read() or '(unknown)'}"
        if waited > timeout_s:
            raise ImageBuildError(
                f"{holder} has held {path} for {waited:.0f} s, longer than making that image may take: is it stopped "
                "(Ctrl-Z) or frozen? Let it go on (kill -CONT), or end it"
            )
        if waited > TELL_S and not told:
            logger.warning("waiting for %s, which is making an image that is needed here, too (%s)", holder, path)
            told = True
        await anyio.sleep(LOCK_POLL_S)


def safe_name(image: str) -> str:
    return re.sub(r"[^\w.-]", "_", image)
