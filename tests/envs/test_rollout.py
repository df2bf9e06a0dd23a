"""The agent loop: what the sampler is sent, what the log keeps, and what happens when things fail."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio
import numpy as np
import pytest

from envs import rollout
from envs.prompt_only import PromptOnlyEnv, PromptOnlyGroupBuilder
from envs.rollout import derive_seed, run_episode, run_group
from envs.types import Message, Observation, Sampled, SamplingParams, StepResult, StopCondition, StopReason
from errors import SamplerError
from models.types import WeightSource

pytestmark = pytest.mark.anyio

STOP = 99
STOPS = StopCondition(frozenset({STOP}))
QUESTION: Message = {"role": "user", "content": "?"}
SAID: Message = {"role": "tool", "content": "!"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class ScriptedSampler:
    """Answers with the ids given, in order; an exception in their place is raised. Records what it was sent."""

    def __init__(self, *answers: list[int] | Exception, version: int = 0) -> None:
        self.answers = list(answers)
        self.version = version
        self.sent: list[list[int]] = []
        self.params: list[SamplingParams] = []

    async def __aenter__(self) -> ScriptedSampler:
        return self

    async def __aexit__(self, *exc: object) -> None:
        pass

    async def update_weights(self, source: WeightSource, version: int) -> None:
        self.version = version

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams) -> Sampled:
        await anyio.lowlevel.checkpoint()
        self.sent.append(list(prompt_ids))
        self.params.append(params)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        ids = answer[: params.max_tokens]
        return Sampled(ids, [-0.5 - i for i in range(len(ids))], ids[-1] == STOP, self.version)


class Hanging(ScriptedSampler):
    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams) -> Sampled:
        await anyio.sleep_forever()
        raise AssertionError


@dataclass
class Talking:
    """Appends `says[i]` after turn i, and is done after the last."""

    says: list[list[int]]
    max_generation_tokens: int = 10
    max_trajectory_tokens: int = 100
    stop: StopCondition = STOPS
    fails: Exception | None = None
    actions: list[Sampled] = field(default_factory=list)

    async def initial_observation(self) -> Observation:
        return Observation([1, 2, 3], (QUESTION,))

    async def step(self, action: Sampled) -> StepResult:
        self.actions.append(action)
        if self.fails is not None:
            raise self.fails
        turn = len(self.actions) - 1
        values: dict[str, Any] = {
            "reward": 0.5,
            "metrics": {"turns": 1.0},
            "logs": {f"turn{turn}": len(action.token_ids)},
        }
        if turn == len(self.says):
            return StepResult(done=True, stop_reason=StopReason.TOOL_STOPPED, **values)
        return StepResult(done=False, observation=Observation(self.says[turn], (SAID,)), **values)


@dataclass
class Row:
    envs: list[Any] = field(default_factory=list)
    fails: Exception | None = None
    dataset: str = "d"
    row_id: str = "r7"
    teacher: str = "t"
    teacher_messages: tuple[Message, ...] | None = None
    cleaned: int = 0

    @property
    def group_size(self) -> int:
        return len(self.envs)

    async def make_envs(self) -> list[Any]:
        if self.fails is not None:
            raise self.fails
        return self.envs

    async def cleanup(self) -> None:
        await anyio.lowlevel.checkpoint()  # raises if the cancellation reaches in here
        self.cleaned += 1


def prompt_only(max_tokens: int = 5) -> PromptOnlyEnv:
    return PromptOnlyEnv(
        prompt=Observation([1, 2, 3], (QUESTION,)),
        stop=StopCondition(frozenset({STOP})),
        max_generation_tokens=max_tokens,
        max_trajectory_tokens=3 + max_tokens,
    )


async def test_a_single_turn_is_prompt_and_sample():
    sampler = ScriptedSampler([7, 8, STOP], version=4)
    episode = await run_episode(prompt_only(), sampler, Row(), temperature=0.7, seed=5)
    assert sampler.sent == [[1, 2, 3]]
    assert episode.token_ids.tolist() == [1, 2, 3, 7, 8, STOP]
    assert episode.token_ids.dtype == np.int32
    assert episode.sampled.tolist() == [False] * 3 + [True] * 3
    np.testing.assert_array_equal(
        episode.sampler_logprobs, np.array([math.nan] * 3 + [-0.5, -1.5, -2.5], dtype=np.float32)
    )
    assert (episode.stop_reason, episode.truncated, episode.num_sampled) == (StopReason.COMPLETED, False, 3)
    assert (episode.dataset, episode.row_id, episode.teacher, episode.weight_version) == ("d", "r7", "t", 4)
    assert [turn.weight_version for turn in episode.turns] == [4]
    assert episode.prompt_messages == (QUESTION,)


async def test_a_sample_without_an_end_was_cut():
    episode = await run_episode(prompt_only(2), ScriptedSampler([7, 8, STOP]), Row(), temperature=1.0, seed=5)
    assert episode.token_ids.tolist() == [1, 2, 3, 7, 8]
    assert (episode.stop_reason, episode.truncated) == (StopReason.MAX_TOKENS, True)


async def test_every_turn_is_sent_the_log_as_it_stands():
    sampler = ScriptedSampler([10, STOP], [11, 12, STOP], [13, STOP])
    env = Talking(says=[[20, 21], [22]])
    episode = await run_episode(env, sampler, Row(), temperature=0.7, seed=5)
    log = [1, 2, 3, 10, STOP, 20, 21, 11, 12, STOP, 22, 13, STOP]
    assert sampler.sent == [log[:3], log[:7], log[:11]]
    assert episode.token_ids.tolist() == log
    assert np.flatnonzero(episode.sampled).tolist() == [3, 4, 7, 8, 9, 11, 12]
    assert (np.isnan(episode.sampler_logprobs) == ~episode.sampled).all()
    assert [(t.start, t.end, t.observation) for t in episode.turns] == [(3, 5, (SAID,)), (7, 10, (SAID,)), (11, 13, ())]
    assert [a.token_ids for a in env.actions] == [[10, STOP], [11, 12, STOP], [13, STOP]]
    assert episode.stop_reason is StopReason.TOOL_STOPPED
    assert (episode.reward, episode.metrics) == (1.5, {"turns": 3.0})
    assert episode.logs == {"turn0": 2, "turn1": 3, "turn2": 2}


async def test_every_turn_has_its_own_seed_and_the_temperature():
    sampler = ScriptedSampler([STOP], [STOP], [STOP])
    await run_episode(Talking(says=[[20], [21]]), sampler, Row(), temperature=0.7, seed=5)
    assert [p.seed for p in sampler.params] == [derive_seed(5, turn) for turn in range(3)]
    assert len({p.seed for p in sampler.params}) == 3
    assert {p.temperature for p in sampler.params} == {0.7}
    assert {p.stop for p in sampler.params} == {StopCondition(frozenset({STOP}))}


async def test_the_sampler_never_sees_a_log_that_left_no_room():
    sampler = ScriptedSampler([10, STOP], [11, STOP])
    env = Talking(says=[[20, 21], [22, 23]], max_trajectory_tokens=11)
    episode = await run_episode(env, sampler, Row(), temperature=1.0, seed=5)
    assert episode.stop_reason is StopReason.CONTEXT_OVERFLOW
    assert episode.token_ids.tolist() == [1, 2, 3, 10, STOP, 20, 21, 11, STOP, 22, 23]
    assert [p.max_tokens for p in sampler.params] == [8, 4]
    assert episode.reward == 1.0


async def test_a_turn_gets_what_is_left_of_both_budgets():
    sampler = ScriptedSampler([10, STOP], [11, STOP])
    env = Talking(says=[[20] * 10], max_generation_tokens=6, max_trajectory_tokens=18)
    await run_episode(env, sampler, Row(), temperature=1.0, seed=5)
    assert [p.max_tokens for p in sampler.params] == [6, 3]


# --- groups


async def test_a_group_keeps_the_order_of_its_envs_and_unlike_seeds():
    row = Row([prompt_only(n) for n in (1, 2, 3)])
    sampler = ScriptedSampler([7, 8, 9], [7, 8, 9], [7, 8, 9])
    group = await run_group(row, sampler, temperature=1.0, seed=5)
    assert [e.num_sampled for e in group.episodes] == [1, 2, 3]
    assert (group.dataset, group.row_id, group.teacher, group.dropped) == ("d", "r7", "t", ())
    assert len({p.seed for p in sampler.params}) == 3
    again = ScriptedSampler([7], [7], [7])
    await run_group(Row([prompt_only() for _ in range(3)]), again, temperature=1.0, seed=5)
    assert [p.seed for p in again.params] == [p.seed for p in sampler.params]
    assert row.cleaned == 1


async def test_a_failed_sampler_drops_that_episode_alone():
    row = Row([prompt_only() for _ in range(3)])
    sampler = ScriptedSampler([7, STOP], SamplerError("lost"), [8, STOP])
    group = await run_group(row, sampler, temperature=1.0, seed=5)
    assert [e.token_ids.tolist()[3:] for e in group.episodes] == [[7, STOP], [8, STOP]]
    assert group.dropped == ("sampler",)
    assert row.cleaned == 1


async def test_a_failure_in_a_later_turn_drops_the_whole_episode():
    row = Row([Talking(says=[[20]])])
    group = await run_group(row, ScriptedSampler([7, STOP], SamplerError("lost")), temperature=1.0, seed=5)
    assert (group.episodes, group.dropped) == ((), ("sampler",))


async def test_an_unexpected_exception_ends_the_run_and_cleans_up():
    row = Row([prompt_only(), Talking(says=[], fails=ZeroDivisionError("bug"))])
    with pytest.raises(ExceptionGroup) as error:
        await run_group(row, ScriptedSampler([7, STOP], [8, STOP]), temperature=1.0, seed=5)
    assert error.value.subgroup(ZeroDivisionError) is not None
    assert row.cleaned == 1


async def test_envs_that_cannot_be_made_are_cleaned_up_too():
    row = Row(fails=ZeroDivisionError("bug"))
    with pytest.raises(ZeroDivisionError):
        await run_group(row, ScriptedSampler(), temperature=1.0, seed=5)
    assert row.cleaned == 1


async def test_cancellation_cleans_up():
    row = Row([prompt_only() for _ in range(3)])
    with anyio.move_on_after(0.01) as scope:
        await run_group(row, Hanging(), temperature=1.0, seed=5)
    assert scope.cancelled_caught
    assert row.cleaned == 1


@dataclass
class Held(Talking):
    """Never gives back what it holds."""

    async def aclose(self) -> None:
        await anyio.sleep_forever()


async def test_what_is_never_given_back_drops_its_episode(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rollout, "CLOSE_S", 0.1)
    with anyio.fail_after(10):
        row = Row([Held(says=[]), Talking(says=[])])
        group = await run_group(row, ScriptedSampler([7, STOP], [8, STOP]), temperature=1.0, seed=5)
    assert group.dropped == ("infrastructure",) and len(group.episodes) == 1
    assert group.causes == ("r7: what an episode held was not given back within 0.1 s",)


async def test_who_is_cancelled_waits_for_what_is_given_back_no_longer_than_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    class NeverClean(Row):
        async def cleanup(self) -> None:
            await anyio.sleep_forever()

    monkeypatch.setattr(rollout, "CLOSE_S", 0.1)
    task = asyncio.create_task(cancelled_group(NeverClean([Held(says=[])])))  # no limit of anyio's would end it
    try:
        await asyncio.wait([task], timeout=10)
        assert task.done() and task.result()
    finally:
        task.cancel()
    assert caplog.messages == ["r7: its cleanup did not end within 0.1 s and was given up"]


async def cancelled_group(row: Row) -> bool:
    with anyio.move_on_after(0.05) as scope:
        await run_group(row, Hanging(), temperature=1.0, seed=5)
    return scope.cancelled_caught


async def test_the_group_of_a_prompt_renders_it_once_for_all():
    class Letters:
        stop = STOPS

        def prompt(self, messages: Sequence[Message]) -> list[int]:
            return [ord(c) for m in messages for c in m["content"]]

    builder: Any = PromptOnlyGroupBuilder("d", "r", "t", (SAID,), (QUESTION,), Letters(), group_size=3, max_tokens=4)  # type: ignore[arg-type]
    sampler = ScriptedSampler([7, STOP], [1, 2, 3, 4, 5], [STOP])
    group = await run_group(builder, sampler, temperature=1.0, seed=5)
    assert sampler.sent == [[ord("?")]] * 3
    assert {p.max_tokens for p in sampler.params} == {4}
    assert [e.stop_reason for e in group.episodes] == [
        StopReason.COMPLETED,
        StopReason.MAX_TOKENS,
        StopReason.COMPLETED,
    ]
    assert all(e.teacher_messages == (SAID,) for e in group.episodes)


def test_seeds_are_the_same_on_every_machine():
    assert derive_seed(5, "gsm8k", "row-1", 0) == 7433874627046665774
    assert 0 <= derive_seed("x") < 2**63
