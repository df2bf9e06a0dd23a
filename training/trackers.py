"""Mirrors metric rows to TensorBoard, Weights & Biases or trackio.

`metrics.jsonl` is the record; these are copies of it. A package that is missing is an error before
the run starts. After that a tracker that fails says so once and is left out: it never stops training.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import math
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from errors import ConfigError

logger = logging.getLogger(__name__)

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}
"""Tracker to the package that it needs; also the folder that it may write inside the run directory."""


CLOSE_S = 60.0


class _Tracker(Protocol):
    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """The trackers of a run. `log` and `close` never raise."""

    def __init__(self, trackers: Mapping[str, _Tracker]) -> None:
        self._trackers = dict(trackers)

    @property
    def active(self) -> tuple[str, ...]:
        return tuple(self._trackers)

    def log(self, row: Mapping[str, Any]) -> None:
        """Mirror one metrics row. What is not a finite number is left out; `step` is the x axis."""
        values = {
            key: float(value)
            for key, value in row.items()
            if key != "step" and isinstance(value, int | float) and math.isfinite(value)
        }
        for name in list(self._trackers):
            try:
                self._trackers[name].log(int(row["step"]), values)
            except Exception as error:
                del self._trackers[name]
                _warn(name, error)

    def close(self) -> None:
        """Takes no longer than `CLOSE_S`: one whose server is silent would try for ever to send what it still has."""
        closing = {
            name: threading.Thread(target=_close, args=(name, tracker), daemon=True, name=f"tracker {name}")
            for name, tracker in self._trackers.items()
        }
        self._trackers = {}
        for thread in closing.values():
            thread.start()
        until = time.monotonic() + CLOSE_S
        for name, thread in closing.items():
            thread.join(max(0.0, until - time.monotonic()))
            if thread.is_alive():
                logger.warning("tracker %s did not end within %g s: what it had not sent yet is left", name, CLOSE_S)


def _close(name: str, tracker: _Tracker) -> None:
    try:
        tracker.close()
    except Exception as error:
        _warn(name, error)


def open_trackers(
    names: Sequence[str], run_path: str | Path, config: Mapping[str, Any], *, wandb_project: str | None = None
) -> Trackers:
    """Start the named trackers; `wandb_project` alone asks for W&B.

    Raises ConfigError for a name that is not known or a package that is not installed."""
    wanted = list(names)
    if wandb_project and "wandb" not in wanted:
        wanted.append("wandb")
    check_trackers(wanted)
    run_path = Path(run_path).absolute()
    started: dict[str, _Tracker] = {}
    for name in dict.fromkeys(wanted):
        try:
            if name == "tensorboard":
                started[name] = _TensorBoard(run_path)
            elif name == "wandb":
                started[name] = _WandB(run_path, config, wandb_project or "protege")
            else:
                started[name] = _Trackio(run_path, config, wandb_project or "protege")
        except Exception as error:
            _warn(name, error)
    return Trackers(started)


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError unless every name is a tracker whose package can be imported."""
    for name in names:
        if name not in PACKAGES:
            near = difflib.get_close_matches(name, PACKAGES, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(f"trackers={name}: expected any of {', '.join(PACKAGES)}.{hint}")
        try:
            importlib.import_module(PACKAGES[name])
        except ImportError as error:
            raise ConfigError(
                f"the tracker {name} needs a package that cannot be imported ({error}). "
                f"Install it with: pip install {PACKAGES[name]}"
            ) from error


def _warn(name: str, error: Exception) -> None:
    logger.warning("tracker %s failed and is off for the rest of the run: %r", name, error)


class _TensorBoard:
    def __init__(self, run_path: Path) -> None:
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self._writer = writer(log_dir=str(run_path / "tensorboard"))

    def log(self, step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, run_path: Path, config: Mapping[str, Any], project: str) -> None:
        folder = run_path / "wandb"
        folder.mkdir(exist_ok=True)
        # why: kept beside the run, so that a resumed run continues its curves and a deleted one does not
        id_file = folder / "protege_run_id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex)
        self._run = importlib.import_module("wandb").init(
            project=project,
            name=run_path.name,
            id=id_file.read_text().strip(),
            resume="allow",
            dir=str(run_path),
            config=dict(config),
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, run_path: Path, config: Mapping[str, Any], project: str) -> None:
        self._trackio = importlib.import_module("trackio")
        self._trackio.init(project=project, name=run_path.name, config=dict(config), resume="allow")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._trackio.log(values, step=step)

    def close(self) -> None:
        self._trackio.finish()
