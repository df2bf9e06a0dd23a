"""A run's folder, written so that a kill at any moment leaves it whole.

    config.json  metrics.jsonl  episodes/step_000012.jsonl  checkpoints/step_000012/  report.html

Files are written aside and renamed. A checkpoint is complete if and only if it holds
`trainer_state/complete.json`, written after everything else and before the rename. A lock keeps a
second process out for as long as the first lives.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import socket
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any, Literal

from errors import CheckpointError, ConfigError, ProtegeError
from training.atomic import (
    SURROGATES,
    TEMP,
    dumps,
    failure,
    folder_size,
    fsync,
    fsync_tree,
    plain,
    remove,
    write_atomic,
)

logger = logging.getLogger(__name__)

Behavior = Literal["ask", "resume", "delete", "raise"]
COMPLETE = Path("trainer_state", "complete.json")
_STEP = re.compile(r"step_(\d{6,})(\.jsonl)?")
_OLD, _LOCK = ".old-", ".lock"
_FOLDERS = ("checkpoints", "episodes")
_OWN = {"config.json", "metrics.jsonl", "report.html", _LOCK, *_FOLDERS, "tensorboard", "wandb", "trackio"}


def open_run_dir(
    path: str | Path,
    config: Mapping[str, Any],
    behavior: Behavior = "ask",
    *,
    may_differ: frozenset[str] = frozenset(),
    interactive: bool | None = None,
    ask: Callable[[str], str] = input,
) -> RunDir:
    """Open `path` for a run with `config`, new, resumed (`RunDir.resumed`) or emptied first.

    `may_differ` names the options (dotted, N for a list's entries; a parent covers its children) that a
    resumed run may change. Raises ConfigError if the folder is not a run, is in use, or may not be resumed.
    """
    path = Path(path).expanduser().absolute()
    given: dict[str, Any] = json.loads(json.dumps(config, default=plain))
    lock = None
    try:
        _refuse_foreign(path)
        path.mkdir(parents=True, exist_ok=True)
        lock = _lock(path)
        saved = _saved(path)
        choice = "new"
        if saved is not None:
            changes = _differences(saved["config"], given, may_differ)
            choice = "delete" if saved.get("deleting") else _decide(path, changes, behavior, interactive, ask)
            if choice == "delete":
                _delete_run(path, saved)
        run = RunDir(path, resumed=choice == "resume", lock=lock)
        run._prepare(given)
        return run
    except BaseException as error:
        if lock is not None:
            lock.close()
        if isinstance(error, OSError):
            raise ConfigError(f"log_path={path}: cannot use this folder ({error})") from error
        raise


class RunDir:
    """The folder of one run. Made by `open_run_dir`, which holds its lock until `close`."""

    def __init__(self, path: str | Path, *, resumed: bool = False, lock: IO[str] | None = None) -> None:
        self.path = Path(path)
        self.resumed = resumed
        self.config_path = self.path / "config.json"
        self.metrics_path = self.path / "metrics.jsonl"
        self.report_path = self.path / "report.html"
        self.episodes_path = self.path / "episodes"
        self.checkpoints_path = self.path / "checkpoints"
        self._lock = lock

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another process have the run."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def discard_if_empty(self) -> None:
        """Remove the folder if nothing was recorded in it: a run that could not even load its models."""
        if not self.resumed and not self.metrics_path.exists() and not self.checkpoints():
            remove(self.path)

    def _prepare(self, config: dict[str, Any]) -> None:
        """Write the config, then make the folders and clear what a killed run left half-done."""
        write_atomic(self.config_path, json.dumps({"protege_run": 1, "config": config}, indent=2) + "\n")
        for name in _FOLDERS:
            (self.path / name).mkdir(exist_ok=True)
        for folder in (self.path, self.episodes_path, self.checkpoints_path):
            for leftover in folder.glob(f"{TEMP}*"):
                remove(leftover)
        for old in self.checkpoints_path.glob(f"{_OLD}step_*"):
            target = self.checkpoints_path / old.name.removeprefix(_OLD)
            if target.exists():
                remove(old)
            else:  # killed between the two renames of a replacement
                old.rename(target)

    # Metrics

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Append one row, which names its `step`. NaN and infinities become null: JSON has neither."""
        if "step" not in row:
            raise ValueError(f"a metrics row names its step; got {sorted(row)}")
        line = (dumps(row) + "\n").encode(errors=SURROGATES)
        try:
            _cut_torn_line(self.metrics_path)
            with open(self.metrics_path, "ab", buffering=0) as file:
                before = file.seek(0, os.SEEK_END)
                if file.write(line) != len(line):
                    file.truncate(before)  # a row is there whole or not at all
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise ProtegeError(failure(self.metrics_path, error, self.path)) from error

    def read_metrics(self) -> list[dict[str, Any]]:
        """Every whole row, in order."""
        return read_metrics(self.path)

    def truncate_metrics(self, last_step: int) -> None:
        """Drop the rows after `last_step` (-1: all) and a torn last line, as a resumed run must."""
        rows = [row for row in self.read_metrics() if row["step"] <= last_step]
        if self.metrics_path.exists():
            write_atomic(self.metrics_path, "".join(dumps(row) + "\n" for row in rows))

    def rewind(self, last_step: int) -> None:
        """Forget what was recorded after `last_step`, the checkpoint that a run goes on from."""
        self.truncate_metrics(last_step)
        for file in self.episodes_path.iterdir():
            if (found := _STEP.fullmatch(file.name)) and int(found[1]) > last_step:
                file.unlink()

    def write_episodes(self, step: int, rows: Iterable[Mapping[str, Any]]) -> Path:
        """Write one step's episodes, a JSON object per line. Arrays become lists, NaN null."""
        target = self.episodes_path / f"step_{step:06d}.jsonl"
        try:
            write_atomic(target, (dumps(row) + "\n" for row in rows))
        except OSError as error:
            raise ProtegeError(failure(target, error, self.path)) from error
        return target

    # Checkpoints

    def write_checkpoint(self, step: int, write: Callable[[Path], None], *, final: bool = False) -> Path:
        """Have `write` fill a folder, and make it the checkpoint of `step`, whole or not at all.

        Raises CheckpointError with the cause if `write` or the disk fails; nothing is left behind.
        """
        target = self.checkpoints_path / f"step_{step:06d}"
        temp = self.checkpoints_path / f"{TEMP}{target.name}-{os.getpid()}"
        try:
            remove(temp)
            temp.mkdir(parents=True)
            write(temp)
            (temp / COMPLETE).parent.mkdir(exist_ok=True)
            # why: the marker says that the rest is on the disk, so the rest goes to the disk first
            fsync_tree(temp)
            (temp / COMPLETE).write_text(json.dumps({"step": step, "final": final}) + "\n")
            fsync_tree((temp / COMPLETE).parent)
            old = self.checkpoints_path / f"{_OLD}{target.name}"
            if target.exists():
                target.rename(old)  # `_prepare` renames it back if we are killed here
            temp.rename(target)
            fsync(self.checkpoints_path)
            remove(old)
        except Exception as error:
            message = failure(target, error, self.path, written=folder_size(temp))
            remove(temp)
            self._restore(target)
            raise CheckpointError(message + self._last_good()) from error
        except BaseException:  # Ctrl-C
            remove(temp)
            self._restore(target)
            raise
        return target

    def _restore(self, target: Path) -> None:
        old = self.checkpoints_path / f"{_OLD}{target.name}"
        if old.exists() and not target.exists():
            old.rename(target)

    def _last_good(self) -> str:
        latest = self.latest_checkpoint()
        return f" The last complete checkpoint is {latest[1]}." if latest else " There is no checkpoint yet."

    def checkpoints(self) -> list[tuple[int, Path]]:
        """Every complete checkpoint, oldest first."""
        found = [(_complete_step(folder), folder) for folder in self.checkpoints_path.glob("step_*")]
        return sorted((step, folder) for step, folder in found if step is not None)

    def latest_checkpoint(self) -> tuple[int, Path] | None:
        return max(self.checkpoints(), default=None)

    def prune(self, keep: int) -> None:
        """Keep the last `keep` checkpoints; 0 keeps all."""
        if keep < 0:
            raise ValueError(f"keep={keep}: expected 0 (all) or a number of checkpoints")
        for _, folder in self.checkpoints()[: -keep or None] if keep else ():
            # why: removed in place, a kill half-way would leave a folder whose marker says complete
            doomed = folder.rename(folder.with_name(f"{TEMP}pruned-{folder.name}"))
            remove(doomed)


def read_metrics(run_path: str | Path) -> list[dict[str, Any]]:
    """The whole rows of a run's metrics.jsonl; a last line that is torn or being written is left out."""
    file = Path(run_path) / "metrics.jsonl"
    rows = []
    lines = file.read_bytes().split(b"\n") if file.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError:
            if number < len(lines):
                logger.warning("%s:%d: left out, not JSON: %.80r", file, number, line)
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int | float):
            rows.append(row)
    return rows


