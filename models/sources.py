"""Where a model comes from: names, folders and checkpoints, what can be said of them before anything is loaded, and
how an error in one is told.

A name is a hub id, a local folder or a .gguf file; a checkpoint (full weights or a PEFT adapter) may lie over it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig
from transformers import modeling_gguf_pytorch_utils as gguf_reader
from transformers.utils import logging as hf_logging

from errors import ModelError, ProtegeError

_HUB_TIMEOUT_S = 10.0
_WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")
_ADAPTER_PATTERNS = ("adapter_model.safetensors", "adapter_model.bin")
# Files that hold a vocabulary. tokenizer_config.json alone does not: from it transformers builds a
# tokenizer of three special tokens that turns any text into nothing.
VOCABULARY_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)
_FINGERPRINTED = {".json", ".safetensors", ".bin", ".model", ".jinja", ".txt"}
_WHOLE_FILE_BYTES = 64 << 20
_STRIDE_BYTES, _BLOCK_BYTES = 1 << 20, 4096


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from."""

    name: str  # hub id, local folder, or a .gguf file; the tokenizer always comes from here
    checkpoint: str | None = None  # local folder: full weights instead of `name`'s, or an adapter on them


def check_source(source: ModelSource, *, weights: bool = True) -> None:
    """Everything that can be said about a source before loading it; without `weights`, what a tokenizer needs.

    Raises ModelError.

    Reads a few bytes of local files; a hub id that is not in the cache costs one request.
    """
    path = _local_path(source.name)
    if path is None:
        _check_hub_id(source.name)
    elif path.is_file():
        _check_gguf(path)
    elif weights:
        _check_folder(path)
        if source.checkpoint is None or is_adapter(source.checkpoint):
            _need_any(path, _WEIGHT_PATTERNS, "weights", "save the model there with save_pretrained")
    if source.checkpoint is not None:
        check_checkpoint(source.checkpoint)


def is_adapter(checkpoint: str) -> bool:
    """Whether a checkpoint folder holds a PEFT adapter rather than full weights."""
    return (Path(checkpoint).expanduser() / "adapter_config.json").is_file()


def source_fingerprint(source: ModelSource) -> str:
    """16 hex digits that say which weights, configuration and tokenizer a source stands for.

    From file contents, so any route to a folder, and any copy of it, gives the same; a hub id stands for
    itself. Files over 64 MiB are sampled, 4 KiB in every MiB: enough to tell two training steps apart.
    """
    check_source(source)
    digest = hashlib.sha256()
    for part in (source.name, source.checkpoint or ""):
        path = _local_path(part) if part else None
        digest.update(b"\0part\0" + (part.encode() if path is None else b""))
        for file in _fingerprinted_files(path) if path is not None else []:
            _hash_file(digest, file)
    return digest.hexdigest()[:16]


# ---- names and folders


def _looks_like_path(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or name.endswith(".gguf")


def _local_path(name: str) -> Path | None:
    """The absolute path that a name means, None for a hub id. Raises ModelError for a path to nothing."""
    path = Path(name).expanduser()
    if name and path.exists():
        return path.absolute()
    if _looks_like_path(name):
        kind = "file" if name.endswith(".gguf") else "folder"
        raise ModelError(f"{name}: no such {kind} ({path.absolute()}); give an existing one, or a hub id")
    return None


def where_from(name: str) -> tuple[str, dict[str, str]]:
    """What `from_pretrained` takes for a name: a folder or hub id, and the keyword for a .gguf file."""
    path = _local_path(name)
    if path is None:
        return name, {}
    return (str(path.parent), {"gguf_file": path.name}) if path.is_file() else (str(path), {})


def _check_hub_id(name: str) -> None:
    try:
        validate_repo_id(name)
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        # One short request: left to itself transformers retries for half a minute, once per file.
        HfApi().model_info(name, timeout=_HUB_TIMEOUT_S)
    except Exception as error:  # a missing repository, no network and no permission share no base class
        raise ModelError(
            f"{name!r} is no folder here, and the Hugging Face hub does not give it ({cause(error)}); "
            "check the spelling, or give a local folder or a .gguf file"
        ) from error


def _check_gguf(path: Path) -> None:
    if path.suffix != ".gguf":
        raise ModelError(f"{path} is a file; expected a model folder, a .gguf file or a hub id")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file (it does not start with 'GGUF'); download it again")


def _check_folder(path: Path) -> None:
    """A base model's folder: configuration and tokenizer."""
    if is_adapter(str(path)):
        base = _read_json(path / "adapter_config.json").get("base_model_name_or_path")
        raise ModelError(
            f"{path} is a PEFT adapter, not a model; give its base ({base}) as the model and this folder "
            "as the checkpoint"
        )
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} has no config.json, so it is not a model folder{_inner_models(path)}")
    _need_any(path, VOCABULARY_FILES, "tokenizer", "save the tokenizer there with save_pretrained")


