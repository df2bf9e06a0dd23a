"""Attempts that a run has saved under `episodes/`, read back: what was sampled, token by token."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from envs.given import GivenEpisode
from envs.types import Episode, StopReason, Turn
from errors import DataError


def read_saved_episodes(path: str | Path) -> list[Episode]:
    """Those of a run's folder, step by step, or of one file. Their `row_id` is file and line, as rows come back.

    What the environment's messages were is not saved, nor are privileged prompts: of several turns there are
    the ids alone. Raises `DataError`, naming the line."""
    given = Path(path)
    files = sorted((given / "episodes").glob("step_*.jsonl")) if given.is_dir() else [given]
    if not files or not files[0].is_file():
        raise DataError(f"{path}: no episodes there; expected a run's folder, or one of its episodes/step_*.jsonl")
    episodes = []
    for file in files:
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    episodes.append(_episode(json.loads(line), f"{file.stem}:{number}"))
                except (ValueError, KeyError, TypeError) as error:
                    raise DataError(f"{file}:{number}: not a saved episode ({error!r})") from None
    return episodes


def _episode(row: dict[str, Any], row_id: str) -> Episode:
    sampled = np.array(row["sampled"], dtype=bool)
    logprobs = [math.nan if value is None else value for value in row["sampler_logprobs"]]
    edges = np.flatnonzero(np.diff(sampled, prepend=False, append=False)).tolist()
    kind = Episode if np.isfinite(logprobs).any() else GivenEpisode  # of given answers there were none to save
    return kind(
        dataset=row["dataset"],
        row_id=row_id,
        teacher=row["teacher"],
        prompt_messages=tuple(row["messages"]),
        teacher_messages=None,
        token_ids=np.array(row["token_ids"], dtype=np.int32),
        sampled=sampled,
        sampler_logprobs=np.array(logprobs, dtype=np.float32),
        turns=tuple(Turn(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True)),
        stop_reason=StopReason(row["stop_reason"]),
        reward=row["reward"],
        weight_version=row["weight_version"],
    )
