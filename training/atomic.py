"""Files that are there whole or not at all, JSON that any reader takes, and what to say when a disk fails."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

TEMP = ".tmp-"
"""Starts the name of everything that is being written; what a kill leaves behind is found by it."""

SURROGATES = "backslashreplace"
"""How half of a surrogate pair, which a call or a tool may hold and UTF-8 cannot, is written: as in JSON."""


def write_atomic(path: Path, text: str | Iterable[str]) -> None:
    """Write a file aside, make sure that it is on the disk, and rename it into place."""
    temp = path.with_name(f"{TEMP}{path.name}-{os.getpid()}")
    try:
        with open(temp, "w", encoding="utf-8", errors=SURROGATES) as file:
            for part in (text,) if isinstance(text, str) else text:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        temp.replace(path)
        fsync(path.parent)
    except BaseException:
        remove(temp)
        raise


def dumps(row: Any, indent: int | None = None) -> str:
    write = partial(json.dumps, default=plain, allow_nan=False, ensure_ascii=False, indent=indent)
    try:
        return write(row)
    except ValueError:  # a NaN somewhere: only then walk the whole row
        return write(_finite(row))


def plain(value: Any) -> Any:
    """numpy and torch values, scalars too, as Python's; sets sorted; anything else as its text."""
    if isinstance(value, set | frozenset):
        return sorted(value)  # why: a set's own order changes from process to process
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value if value is None or isinstance(value, str | int) else _finite(plain(value))


def failure(target: Path, error: Exception, run_path: Path, written: int = 0) -> str:
    """What could not be written, why, and for a full disk how much room there was and what to do."""
    cause: BaseException | None = error
    chain = []
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    free = shutil.disk_usage(run_path).free
    # why: safetensors and torch.save report a full disk as errors of their own, without an errno
    full = any(
        getattr(link, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(link) for link in chain
    )
    message = f"cannot write {target}: {type(error).__name__}: {error}."
    if full or free < 2**20:
        message += (
            f" The disk is full: {free} bytes were free after {written} had been written. Free some, or keep "
            "fewer checkpoints; then the same command goes on from the last complete one."
        )
    return message


def folder_size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_tree(folder: Path) -> None:
    for parent, _, files in os.walk(folder):
        for name in files:
            fsync(Path(parent, name))
        fsync(Path(parent))
