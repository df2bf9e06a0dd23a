"""`python -m sandbox.base_image`: a small image made of this machine's own programs, where no registry is in reach.

It holds bash, coreutils, grep, sed, awk, find, diff, tar, gzip and Python with its standard library, as
`protege-base`. Tasks that ship with Protege say `FROM protege-base`.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import docker.errors

from errors import ImageBuildError, UserError
from sandbox.docker_engine import connect

REPOSITORY = "protege-base"
VERSION = "1"  # raise it when what is packed changes: the image is then made anew
PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
TAG = f"{VERSION}-{PYTHON}"
NAME = f"{REPOSITORY}:{TAG}"

# fmt: off
COREUTILS = [
    "[", "basename", "cat", "chmod", "chown", "comm", "cp", "cut", "date", "dd", "df", "dirname", "du", "echo", "env",
    "expand", "expr", "false", "fold", "head", "id", "install", "join", "link", "ln", "ls", "md5sum", "mkdir", "mkfifo",
    "mktemp", "mv", "nl", "nohup", "nproc", "od", "paste", "pathchk", "printenv", "printf", "pwd", "readlink",
    "realpath", "rm", "rmdir", "seq", "sha1sum", "sha256sum", "shuf", "sleep", "sort", "split", "stat", "stdbuf",
    "stty", "sum", "sync", "tac", "tail", "tee", "test", "timeout", "touch", "tr", "true", "truncate", "tsort", "tty",
    "uname", "unexpand", "uniq", "unlink", "wc", "whoami", "yes",
]
OTHERS = [
    "awk", "bash", "cmp", "diff", "egrep", "fgrep", "find", "grep", "gunzip", "gzip", "sed", "tar", "xargs", "zcat",
]
IF_HERE = ["bzip2", "file", "gawk", "hostname", "kill", "less", "patch", "ps", "setsid", "which", "xz"]
LEFT_OUT = {
    "__pycache__", "dist-packages", "ensurepip", "idlelib", "site-packages", "test", "tests", "tkinter", "turtledemo",
}
# fmt: on

FOLDERS = {"tmp": 0o1777, "var/tmp": 0o1777, "root": 0o700, "app": 0o755, "proc": 0o755, "sys": 0o755, "dev": 0o755}
LINKS = {"bin": "usr/bin", "sbin": "usr/bin", "lib": "usr/lib", "lib64": "usr/lib64", "usr/bin/sh": "bash"}
PYTHON_LINKS = {"usr/bin/python3": PYTHON, "usr/bin/python": "python3"}
TEXTS = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/bash\nuser:x:1000:1000:user:/home/user:/bin/bash\n"
    "nobody:x:65534:65534:nobody:/:/bin/false\n",
    "etc/group": "root:x:0:\nuser:x:1000:\nnogroup:x:65534:\n",
    "etc/nsswitch.conf": "hosts: files dns\n",
}
ONE_AT_A_TIME = threading.Lock()  # many tasks ask at once
SETTINGS = ["ENV PATH=/usr/bin", "ENV LANG=C.UTF-8", "WORKDIR /app", 'CMD ["bash"]']


def shared_libraries(program: Path) -> set[Path]:
    """What the dynamic linker loads for `program`, the linker itself too; empty for scripts and static programs."""
    found = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=False).stdout
    return {Path(path) for path in re.findall(r"(?:=> )?(/\S+) \(0x", found)}


def python_files() -> Iterator[tuple[str, Path]]:
    """Where each file of this interpreter and its standard library goes, and the file."""
    program = getattr(sys, "_base_executable", sys.executable)  # not the virtual environment's
    yield f"usr/bin/{PYTHON}", Path(program).resolve()
    library = Path(sysconfig.get_path("stdlib"))
    for folder, inner, names in os.walk(library):
        inner[:] = [name for name in inner if name not in LEFT_OUT and not name.startswith("config-")]
        for name in names:
            path = Path(folder, name)
            yield f"usr/lib/{PYTHON}/{path.relative_to(library)}", path


def files() -> dict[str, Path]:
    """Every packed file by its path inside: programs, Python, and the libraries that they need."""
    packed = dict(python_files())
    for name in [*COREUTILS, *OTHERS, *IF_HERE]:
        program = shutil.which(name, path="/usr/bin:/bin:/usr/local/bin")
        if program is not None:
            packed[f"usr/bin/{name}"] = Path(program).resolve()
        elif name not in IF_HERE:
            raise ImageBuildError(f"this machine has no {name}, which {NAME} is made of: install it, and try again")
    linked = [path for inside, path in packed.items() if inside.startswith("usr/bin/") or path.suffix == ".so"]
    for library in {library for path in linked for library in shared_libraries(path)}:
        if library.name.startswith("ld-"):  # programs name the linker by its path; it finds the others in /usr/lib
            packed["usr/" + str(library).removeprefix("/usr").lstrip("/")] = library.resolve()
        else:
            packed[f"usr/lib/{library.name}"] = library.resolve()
    return packed


def write_tar(target: IO[bytes]) -> None:
    def add(name: str, kind: bytes, mode: int, content: IO[bytes] | None = None, size: int = 0, link: str = "") -> None:
        info = tarfile.TarInfo(name)
        info.type, info.mode, info.size, info.linkname = kind, mode, size, link
        info.uid = info.gid = 1000 if name == "home/user" else 0
        archive.addfile(info, content)

    with tarfile.open(fileobj=target, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, mode in {**FOLDERS, "home/user": 0o755}.items():
            add(name, tarfile.DIRTYPE, mode)
        for name, link in {**LINKS, **PYTHON_LINKS}.items():
            add(name, tarfile.SYMTYPE, 0o777, link=link)
        for name, text in TEXTS.items():
            add(name, tarfile.REGTYPE, 0o644, io.BytesIO(text.encode()), len(text))
        for name, path in sorted(files().items()):
            with path.open("rb") as content:
                status = path.stat()
                add(name, tarfile.REGTYPE, status.st_mode & 0o755, content, status.st_size)


def ensure_base_image() -> str:
    """The base image's full name; made first if this engine has none, which takes seconds. Blocks.

    Raises `SandboxUnavailableError` and `ImageBuildError`.
    """
    with ONE_AT_A_TIME, connect() as client:
        try:
            client.inspect_image(NAME)
        except docker.errors.ImageNotFound:
            with tempfile.TemporaryFile() as archive:
                write_tar(archive)
                archive.seek(0)
                answer = client.import_image_from_data(archive, repository=REPOSITORY, tag=TAG, changes=SETTINGS)
            if (made := re.search(r"sha256:[0-9a-f]{64}", answer)) is None:
                raise ImageBuildError(f"the engine did not take {NAME}: {answer.strip()}") from None
            client.tag(made[0], REPOSITORY, TAG)  # Podman 4 takes the name alone
        client.tag(NAME, REPOSITORY, "latest")
    return NAME


if __name__ == "__main__":
    try:
        print(ensure_base_image())
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
