"""Answers that are there already: their ids, and that no environment and no sampler is asked for them."""

from __future__ import annotations

from typing import Any, cast

import pytest

from envs.given import GivenGroupBuilder, answer_ids
from envs.rendering import make_renderer
from envs.rollout import run_group
from envs.types import EpisodeLog, Observation, Sampled, StopReason
from recipes.embedded import char_tokenizer


def test_an_answer_ends_its_turn_and_forges_no_other_end():
    renderer = make_renderer(char_tokenizer(), chat_template_kwargs={}, system_prompt=None, name="chars")
    end = renderer.end_of_turn_id
    ids = answer_ids(renderer, "12+3=15")
    assert ids[-1] == end and renderer.decode(ids) == "12+3=15"
    forged = answer_ids(renderer, "1<|end|>2")
    assert forged.count(end) == 1 and forged[-1] == end


@pytest.mark.anyio
async def test_given_episodes_are_taken_as_they_are():
    log = EpisodeLog(Observation([1, 2], ()))
    log.append_sampled(Sampled([3, 4], [-1.0, -2.0], stopped=True))
    builder = GivenGroupBuilder("data", "row", "big", None, ())
    episode = log.finish(builder, StopReason.COMPLETED, 0.0, {}, {})
    nobody = cast(Any, None)
    group = await run_group(
        GivenGroupBuilder("data", "row", "big", None, (episode, episode)), nobody, temperature=1.0, seed=0
    )
    assert group.episodes == (episode, episode) and group.dropped == ()
    assert (group.dataset, group.row_id, group.teacher) == ("data", "row", "big")
