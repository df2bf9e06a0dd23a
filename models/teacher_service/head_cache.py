"""Where clients keep the heads that services have sent them."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from models.heads import LinearHead


def cache_folder() -> Path:
    return Path(os.environ.get("PROTEGE_CACHE", "~/.cache/protege")).expanduser() / "heads"


def load_cached(digest: str) -> LinearHead | None:
    """The head of that digest, None where it is not kept, or no longer what it was."""
    path = _path(digest)
    try:
        with safe_open(path, framework="pt") as file:
            kept = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        softcap = float(kept["softcap"]) if "softcap" in kept else None
        head = LinearHead(tensors["weight"], tensors.get("bias"), float(kept["scale"]), softcap)
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    return head if head.digest() == digest else None


def keep(head: LinearHead, digest: str) -> None:
    """Best effort: a full disk costs the next run a download, not this one its teacher."""
    path = _path(digest)
    tensors = {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias})
    metadata = {"scale": repr(head.scale)} | ({} if head.softcap is None else {"softcap": repr(head.softcap)})
    with suppress(OSError, SafetensorError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".tmp-", ignore_cleanup_errors=True) as temporary:
            save_file(tensors, Path(temporary, "head"), metadata)
            Path(temporary, "head").replace(path)


def _path(digest: str) -> Path:
    if not digest.isalnum():
        raise ValueError(f"{digest!r} is no digest")
    return cache_folder() / f"{digest}.safetensors"
