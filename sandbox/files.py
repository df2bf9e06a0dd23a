"""Files in and out of a sandbox, through a shell that runs nothing but our own scripts.

Works on tmpfs and under a read-only root, where the engine's own archive calls do not. Needs `cat`, `head`,
`mkdir`, `chmod` and `tar` in the image, GNU's or busybox's.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import tempfile
from collections.abc import Awaitable
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

from anyio import to_thread

from errors import SandboxError
from sandbox.archives import pack, unpack
from sandbox.shell_stream import FileSink, HeadTail, Sink

READ_LIMIT_BYTES = 256 * 2**20
FOLDER_LIMIT_BYTES = 2 * 2**30
COMPLAINT_BYTES = 4000
ERRORS = {os.strerror(number): number for number in errno.errorcode}


class RunScript(Protocol):
    """Runs one script of ours as `user`; its exit code. `payload` is on its standard input."""

    def __call__(
        self, script: str, *, stdout: Sink, stderr: Sink, payload: IO[bytes] | None = None, user: str | None = None
    ) -> Awaitable[int]: ...


async def read_file(run: RunScript, path: str, max_bytes: int | None, user: str | None) -> bytes:
    limit = READ_LIMIT_BYTES if max_bytes is None else max_bytes
    name = quoted(path)
    content, complaint = HeadTail(limit), HeadTail(COMPLAINT_BYTES)
    # A pipe or a device would be read for ever.
    script = (
        f"if [ -d {name} ]; then echo 'Is a directory' >&2; false; "
        f"elif [ -e {name} ] && [ ! -f {name} ]; then echo 'Operation not permitted' >&2; false; "
        f"else head -c {limit + 1} < {name}; fi"
    )
    exit_code = await run(script, stdout=content, stderr=complaint, user=user)
    raise_if_failed(exit_code, complaint, path)
    if content.total > limit:
        raise OSError(errno.EFBIG, f"larger than {limit} bytes", path)
    return content.content()


async def write_file(run: RunScript, path: str, content: bytes, mode: int, user: str | None) -> None:
    name, parent = quoted(path), quoted(str(PurePosixPath(path).parent))
    with tempfile.SpooledTemporaryFile(max_size=2**24) as payload:
        payload.write(content)
        payload.seek(0)
        write = f"{{ [ -d {parent} ] || mkdir -p -- {parent}; }} && cat > {name} && chmod {mode & 0o7777:o} -- {name}"
        complaint = HeadTail(COMPLAINT_BYTES)
        script = receiving(len(content), write)
        exit_code = await run(script, stdout=complaint, stderr=complaint, payload=payload, user=user)
    raise_if_failed(exit_code, complaint, path)


async def upload_dir(run: RunScript, source: Path, target: str, user: str | None) -> None:
    folder = quoted(target)
    with tempfile.TemporaryFile() as payload:
        await to_thread.run_sync(pack, source, payload)
        size = payload.tell()
        payload.seek(0)
        extract = f"mkdir -p -- {folder} && tar -x -p -o -f - -C {folder}"
        complaint = HeadTail(COMPLAINT_BYTES)
        script = receiving(size, extract)
        exit_code = await run(script, stdout=complaint, stderr=complaint, payload=payload, user=user)
    raise_if_failed(exit_code, complaint, target)


async def download_dir(
    run: RunScript, source: str, target: Path, max_bytes: int | None, user: str | None
) -> tuple[str, ...]:
    limit = FOLDER_LIMIT_BYTES if max_bytes is None else max_bytes
    archive_limit = 2 * limit + 2**24  # names and modes need room, too
    with tempfile.TemporaryFile() as archive:
        sink, complaint = FileSink(archive, archive_limit), HeadTail(COMPLAINT_BYTES)
        script = (
            f"(cd -- {quoted(source)} || exit 3; tar -cf - . | head -c {archive_limit + 1}; exit ${{PIPESTATUS[0]}})"
        )
        exit_code = await run(script, stdout=sink, stderr=complaint, user=user)
        if sink.total > archive_limit:
            raise OSError(errno.EFBIG, f"larger than {limit} bytes", source)
        if sink.error is not None:
            raise SandboxError(f"cannot keep what a sandbox sent: {sink.error}") from sink.error
        if not (exit_code == 1 and b"changed as we read it" in complaint.content()):  # good as it is
            raise_if_failed(exit_code, complaint, source)
        archive.seek(0)
        return await to_thread.run_sync(unpack, archive, target, limit, source)


def receiving(size: int, command: str) -> str:
    """`command` with `size` bytes as its input, all of which are taken, however it fails: the next script follows."""
    return f"head -c {size} | {{ umask 022; {command} || {{ code=$?; cat > /dev/null; exit $code; }}; }}"


def quoted(path: str) -> str:
    if not path or "\0" in path:
        raise OSError(errno.EINVAL, "expected a path", path)
    return shlex.quote(path if path.startswith("/") else f"./{path}")


def raise_if_failed(exit_code: int, complaint: HeadTail, path: str) -> None:
    """The OSError that the programs' complaint names; `SandboxError` if it names none."""
    if exit_code == 0:
        return
    said = complaint.content().decode(errors="replace").strip()
    named = [number for text, number in ERRORS.items() if re.search(rf"\b{re.escape(text)}\b", said)]
    if "command not found" in said or not named:
        raise SandboxError(f"moving {path} failed with exit code {exit_code}: {said or 'nothing was said'}")
    raise OSError(named[0], os.strerror(named[0]), path)