def read_config(run_path: str | Path) -> dict[str, Any] | None:
    """The config of the run at `run_path`; None if there is no run."""
    saved = _saved(Path(run_path))
    return None if saved is None else saved["config"]


# Opening


def _saved(path: Path) -> dict[str, Any] | None:
    try:
        saved = json.loads((path / "config.json").read_text())
    except (OSError, ValueError):
        return None
    # why: models have a config.json too, and `delete` must never take a model for a run
    return saved if isinstance(saved, dict) and "protege_run" in saved and "config" in saved else None


def _refuse_foreign(path: Path) -> None:
    """Raise ConfigError if `path` holds anything but a run, before anything is written there."""
    if path.exists() and not path.is_dir():
        raise ConfigError(f"log_path={path} is a file: expected a folder, new or of an earlier run")
    entries = {entry.name for entry in path.iterdir()} if path.exists() else set()
    unborn = {_LOCK} | {name for name in entries if name.startswith(f"{TEMP}config.json")}
    if _saved(path) is None and entries - unborn:
        raise ConfigError(
            f"log_path={path} is not a run's folder: it holds {_some(entries - unborn)} and no config.json "
            "of a run. Give a new folder"
        )


def _lock(path: Path) -> IO[str]:
    """Hold the folder until this process ends, however it ends: the kernel drops the lock."""
    file = open(path / _LOCK, "a+")  # noqa: SIM115 (open for as long as the run is)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise ConfigError(
            f"log_path={path}: another run is using this folder ({holder or 'unknown process'}). "
            "Wait for it, stop it, or give another log_path"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
        logger.warning("%s: this file system has no locks; a second run there would not be noticed", path)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def _decide(
    path: Path, changes: list[str], behavior: Behavior, interactive: bool | None, ask: Callable[[str], str]
) -> Literal["resume", "delete"]:
    """What to do with a run that is there. Raises ConfigError if the answer is: nothing."""
    ways_out = (
        "Give the same options to resume it, another log_path for a second run, or "
        "behavior_if_log_dir_exists=delete to start over (this deletes it)"
    )
    differs = f"log_path={path} holds a run with other options:\n  " + "\n  ".join(changes)
    if behavior == "delete":
        return "delete"
    if behavior == "raise":
        raise ConfigError(f"log_path={path} holds a run, and behavior_if_log_dir_exists=raise. {ways_out}")
    if not changes:
        return "resume"
    if interactive is None:
        interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if behavior == "resume" or not interactive:
        raise ConfigError(f"{differs}\n{ways_out}")
    question = f"{differs}\nresume it with the new options, delete it, or raise (stop)? [resume/delete/raise] "
    while True:
        try:
            answer = ask(question).strip().lower()
        except EOFError:
            answer = "raise"
        if answer == "raise":
            raise ConfigError(f"{differs}\n{ways_out}")
        if answer in ("resume", "delete"):
            return answer
        question = f"{answer!r}? [resume/delete/raise] "


