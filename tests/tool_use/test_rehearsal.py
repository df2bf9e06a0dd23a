"""An episode played by hand is the episode that training would see."""

from __future__ import annotations

from typing import Any

import pytest
from scripted import renderer_of, user

from envs.types import StopReason
from errors import ConfigError
from tool_use import AgentLimits, ToolEnvGroupBuilder, rehearse, tool

pytestmark = pytest.mark.anyio

RENDERER = renderer_of("hermes")
CALL = '<tool_call>{"name": "double", "arguments": {"n": 4}}</tool_call>'


@tool
def double(n: int) -> int:
    return 2 * n


def group(**limits: Any) -> ToolEnvGroupBuilder:
    return ToolEnvGroupBuilder(
        "d", "r", "t", (user("double 4"),), RENDERER, lambda: [double], limits=AgentLimits(**limits)
    )


async def test_the_tools_run_and_the_tokens_are_the_students():
    episode = await rehearse(group(), RENDERER, [CALL, "8"])
    assert episode.turns[0].observation[0]["content"] == "8"
    assert episode.stop_reason is StopReason.COMPLETED
    said = RENDERER.tokenizer(f"{CALL}<|im_end|>")["input_ids"]
    assert episode.token_ids[episode.turns[0].start : episode.turns[0].end].tolist() == said


async def test_limits_hold_and_turns_that_do_not_end_the_episode_are_refused():
    cut = await rehearse(group(max_generation_tokens=5), RENDERER, [CALL])
    assert cut.stop_reason is StopReason.MAX_TOKENS
    with pytest.raises(ConfigError, match="the episode goes on"):
        await rehearse(group(), RENDERER, [CALL])
