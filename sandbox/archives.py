"""Folders as tar archives, so that neither side can make the other touch what it should not.

A packed folder holds regular files, folders and links that stay inside. An unpacked archive, which a hostile
sandbox made, is written below one folder and nowhere else, whatever it says.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from errors import DataError, SandboxError

FILES = 200_000  # more than this in one archive is an attack on our file system
COPY_BYTES = 2**20
FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


def pack(source: Path, target: IO[bytes]) -> None:
    """Write `source`'s content as a tar archive, modes kept, owners dropped. Raises `DataError`."""
    with tarfile.open(fileobj=target, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for path in content_of(source):
            add(archive, source, path)


def check_folder(source: Path) -> None:
    """Raises `DataError` for what `pack` would not take, without reading a file."""
    with tarfile.open(fileobj=io.BytesIO(), mode="w") as archive:
        for path in content_of(source):
            entry(archive, source, path)


def content_of(source: Path) -> Iterator[Path]:
    for folder, inner, names in os.walk(source, onerror=reraise):
        inner.sort()
        yield from (Path(folder, name) for name in sorted([*inner, *names]))


def reraise(error: OSError) -> None:
    raise DataError(f"cannot upload {error.filename}: {error.strerror}") from error


def entry(archive: tarfile.TarFile, source: Path, path: Path) -> tarfile.TarInfo:
    name = path.relative_to(source).as_posix()
    info = archive.gettarinfo(path, name)  # None: a socket
    if info is None or not (info.isreg() or info.isdir() or info.issym() or info.islnk()):
        raise DataError(f"cannot upload {path}: expected a file, a folder or a link; take it out of {source}")
    if info.issym() and not stays_inside(name, info.linkname):
        raise DataError(f"cannot upload {path}: it links to {info.linkname}, outside of {source}")
    return info


def add(archive: tarfile.TarFile, source: Path, path: Path) -> None:
    info = entry(archive, source, path)
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    if info.islnk():  # its first name holds the content; as a file of its own it needs no care on the other side
        info.type, info.linkname, info.size = tarfile.REGTYPE, "", path.stat().st_size
    if info.isreg():
        with path.open("rb") as content:
            archive.addfile(info, content)
    else:
        archive.addfile(info)


def stays_inside(name: str, link: str) -> bool:
    """Whether a link called `name` in an archive leads below the archive's root, whatever other links are there.

    `..` may only come first: after a name that is a link itself, it would lead to where that link's target is.
    """
    parts = PurePosixPath(link).parts
    ups = 0
    while ups < len(parts) and parts[ups] == "..":
        ups += 1
    depth = len(PurePosixPath(name).parts) - 1
    return not PurePosixPath(link).is_absolute() and ups <= depth and ".." not in parts[ups:]


def link_inside(name: str, link: str, source: str) -> str | None:
    """`link`, called `name` in the archive of a folder that was at `source`, as a link that stays inside: itself, or
    if it leads there by way of `source` a relative one to the same place. None: it leads elsewhere."""
    if stays_inside(name, link):
        return link
    root = PurePosixPath("/" + source.lstrip("/")).parts
    here = PurePosixPath(name).parts[:-1]
    # "//x" is "/x" here, but not to pathlib
    parts = list(PurePosixPath("/" + link.lstrip("/") if link.startswith("/") else link).parts)
    base = [] if link.startswith("/") else [*root, *here]
    while base and parts[:1] == [".."]:
        base, parts = [base[0], *base[1:-1]], parts[1:]  # above / is /
    full = (*base, *parts)
    if not source.startswith("/") or ".." in (*root, *full) or full[: len(root)] != root:
        return None
    return os.path.relpath("/".join(["", *full[len(root) :]]) or "/", "/".join(["", *here]) or "/")


def unpack(archive: IO[bytes], target: Path, max_bytes: int, source: str = "") -> tuple[str, ...]:
    """Write the content of a tar archive of the folder `source` below `target`. Returns the names that were left out:
    devices, links that lead elsewhere, names that do. Raises `SandboxError` if it is broken or exceeds `max_bytes`."""
    target.mkdir(parents=True, exist_ok=True)
    root = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with tarfile.open(fileobj=archive, mode="r:", errors="surrogateescape") as members:
            return Unpacking(root, max_bytes, source).run(members)
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        raise SandboxError(f"the archive that a sandbox sent cannot be read: {error}") from error
    finally:
        os.close(root)


class Unpacking:
    """One archive on its way to one folder. Links are made last, so that nothing is written through them."""

    def __init__(self, root: int, max_bytes: int, source: str) -> None:
        self._root = root
        self._source = source
        self._left_bytes = max_bytes
        self._max_bytes = max_bytes
        self._left_out: list[str] = []
        self._links: list[tuple[tuple[str, ...], str]] = []
        self._sources: dict[tuple[str, ...], tarfile.TarInfo] = {}  # what a hard link may lead to
        self._folder_modes: list[tuple[tuple[str, ...], int]] = []

    def run(self, members: tarfile.TarFile) -> tuple[str, ...]:
        for count, member in enumerate(members):
            if count >= FILES:
                raise SandboxError(f"the folder that a sandbox sent holds more than {FILES} files")
            parts = tuple(part for part in member.name.split("/") if part not in ("", "."))
            try:
                if ".." in parts or not self._take(members, member, parts):
                    self._left_out.append("/".join(parts))
            except (OSError, KeyError):  # a name that cannot be here: too long, a file where a folder is, no such link
                self._left_out.append("/".join(parts))
        for parts, link in self._links:
            self._make_link(parts, link)
        for parts, mode in reversed(self._folder_modes):
            with contextlib.suppress(OSError), self._folder(parts) as folder:
                os.fchmod(folder, mode | stat.S_IRWXU)  # ours to remove again
        return tuple(self._left_out)

    def _take(self, members: tarfile.TarFile, member: tarfile.TarInfo, parts: tuple[str, ...]) -> bool:
        if member.isdir():
            with self._folder(parts):
                if parts:  # the target itself is the caller's
                    self._folder_modes.append((parts, member.mode & 0o777))
            return True
        if not parts:
            return False
        if member.islnk():
            member = self._sources[tuple(part for part in member.linkname.split("/") if part not in ("", "."))]
        self._sources[parts] = member
        if member.issym():
            self._links.append((parts, member.linkname))
            return True
        if member.isreg():
            content = members.extractfile(member)
            if content is not None:
                self._write(parts, content, member)
            return content is not None
        return False

    def _write(self, parts: tuple[str, ...], content: IO[bytes], member: tarfile.TarInfo) -> None:
        with self._folder(parts[:-1]) as folder:
            remove_file(folder, parts[-1])
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            with os.fdopen(os.open(parts[-1], flags, 0o600, dir_fd=folder), "wb") as file:
                while data := content.read(COPY_BYTES):
                    self._left_bytes -= len(data)
                    if self._left_bytes < 0:
                        raise SandboxError(f"the folder that a sandbox sent holds more than {self._max_bytes} bytes")
                    file.write(data)
                os.fchmod(file.fileno(), member.mode & 0o777)
                file.flush()  # before the time is set
                with contextlib.suppress(OSError, OverflowError, ValueError):  # a time that no file can have
                    os.utime(file.fileno(), (member.mtime, member.mtime))

    def _make_link(self, parts: tuple[str, ...], link: str) -> None:
        name = "/".join(parts)
        inside = link_inside(name, link, self._source)
        if inside is None:
            self._left_out.append(name)
            return
        try:
            with self._folder(parts[:-1]) as folder:
                remove_file(folder, parts[-1])
                os.symlink(inside, parts[-1], dir_fd=folder)
        except OSError:
            self._left_out.append(name)

    @contextlib.contextmanager
    def _folder(self, parts: tuple[str, ...]):
        """An open folder below the root, made if missing. No component of its path is a link."""
        folder = os.dup(self._root)
        try:
            for part in parts:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, 0o755, dir_fd=folder)
                inner = os.open(part, FOLDER_FLAGS, dir_fd=folder)
                os.close(folder)
                folder = inner
            yield folder
        finally:
            os.close(folder)


def remove_file(folder: int, name: str) -> None:
    """So that what is written is new, and not what a link or a second name leads to."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)