def _differences(saved: Any, given: Any, may_differ: frozenset[str]) -> list[str]:
    """One line per option whose value is not the saved one, but for those in `may_differ`."""
    before, now = _flat(saved), _flat(given)
    lines = []
    for key in sorted(before.keys() | now.keys()):
        parts = re.sub(r"(?<=\.)\d+(?=\.|$)", "N", key).split(".")
        free = any(".".join(parts[:length]) in may_differ for length in range(1, len(parts) + 1))
        if not free and before.get(key) != now.get(key):
            lines.append(f"{key}: {before.get(key, '(not set)')} there, {now.get(key, '(not set)')} now")
    return lines


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested dicts, and lists of them, as dotted keys with their values as JSON text, in which NaN equals NaN."""
    if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        value = dict(enumerate(value))
    if not isinstance(value, dict) or (prefix and not value):
        return {prefix: json.dumps(value)}
    nested = (_flat(inner, f"{prefix}.{key}" if prefix else str(key)) for key, inner in value.items())
    return {key: text for inner in nested for key, text in inner.items()}


def _delete_run(path: Path, saved: dict[str, Any]) -> None:
    """Remove what a run wrote. Raises ConfigError, with nothing removed, if there is anything else."""
    inside = [entry for name in _FOLDERS if (path / name).is_dir() for entry in (path / name).iterdir()]
    foreign = {entry.name for entry in path.iterdir() if entry.name not in _OWN and not _is_leftover(entry)}
    foreign |= {
        str(entry.relative_to(path)) for entry in inside if not (_STEP.fullmatch(entry.name) or _is_leftover(entry))
    }
    if foreign:
        raise ConfigError(
            f"log_path={path} holds what no run wrote: {_some(foreign)}. Move that away to let the run be deleted"
        )
    # why: killed half-way, the next start must not resume from what happens to be left
    write_atomic(path / "config.json", json.dumps({**saved, "deleting": True}))
    top = [entry for entry in path.iterdir() if entry.name not in (_LOCK, "config.json", *_FOLDERS)]
    for entry in [*inside, *top]:
        remove(entry)


def _is_leftover(entry: Path) -> bool:
    return entry.name.startswith((TEMP, _OLD))


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# Reading


def _cut_torn_line(path: Path) -> None:
    """Drop what a kill left of a last line, which the next one would be glued to."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(end - 1, 0))
        if file.read() not in (b"", b"\n"):
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


def _complete_step(folder: Path) -> int | None:
    found = _STEP.fullmatch(folder.name)
    try:
        step = json.loads((folder / COMPLETE).read_text())["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return step if found and step == int(found[1]) else None
