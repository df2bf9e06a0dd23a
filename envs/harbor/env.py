"""Harbor tasks as environments: every attempt in a sandbox of its own, that is gone when the attempt ends.

In distillation the reward is zero and the tests are not run; in evaluation they give the reward. A task
of several steps is one episode: when the student answers without a call, the next instruction follows.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from envs.harbor.attempt import Attempt, HarborSettings
from envs.harbor.bash_tool import HarborBashTool
from envs.harbor.sandboxes import image_of
from envs.harbor.task import HarborTask, Step
from envs.message_env import AssistantTurn, DeferredEnv, MessageStep, Outcome
from envs.rendering import Renderer
from envs.types import Env, Message, StopReason
from errors import DataError
from sandbox.types import SandboxFactory
from tool_use.agent_env import AgentToolMessageEnv, build_agent_tool_env

TOOL_SCHEMA = HarborBashTool.schema()
SYSTEM_PROMPT = (
    "You work on a task in a Linux sandbox, through a bash shell that stays open. Look at what is there before you "
    "change it, and check what you have done. When the task is done, say so in a message without a tool call."
)


def user_message(step: Step) -> Message:
    return {"role": "user", "content": step.instruction}


def with_solution(task: HarborTask) -> tuple[Message, ...]:
    """The prompt of a teacher that is shown how every step of the task can be done. Raises `DataError`."""
    scripts = []
    for step in task.steps:
        if step.solution is None:
            raise DataError(
                f"{task.folder}: teacher_sees_solution=True needs its solution/solve.sh. "
                "Leave the task out with task_names"
            )
        title = f"A way to do step {step.name}:" if step.name else "A way to do it:"
        scripts.append(f"{title}\n\n```bash\n{(step.solution / 'solve.sh').read_text().strip()}\n```")
    return ({"role": "user", "content": "\n\n".join([task.instruction, *scripts])},)


class HarborMessageEnv:
    """A conversation with `bash`, which goes on with the task's next step, and is graded at its end."""

    def __init__(self, conversation: AgentToolMessageEnv, attempt: Attempt, shell: HarborBashTool, *, rewarded: bool):
        self._conversation, self._attempt, self._shell = conversation, attempt, shell
        self._rewarded = rewarded
        self._metrics: dict[str, float] = {}

    @property
    def tools(self) -> Sequence[dict]:
        return self._conversation.tools

    async def initial_messages(self) -> Sequence[Message]:
        return await self._conversation.initial_messages()

    async def step(self, turn: AssistantTurn) -> MessageStep:
        said = await self._conversation.step(turn)
        if said.stop_reason is StopReason.COMPLETED and await self._next_step():
            message = user_message(self._attempt.step)
            self._conversation.history.append(message)
            return MessageStep(messages=(message,), metrics=said.metrics)
        if said.stop_reason is None and self._attempt.seconds_left <= 0:
            return MessageStep(
                messages=said.messages,
                stop_reason=StopReason.TIMEOUT,
                tool_calls=said.tool_calls,
                metrics=said.metrics,
            )
        return said

    async def _next_step(self) -> bool:
        """Whether the task goes on; then its next step is ready."""
        if not self._attempt.has_next:
            return False
        if self._attempt.graded:
            await self._grade()
        if not self._attempt.goes_on:
            return False
        self._shell.user = (await self._attempt.begin_step()).agent_user
        return True

    async def finish(self, stop_reason: StopReason, cut: AssistantTurn | None) -> Outcome:
        outcome = await self._conversation.finish(stop_reason, cut)
        if not self._rewarded:
            return outcome
        if not self._attempt.step_is_graded:
            await self._grade()
        cut_short = stop_reason is not StopReason.COMPLETED
        logs = {"verifier_output": [verdict.output for verdict in self._attempt.verdicts]}
        return Outcome(self._attempt.reward(cut_short=cut_short), outcome.metrics | self._metrics, outcome.logs | logs)

    async def _grade(self) -> None:
        for name, value in (await self._attempt.grade()).metrics().items():
            self._metrics[name] = self._metrics.get(name, 0.0) + value


@dataclass(frozen=True)
class HarborEnvGroupBuilder:
    """`group_size` attempts at one task. `rewarded`: its tests give the reward; else it is zero. With
    `teacher_sees_solution` the teacher reads `with_solution`, else what the student reads."""

    dataset: str
    teacher: str
    task: HarborTask
    renderer: Renderer
    sandboxes: SandboxFactory
    settings: HarborSettings
    group_size: int
    max_turns: int
    max_tokens: int
    max_trajectory_tokens: int
    rewarded: bool = False
    teacher_sees_solution: bool = False

    @property
    def row_id(self) -> str:
        return self.task.task_id

    @property
    def teacher_messages(self) -> tuple[Message, ...] | None:
        return with_solution(self.task) if self.teacher_sees_solution else None

    async def make_envs(self) -> Sequence[Env]:
        """Build the image, once for all. Sandboxes are made as each attempt begins."""
        image = await image_of(self.task, self.sandboxes)
        return [DeferredEnv(lambda: self._open(image)) for _ in range(self.group_size)]

    async def cleanup(self) -> None:
        pass  # every attempt has removed its own sandbox

    @asynccontextmanager
    async def _open(self, image: str) -> AsyncIterator[Env]:
        attempt = Attempt(self.task, image, self.sandboxes, self.settings, graded=self.rewarded)
        try:
            await attempt.open()
            step = await attempt.begin_step()
            shell = HarborBashTool(
                attempt.sandbox,
                timeout_s=self.settings.command_timeout_s,
                max_output_bytes=self.settings.max_output_bytes,
                user=step.agent_user,
                seconds_left=lambda: attempt.seconds_left,
            )
            env = build_agent_tool_env(
                self.renderer,
                [shell.bash],
                [user_message(step)],
                max_turns=self.max_turns,
                max_trajectory_tokens=self.max_trajectory_tokens,
                max_generation_tokens=self.max_tokens,
            )
            assert isinstance(env.message_env, AgentToolMessageEnv)
            env.message_env = HarborMessageEnv(env.message_env, attempt, shell, rewarded=self.rewarded)
            yield env
        finally:
            await attempt.close()
