"""What a run saves of an episode is all that scoring and training it again needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from episodes import Row, make_episode
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from envs.rendering import make_renderer
from envs.types import Episode, EpisodeLog, Observation, Sampled, StopReason, TeacherHint
from errors import DataError
from models.teacher_view import ViewMaker
from recipes.embedded import char_tokenizer
from training.learner import ItemMetrics
from training.packing import TrainingItem
from training.run_dir import RunDir, open_run_dir
from training.saved_episodes import episode_row, read_saved_episodes

TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}


def tool_episode() -> Episode:
    """Of two turns, with a tool, a privileged prompt and a hint."""
    renderer = make_renderer(char_tokenizer(), name="t")
    log = EpisodeLog(
        Observation(renderer.prompt([{"role": "user", "content": "1+2="}]), ({"role": "user", "content": "1+2="},))
    )
    log.append_sampled(Sampled([5, 6, renderer.end_of_turn_id], [-0.5, -1.0, -0.1], stopped=True))
    said = ({"role": "user", "content": "again"},)
    log.append_observation(Observation(renderer.continuation(list(said), ended=True, tool_calls=()), said))
    log.append_sampled(Sampled([7, 8], [-0.25, -2.0], stopped=False))
    row = Row(teacher_messages=({"role": "user", "content": "1+2=3, so 1+2="},))
    episode = log.finish(row, StopReason.MAX_TURNS, 0.5, {}, {})
    hints = (TeacherHint(({"role": "user", "content": "it is 3"},), after_turn=1),)
    values: dict[str, Any] = {**vars(episode), "tools": (TOOL,), "teacher_hints": hints}
    return Episode(**values)


def saved(tmp_path: Path, *episodes: Episode) -> Path:
    run: RunDir = open_run_dir(tmp_path / "run", {"a": 1}, "ask", may_differ=frozenset())
    renderer, texts = make_renderer(char_tokenizer(), name="t"), {}
    with run:
        rows = [episode_row(TrainingItem(e, None), ItemMetrics(e.num_sampled, {}), renderer, texts) for e in episodes]
        return run.write_episodes(1, rows)


def test_an_episode_comes_back_whole_and_a_teacher_is_shown_the_same(tmp_path: Path):
    was = tool_episode()
    (now,) = read_saved_episodes(saved(tmp_path, was)).episodes
    for name in (
        "dataset",
        "teacher",
        "prompt_messages",
        "teacher_messages",
        "turns",
        "stop_reason",
        "reward",
        "tools",
    ):
        assert getattr(now, name) == getattr(was, name), name
    assert now.teacher_hints == was.teacher_hints and now.weight_version == was.weight_version
    for name in ("token_ids", "sampled", "sampler_logprobs"):
        assert np.array_equal(getattr(now, name), getattr(was, name), equal_nan=name == "sampler_logprobs"), name
    student = make_renderer(char_tokenizer(), name="t")
    other = make_renderer(char_tokenizer(), system_prompt="Be right.", name="u")
    for teacher in (student, other):
        views = [ViewMaker(student, teacher).view(episode) for episode in (was, now)]
        assert views[0].token_ids.tolist() == views[1].token_ids.tolist()
        assert views[0].positions.tolist() == views[1].positions.tolist()


def turn(start: int, end: int) -> dict[str, Any]:
    return {"start": start, "end": end, "observation": [], "tool_calls": [], "weight_version": 0}


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"token_ids": [2**40, 1]}, "not a saved episode"),
        ({"token_ids": [-1]}, "not a saved episode"),
        ({"token_ids": [0.5]}, "not a saved episode"),
        ({"reward": None}, "not a saved episode"),
        ({"teacher": None}, "not a saved episode"),
        ({"turns": [{"start": 0}]}, "not a saved episode"),
        ({"tokens": []}, "not a saved episode"),
        ({"tools": None}, "not a saved episode"),
        ({"sampler_logprobs": [None, None, 0.5, -1.0]}, r"not a saved episode .*logprob of 0\.5"),
        ({"turns": [turn(2, 5)]}, "not a saved episode .*from 2 to 5"),
        ({"turns": [turn(-2, 4)]}, "not a saved episode .*from -2 to 4"),
        ({"turns": [turn(2, 4), turn(3, 4)]}, "not a saved episode .*after one that ends at 4"),
    ],
)
def test_a_broken_row_is_named(change: dict[str, Any], part: str, tmp_path: Path):
    path = saved(tmp_path, make_episode([1, 2], [([3, 4], [])]))
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}) + "\n")
    with pytest.raises(DataError, match=f"{path}:1: {part}"):
        read_saved_episodes(path)


def test_a_row_without_a_key_and_a_file_without_rows(tmp_path: Path):
    path = saved(tmp_path, make_episode([1, 2], [([3, 4], [])]))
    row = json.loads(path.read_text())
    for key in ("tokens", "turns", "tools", "teacher_messages", "teacher_hints"):
        path.write_text(json.dumps({k: v for k, v in row.items() if k != key}) + "\n")
        with pytest.raises(DataError, match=rf"not a saved episode \(KeyError\('{key}'\)\)"):
            read_saved_episodes(path)
    path.write_text("")
    with pytest.raises(DataError, match="has no episodes"):
        read_saved_episodes(path)


def test_ids_that_spell_something_else_are_named_wherever_they_stand(tmp_path: Path):
    path = saved(tmp_path, make_episode([1, 2], [([3, 4], [])]), make_episode([1, 2], [([9, 4], [])]))
    found = read_saved_episodes(path)
    found.check_spelling(path, char_tokenizer(), "student")
    tokenizer = char_tokenizer()
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    names = {i: text for text, i in content["model"]["vocab"].items()}
    vocabulary = content["model"]["vocab"]
    vocabulary[names[9]], vocabulary[names[10]] = 10, 9
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))
    with pytest.raises(DataError, match=r"id 9 was .* to the student that wrote it, and is .* to other"):
        found.check_spelling(path, other, "other")