def check_checkpoint(checkpoint: str) -> None:
    path = Path(checkpoint).expanduser().absolute()
    if not path.is_dir():
        raise ModelError(f"{checkpoint}: no such checkpoint folder ({path})")
    if is_adapter(checkpoint):
        _need_any(path, _ADAPTER_PATTERNS, "adapter weights", "save the adapter again")
    elif not (path / "config.json").is_file():
        raise ModelError(
            f"{path} has neither config.json nor adapter_config.json, so it is no checkpoint{_inner_models(path)}"
        )
    else:
        _need_any(path, _WEIGHT_PATTERNS, "weights", "name a complete checkpoint")


def _need_any(path: Path, patterns: tuple[str, ...], what: str, way_out: str) -> None:
    if not any(True for pattern in patterns for _ in path.glob(pattern)):
        raise ModelError(f"{path} has no {what}: looked for {', '.join(patterns)}; {way_out}")


def _inner_models(path: Path) -> str:
    inner = sorted(p.parent.name for p in path.glob("*/*config.json") if "config.json" in p.name[-19:])
    return f"; it contains {', '.join(dict.fromkeys(inner))}: name one of those" if inner else ""


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {cause(error)}") from error


def context_length(config: PreTrainedConfig) -> int | None:
    """Tokens of the longest sequence that such a model was made to read; None: its config names no such number."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def read_config(name: str) -> PreTrainedConfig:
    where, gguf = where_from(name)
    with explained("configuration", name):
        config = AutoConfig.from_pretrained(where, trust_remote_code=False, **gguf)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"{name} is of type {config.model_type!r}, which is not a causal language model")
    return config


# ---- fingerprints


def _fingerprinted_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(p for p in path.iterdir() if p.suffix in _FINGERPRINTED and p.is_file())


def _hash_file(digest: hashlib._Hash, file: Path) -> None:
    size = file.stat().st_size
    digest.update(f"\0{file.suffix if file.suffix == '.gguf' else file.name}\0{size}\0".encode())
    with file.open("rb") as stream:
        if size <= _WHOLE_FILE_BYTES:
            digest.update(stream.read())
            return
        for offset in range(0, size, _STRIDE_BYTES):
            stream.seek(offset)
            digest.update(stream.read(_BLOCK_BYTES))


# ---- errors and noise


@contextmanager
def explained(what: str, name: str) -> Iterator[None]:
    """Turns whatever the libraries raise about a model's files into a ModelError of one sentence."""
    try:
        with quiet():
            yield
    except ProtegeError:
        raise
    except Exception as error:  # tokenizers raises bare Exception, safetensors a class of its own
        raise ModelError(f"cannot load the {what} of {name}: {cause(error)}") from error


def cause(error: BaseException) -> str:
    """The first sentence of an error's text, short enough for a terminal."""
    text = " ".join(str(error).split()) or type(error).__name__
    sentence = text.split(". ")[0].rstrip(".")[:300]
    telling = isinstance(error, OSError | ValueError | RuntimeError) or type(error) is Exception
    return sentence if telling else f"{type(error).__name__}: {sentence}"


def some(keys: set[str]) -> str:
    return ", ".join(sorted(keys)[:3])


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no load reports: what matters in them is raised or logged here."""
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hub_bars, tqdm = not are_progress_bars_disabled(), gguf_reader.tqdm  # type: ignore[attr-defined]
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    disable_progress_bars()
    gguf_reader.tqdm = partial(tqdm, disable=True)  # type: ignore[attr-defined]  # it knows no switch
    try:
        yield
    finally:
        gguf_reader.tqdm = tqdm  # type: ignore[attr-defined]
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()
        if hub_bars:
            enable_progress_bars()
