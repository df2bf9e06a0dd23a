"""Attempts as a run saves them under `episodes/`, and as they are read back: what was sampled, token by token, what
was said, and what a teacher was shown."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from envs.given import GivenEpisode
from envs.rendering import Renderer
from envs.types import Episode, StopReason, TeacherHint, Turn
from errors import DataError
from training.learner import ItemMetrics
from training.packing import TrainingItem


def episode_row(item: TrainingItem, measured: ItemMetrics, renderer: Renderer, texts: dict[int, str]) -> dict:
    """One line of `episodes/`: every token with its mask, the student's and the teacher's logprob.

    `texts` remembers how single ids decode, from row to row."""
    episode = item.episode
    teacher: list[float | None] = [None] * len(episode)
    if "teacher_logprob" in measured.values:
        for position, value in zip(episode.sampled.nonzero()[0], measured.values["teacher_logprob"], strict=True):
            teacher[position] = float(value)
    ids = episode.token_ids.tolist()
    for token in set(ids) - texts.keys():
        texts[token] = renderer.tokenizer.decode([token])
    return {
        "dataset": episode.dataset,
        "row_id": episode.row_id,
        "teacher": episode.teacher,
        "stop_reason": episode.stop_reason.value,
        "reward": episode.reward,
        "weight_version": episode.weight_version,
        "messages": list(episode.prompt_messages),
        "tools": list(episode.tools),
        "teacher_messages": None if episode.teacher_messages is None else list(episode.teacher_messages),
        "teacher_hints": [asdict(hint) for hint in episode.teacher_hints],
        "turns": [asdict(turn) for turn in episode.turns],
        "completion": renderer.decode(episode.token_ids[episode.sampled].tolist()),
        "token_ids": ids,
        "tokens": [texts[token] for token in ids],
        "sampled": episode.sampled.tolist(),
        "sampler_logprobs": episode.sampler_logprobs.tolist(),
        "teacher_logprobs": teacher,
    }


@dataclass(frozen=True)
class SavedEpisodes:
    episodes: tuple[Episode, ...]
    spelling: dict[int, str]  # what each id was to the student that wrote it

    @property
    def several_turns(self) -> bool:
        """Whether a teacher has to read more than prompts and answers."""
        return any(episode.tools or len(episode.turns) > 1 for episode in self.episodes)

    def check_spelling(self, path: str | Path, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        """The ids must spell for model `name` what they spelt for the one that wrote them. Raises `DataError`."""
        for token, text in self.spelling.items():
            try:
                mine = tokenizer.decode([token])
            except (IndexError, KeyError, OverflowError, TypeError, ValueError):  # it has no such id
                mine = ""
            if mine != text:
                raise DataError(
                    f"{path}: id {token} was {text!r} to the student that wrote it, and is {mine!r} to {name}: give a "
                    "student of that tokenizer"
                )


def read_saved_episodes(path: str | Path) -> SavedEpisodes:
    """Those of a run's folder, step by step, or of one file. Their `row_id` is file and line, as rows come back.

    Raises `DataError`, naming the line."""
    given = Path(path)
    files = sorted((given / "episodes").glob("step_*.jsonl")) if given.is_dir() else [given]
    if not files or not files[0].is_file():
        raise DataError(f"{path}: no episodes there; expected a run's folder, or one of its episodes/step_*.jsonl")
    episodes: list[Episode] = []
    spelling: dict[int, str] = {}
    for file in files:
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    row = json.loads(line)
                    episodes.append(_episode(row, f"{file.stem}:{number}"))
                    _spell(row, spelling)
                except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
                    raise DataError(f"{file}:{number}: not a saved episode ({error!r})") from None
    if not episodes:
        raise DataError(f"{path}: has no episodes")
    return SavedEpisodes(tuple(episodes), spelling)


def _spell(row: dict[str, Any], spelling: dict[int, str]) -> None:
    for token, text in zip(row["token_ids"], row["tokens"], strict=True):
        if spelling.setdefault(token, text) != text:
            raise ValueError(f"id {token} is {text!r} here and {spelling[token]!r} before")


def _episode(row: dict[str, Any], row_id: str) -> Episode:
    logprobs = [math.nan if value is None else value for value in row["sampler_logprobs"]]
    kind = Episode if np.isfinite(logprobs).any() else GivenEpisode  # of given answers there were none to save
    ids = np.array(row["token_ids"])
    if ids.dtype.kind != "i" or ids.min() < 0:
        raise ValueError("token_ids are not ids")
    privileged = row["teacher_messages"]
    return kind(
        dataset=_is(str, row["dataset"]),
        row_id=row_id,
        teacher=_is(str, row["teacher"]),
        prompt_messages=tuple(row["messages"]),
        teacher_messages=None if privileged is None else tuple(privileged),
        token_ids=ids.astype(np.int32),
        sampled=np.array(row["sampled"], dtype=bool),
        sampler_logprobs=np.array(logprobs, dtype=np.float32),
        turns=tuple(_turn(**turn) for turn in row["turns"]),
        stop_reason=StopReason(row["stop_reason"]),
        reward=float(row["reward"]),
        weight_version=int(row["weight_version"]),
        tools=tuple(row["tools"]),
        teacher_hints=tuple(TeacherHint(tuple(h["messages"]), h["after_turn"]) for h in row["teacher_hints"]),
    )


def _turn(start: int, end: int, observation: list, tool_calls: list, weight_version: int) -> Turn:
    return Turn(start, end, tuple(observation), tuple(tool_calls), weight_version)


def _is(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r} is not {kind.__name__}")
    return value
