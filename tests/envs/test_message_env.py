"""An environment that speaks in messages, acted in by a student that speaks in tokens."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
import small_tokenizers as small

from envs.message_env import AssistantTurn, DeferredEnv, MalformedCall, MessageStep, Outcome, TokenEnv
from envs.rendering import make_renderer
from envs.rollout import run_episode
from envs.types import Message, Sampled, SamplingParams, StopReason
from errors import DataError, SandboxError

pytestmark = pytest.mark.anyio

RENDERER = make_renderer(small.byte_level(small.CHATML))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def user(content: str) -> Message:
    return {"role": "user", "content": content}


class Guessing:
    """Says "higher" until the student has said `answer`."""

    tools: Sequence[dict[str, Any]] = ()

    def __init__(self, answer: str) -> None:
        self.answer = answer
        self.turns: list[AssistantTurn] = []
        self.finished: list[tuple[StopReason, AssistantTurn | None]] = []
        self.closed = 0

    async def initial_messages(self) -> Sequence[Message]:
        return [user("guess")]

    async def step(self, turn: AssistantTurn) -> MessageStep:
        self.turns.append(turn)
        logs = {f"turn {len(self.turns)}": turn.content}
        if turn.content == self.answer:
            return MessageStep(stop_reason=StopReason.COMPLETED, reward=1.0, metrics={"steps": 1}, logs=logs)
        return MessageStep((user("higher"),), reward=0.25, metrics={"steps": 1}, logs=logs)

    async def finish(self, stop_reason: StopReason, cut: AssistantTurn | None) -> Outcome:
        self.finished.append((stop_reason, cut))
        return Outcome(reward=10.0, metrics={"steps": 100, "ended": 1}, logs={"why": stop_reason.value})

    async def aclose(self) -> None:
        self.closed += 1


class Student:
    """Says these texts, each ended by its end of turn; "…" at the end of one leaves that out."""

    def __init__(self, *texts: str) -> None:
        self.texts = list(texts)
        self.sent: list[list[int]] = []

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams) -> Sampled:
        self.sent.append(list(prompt_ids))
        text = self.texts.pop(0)
        ids = RENDERER.tokenizer(text.removesuffix("…"), add_special_tokens=False)["input_ids"]
        ids = [*ids, *([] if text.endswith("…") else [RENDERER.end_of_turn_id])][: params.max_tokens]
        return Sampled(ids, [-1.0] * len(ids), ids[-1] == RENDERER.end_of_turn_id)


class Row:
    dataset, row_id, teacher, teacher_messages = "d", "r", "t", None


async def play(message_env: Guessing, *texts: str, limit: int = 500, per_turn: int = 100) -> tuple[Any, Student]:
    env = TokenEnv(message_env, RENDERER, max_trajectory_tokens=limit, max_generation_tokens=per_turn)
    student: Any = Student(*texts)
    return await run_episode(env, student, Row(), temperature=1.0, seed=1), student  # type: ignore[arg-type]


async def test_messages_go_in_and_out_as_tokens():
    guessing = Guessing("7")
    episode, student = await play(guessing, "5", "7")
    assert [turn.content for turn in guessing.turns] == ["5", "7"]
    text = "<|im_start|>user\nguess<|im_end|>\n<|im_start|>assistant\n5<|im_end|>\n"
    text += "<|im_start|>user\nhigher<|im_end|>\n<|im_start|>assistant\n7<|im_end|>"
    assert RENDERER.tokenizer.decode(episode.token_ids) == text
    assert episode.token_ids.tolist()[: len(student.sent[1])] == student.sent[1]
    assert episode.turns[0].observation == (user("higher"),)
    assert episode.prompt_messages == (user("guess"),)


async def test_rewards_metrics_and_logs_of_the_steps_and_of_the_end_add_up():
    guessing = Guessing("7")
    episode, _ = await play(guessing, "5", "7")
    assert episode.reward == 11.25
    assert episode.metrics == {"steps": 102, "ended": 1}
    assert episode.logs == {"turn 1": "5", "turn 2": "7", "why": "completed"}
    assert guessing.finished == [(StopReason.COMPLETED, None)]


@pytest.mark.parametrize(
    ("texts", "options", "reason", "steps", "cut"),
    [
        (["5", "6…"], {}, StopReason.MAX_TOKENS, 1, "6"),
        (["a b c d e f g h"], {"per_turn": 3}, StopReason.MAX_TOKENS, 0, "a b"),
        (["a b c d e f g h i j"], {"limit": 22}, StopReason.CONTEXT_OVERFLOW, 0, "a b c"),
        (["5"], {"limit": 25}, StopReason.CONTEXT_OVERFLOW, 1, None),
    ],
)
async def test_an_end_that_the_env_did_not_choose_is_told_to_it_once(
    texts: list[str], options: dict[str, Any], reason: StopReason, steps: int, cut: str | None
):
    guessing = Guessing("7")
    episode, _ = await play(guessing, *texts, **options)
    assert episode.stop_reason is reason
    ((told, turn),) = guessing.finished
    assert (told, len(guessing.turns)) == (reason, steps)
    assert (turn.content.startswith(cut) if turn and cut else turn) == (True if cut else None)
    assert episode.sampled[-1], "what came too late is not in the log"
    assert len(episode) <= options.get("limit", 500)


async def test_a_prompt_without_room_for_an_answer_is_refused():
    with pytest.raises(DataError, match=r"max_trajectory_tokens=5: the prompt alone has \d+ tokens.*'guess'"):
        await play(Guessing("7"), "x", limit=5)


def test_a_message_says_what_the_turn_was():
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": {}}}
    assert AssistantTurn("x").message == {"role": "assistant", "content": "x"}
    turn = AssistantTurn("x", "hm", (call,), (MalformedCall("bad"),))
    assert turn.message == {"role": "assistant", "content": "x", "reasoning_content": "hm", "tool_calls": [call]}


def test_a_step_says_something_or_stops():
    with pytest.raises(ValueError, match="needs messages"):
        MessageStep()


# --- opened with the episode, closed with it


class Opened:
    def __init__(self, *, fails: str = "") -> None:
        self.fails = fails
        self.events: list[str] = []

    @asynccontextmanager
    async def __call__(self) -> AsyncIterator[Any]:
        self.events.append("open")
        if self.fails == "open":
            raise SandboxError("no room")
        try:
            guessing = Guessing("7")
            yield TokenEnv(guessing, RENDERER, max_trajectory_tokens=500, max_generation_tokens=100)
            self.events.append(f"env closed {guessing.closed} times")
        finally:
            await anyio.lowlevel.checkpoint()
            self.events.append("close")


async def test_a_deferred_env_is_open_for_as_long_as_its_episode():
    opened = Opened()
    env = DeferredEnv(opened)
    assert opened.events == []
    student: Any = Student("7")
    episode = await run_episode(env, student, Row(), temperature=1.0, seed=1)  # type: ignore[arg-type]
    assert episode.stop_reason is StopReason.COMPLETED
    assert opened.events == ["open", "env closed 1 times", "close"]
    await env.aclose()  # again does nothing
    assert opened.events[-1] == "close" and len(opened.events) == 3


async def test_a_deferred_env_that_cannot_be_opened_has_nothing_to_close():
    opened = Opened(fails="open")
    student: Any = Student()
    with pytest.raises(SandboxError):
        await run_episode(DeferredEnv(opened), student, Row(), temperature=1.0, seed=1)  # type: ignore[arg-type]
    assert opened.events == ["open"]


async def test_a_cancelled_episode_closes_its_env_without_being_interrupted():
    opened = Opened()

    class Hanging(Student):
        async def sample(self, prompt_ids: Sequence[int], params: SamplingParams) -> Sampled:
            await anyio.sleep_forever()
            raise AssertionError

    with anyio.move_on_after(0.02):
        await run_episode(DeferredEnv(opened), Hanging(), Row(), temperature=1.0, seed=1)  # type: ignore[arg-type]
    assert opened.events == ["open", "env closed 1 times", "close"]


def test_a_deferred_env_that_is_not_open_says_so():
    with pytest.raises(RuntimeError, match="opened by initial_observation"):
        _ = DeferredEnv(Opened()).stop
