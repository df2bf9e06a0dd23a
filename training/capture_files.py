"""A capture on the disk: JSONL, or with the suffix `.safetensors` the same in less than half the bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from errors import ConfigError, DataError
from training.atomic import TEMP, fsync, remove
from training.capture import (
    VERSION,
    Capture,
    CaptureHeader,
    CaptureWriter,
    Example,
    capture_writer,
    check_example,
    failing_with_what_to_do,
    parse_header,
    read_jsonl,
    read_jsonl_header,
    refuse_other,
)

BINARY = ".safetensors"
LINES = ".jsonl"


def check_suffix(path: str | Path) -> None:
    """Raises `ConfigError` for a name that stands for no form."""
    if Path(path).suffix not in (LINES, BINARY):
        raise ConfigError(f"output_path={path}: expected a name that ends in {LINES} or {BINARY}")


def read_header(path: str | Path) -> CaptureHeader:
    """Raises `DataError`."""
    if Path(path).suffix != BINARY:
        return read_jsonl_header(path)
    with _opened(path) as file:
        return parse_header(path, file.metadata()["protege_capture"].encode())


def read_capture(path: str | Path) -> Capture:
    """A complete capture. Raises `DataError` for one that is not."""
    return _read_binary(path) if Path(path).suffix == BINARY else read_jsonl(path)


@contextmanager
def writer(path: Path, header: CaptureHeader) -> Iterator[CaptureWriter]:
    """What `capture_writer` gives. The binary form is made of a JSONL file beside it once that is complete: one can go
    on after a kill, the other cannot. Raises `ConfigError`."""
    if path.suffix != BINARY:
        with capture_writer(path, header) as lines:
            yield lines
        return
    if path.exists():
        refuse_other(path, read_header(path), header)
        remove(_partial(path))  # of a capture that was killed when all was done
        yield CaptureWriter(None, frozenset(example.row_id for example in read_capture(path).examples))
        return
    partial = _partial(path)
    with capture_writer(partial, header) as lines:
        yield lines
    _write_binary(read_jsonl(partial), path)
    remove(partial)


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial{LINES}")


def _write_binary(capture: Capture, path: Path) -> None:
    examples = capture.examples
    temp = path.with_name(f"{TEMP}{path.name}")
    tensors = {
        "input_ids": np.concatenate([example.input_ids for example in examples]),
        "lengths": np.array([len(example.input_ids) for example in examples], dtype=np.int32),
        "spans": np.array([span for example in examples for span in example.spans], dtype=np.int32),
        "span_counts": np.array([len(example.spans) for example in examples], dtype=np.int32),
        "logprobs": np.concatenate([example.logprobs for example in examples]),
        "topk_ids": np.concatenate([example.topk_ids for example in examples]),
        "topk_logprobs": np.concatenate([example.topk_logprobs for example in examples]),
    }
    header = json.dumps({"protege_capture": VERSION, **asdict(capture.header)})
    ids = json.dumps([example.row_id for example in examples])
    try:
        with failing_with_what_to_do(path):
            save_file(tensors, temp, metadata={"protege_capture": header, "ids": ids})
            fsync(temp)
            temp.replace(path)
            fsync(path.parent)
    except BaseException:
        remove(temp)
        raise


def _read_binary(path: str | Path) -> Capture:
    with _opened(path) as file:
        header = parse_header(path, file.metadata()["protege_capture"].encode())
        ids: list[str] = json.loads(file.metadata()["ids"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
        ends = np.cumsum(tensors["span_counts"])[:-1]
        spans = [tuple((int(a), int(b)) for a, b in rows) for rows in np.split(tensors["spans"], ends)]
        trained = np.cumsum([sum(b - a for a, b in rows) for rows in spans])[:-1]
        sequences = np.split(tensors["input_ids"], np.cumsum(tensors["lengths"])[:-1])
        streams = [np.split(tensors[name], trained) for name in ("logprobs", "topk_ids", "topk_logprobs")]
        examples = tuple(Example(*parts) for parts in zip(ids, sequences, spans, *streams, strict=True))
        if len(examples) != header.examples:
            raise ValueError(f"it holds {len(examples)} of {header.examples} examples")
        for example in examples:
            check_example(example, header)
        return Capture(header, examples)


@contextmanager
def _opened(path: str | Path) -> Iterator[safe_open]:
    """Raises `DataError` for whatever goes wrong with the file while it is open."""
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: not a whole capture ({error}). Capture anew") from error
