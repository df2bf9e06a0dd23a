"""Single-turn environment: the student answers one prompt, and the episode is over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from envs.rendering import Renderer
from envs.types import Env, Message, Observation, Sampled, StepResult, StopCondition, StopReason


@dataclass(frozen=True)
class PromptOnlyEnv:
    prompt: Observation
    stop: StopCondition
    max_generation_tokens: int
    max_trajectory_tokens: int

    async def initial_observation(self) -> Observation:
        return self.prompt

    async def step(self, action: Sampled) -> StepResult:
        return StepResult(done=True, stop_reason=StopReason.COMPLETED if action.stopped else StopReason.MAX_TOKENS)


@dataclass(frozen=True)
class PromptOnlyGroupBuilder:
    """`group_size` attempts at one row's prompt."""

    dataset: str
    row_id: str
    teacher: str
    teacher_messages: tuple[Message, ...] | None
    messages: tuple[Message, ...]
    renderer: Renderer
    group_size: int
    max_tokens: int

    async def make_envs(self) -> Sequence[Env]:
        ids = self.renderer.prompt(self.messages)
        env = PromptOnlyEnv(
            prompt=Observation(ids, self.messages),
            stop=self.renderer.stop,
            max_generation_tokens=self.max_tokens,
            max_trajectory_tokens=len(ids) + self.max_tokens,
        )
        return [env] * self.group_size  # it keeps no state

    async def cleanup(self) -> None:
        pass
