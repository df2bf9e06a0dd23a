"""The vocabulary of episodes: what an environment is, and the record of what a student did in it.

An `Episode` is an append-only token log. What the student sampled is stored as it was sampled and
is never rendered again from text; the environment only appends.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

import numpy as np

Message = dict[str, Any]
"""One OpenAI-style chat message: `role`, `content`, optionally `tool_calls`, `tool_call_id`, `name`."""


class StopReason(StrEnum):
    """Why an episode ended. Every reason trains; a failed episode has none because it is dropped."""

    COMPLETED = "completed"
    TOOL_STOPPED = "tool_stopped"
    MAX_TURNS = "max_turns"
    MAX_TOKENS = "max_tokens"  # one turn was cut by the sampler's budget
    CONTEXT_OVERFLOW = "context_overflow"
    MAX_TOOL_CALLS = "max_tool_calls"
    PARSE_ERROR = "parse_error"
    TIMEOUT = "timeout"


TRUNCATED = frozenset({StopReason.MAX_TOKENS, StopReason.CONTEXT_OVERFLOW})


@dataclass(frozen=True)
class StopCondition:
    """What ends one turn of sampling: any of these ids, or any of these texts in the decoded turn."""

    token_ids: frozenset[int]
    strings: tuple[str, ...] = ()


@dataclass(frozen=True)
class SamplingParams:
    """How one turn is sampled. `temperature=0` is greedy; `seed` makes the turn reproducible."""

    max_tokens: int
    stop: StopCondition
    temperature: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Sampled:
    """One sampled turn. `logprobs[i]` is the log-probability of `token_ids[i]` under the distribution
    that it was drawn from (for greedy: the untempered one). The stop token, if the model sampled it,
    is the last id."""

    token_ids: list[int]
    logprobs: list[float]
    stopped: bool  # True: a stop token or string; False: cut by max_tokens
    weight_version: int = 0  # of the weights that drew its first token

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.logprobs):
            raise ValueError(f"{len(self.token_ids)} sampled ids but {len(self.logprobs)} logprobs")


@dataclass(frozen=True)
class Observation:
    """Tokens that the environment appends, and the messages that they render. `tools` are the function
    schemas that a prompt shows."""

    token_ids: list[int]
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class StepResult:
    """An environment's answer to one sampled turn. `observation` is None when `done`. `tool_calls` are
    the calls that the turn made, as parsed: a teacher with another format needs their names and ids."""

    done: bool
    observation: Observation | None = None
    stop_reason: StopReason | None = None
    reward: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    logs: dict[str, Any] = field(default_factory=dict)
    tool_calls: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if self.done != (self.stop_reason is not None) or self.done == (self.observation is not None):
            raise ValueError("a done step has a stop_reason and no observation; any other the reverse")


class Env(Protocol):
    """Token-level environment of one episode, single use. One that holds something, as a sandbox, takes
    it in `initial_observation` and is `Closable`."""

    @property
    def stop(self) -> StopCondition: ...

    @property
    def max_generation_tokens(self) -> int: ...  # per turn

    @property
    def max_trajectory_tokens(self) -> int: ...  # prompt and all turns

    async def initial_observation(self) -> Observation: ...

    async def step(self, action: Sampled) -> StepResult: ...


@runtime_checkable
class Closable(Protocol):
    """An env with something to give back. `run_episode` calls `aclose` as soon as the episode ends:
    finished, failed or cancelled. It does not raise, and is given two minutes."""

    async def aclose(self) -> None: ...


class EnvGroupBuilder(Protocol):
    """Picklable recipe for the environments of one dataset row. Carries its dataset's and teacher's
    name, so dropping a group can never shift another's."""

    @property
    def dataset(self) -> str: ...

    @property
    def row_id(self) -> str: ...

    @property
    def teacher(self) -> str: ...

    @property
    def teacher_messages(self) -> tuple[Message, ...] | None: ...  # privileged; None: it sees the prompt

    @property
    def group_size(self) -> int: ...

    async def make_envs(self) -> Sequence[Env]: ...

    async def cleanup(self) -> None: ...


@dataclass(frozen=True)
class TeacherHint:
    """Messages that the teacher alone reads, after a turn and what the environment answered to it."""

    messages: tuple[Message, ...]
    after_turn: int | None = None  # 1 is the first turn; None: after every turn

    def follows(self, turn: int) -> bool:
        return self.after_turn in (None, turn)


def hint_roles(hints: Iterable[TeacherHint]) -> set[tuple[str, ...]]:
    """The roles of what may follow one turn, in order: what a teacher's format is checked for."""
    given = tuple(hints)
    turns = {hint.after_turn or 0 for hint in given}
    return {tuple(m["role"] for hint in given if hint.follows(turn) for m in hint.messages) for turn in turns}


@runtime_checkable
class Hinted(Protocol):
    """A group builder whose teacher is told more as the episode goes on."""

    @property
    def teacher_hints(self) -> tuple[TeacherHint, ...]: ...


@runtime_checkable
class GivenEpisodes(Protocol):
    """A group builder whose episodes are there already: answers of a dataset, or saved attempts. Its
    environments are never asked for."""

    @property
    def given(self) -> tuple[Episode, ...]: ...


@dataclass(frozen=True)
class Turn:
    """One sampled turn: ids `[start, end)` of the log, the tool calls read from them, then the messages the
    environment appended."""

    start: int
    end: int
    observation: tuple[Message, ...] = ()
    tool_calls: tuple[dict[str, Any], ...] = ()
    weight_version: int = 0  # that drew its first token; weights may change while a turn is being sampled


LOGPROB_ROUNDING = 1e-3  # nats above 0 that an engine's arithmetic may make of a probability of 1


@dataclass(frozen=True, eq=False)
class Episode:
    """One finished attempt: a token log with aligned streams of length T.

    Invariants, checked: turns follow one another, and `sampled` is True exactly on their spans;
    `sampler_logprobs` are logarithms of probabilities there and NaN elsewhere; token 0 is never
    sampled (nothing predicts it).
    """

    dataset: str
    row_id: str
    teacher: str
    prompt_messages: tuple[Message, ...]
    teacher_messages: tuple[Message, ...] | None
    token_ids: np.ndarray  # int32 [T]
    sampled: np.ndarray  # bool [T]
    sampler_logprobs: np.ndarray  # float32 [T]
    turns: tuple[Turn, ...]
    stop_reason: StopReason
    reward: float = 0.0
    weight_version: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    logs: dict[str, Any] = field(default_factory=dict)
    tools: tuple[dict[str, Any], ...] = ()  # function schemas that the prompt shows
    teacher_hints: tuple[TeacherHint, ...] = ()

    def __post_init__(self) -> None:
        mask, after = np.zeros(len(self.token_ids), dtype=bool), 0
        for turn in self.turns:
            if not after <= turn.start <= turn.end <= len(mask):
                raise ValueError(
                    f"a turn from {turn.start} to {turn.end}, after one that ends at {after}, of {len(mask)} tokens"
                )
            mask[turn.start : turn.end], after = True, turn.end
        if not (len(self.sampled) == len(self.sampler_logprobs) == len(mask)) or (mask != self.sampled).any():
            raise ValueError("the sampled mask does not match the turns' spans")
        if not mask.any() or mask[0]:
            raise ValueError("an episode needs a prompt and at least one sampled token")
        self._check_logprobs()

    def _check_logprobs(self) -> None:
        if (np.isfinite(self.sampler_logprobs) != self.sampled).any():
            raise ValueError("sampler logprobs must be finite on sampled tokens and NaN elsewhere")
        if (above := self.sampler_logprobs[self.sampled].max()) > LOGPROB_ROUNDING:
            raise ValueError(f"a sampler logprob of {above:g} is of no probability")

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_sampled(self) -> int:
        return int(self.sampled.sum())

    @property
    def truncated(self) -> bool:
        return self.stop_reason in TRUNCATED


@dataclass(frozen=True)
class EpisodeGroup:
    """The episodes of one row that survived, and why the others were dropped."""

    dataset: str
    row_id: str
    teacher: str
    episodes: tuple[Episode, ...]
    dropped: tuple[str, ...] = ()  # one reason per dropped episode
    causes: tuple[str, ...] = ()  # and what happened to it, in words


class EpisodeLog:
    """Builds an `Episode` by appending; the only way to make one."""

    def __init__(self, prompt: Observation) -> None:
        self._prompt_messages = prompt.messages
        self._tools = prompt.tools
        self._ids: list[int] = list(prompt.token_ids)
        self._logprobs: list[float] = [math.nan] * len(self._ids)
        self._turns: list[Turn] = []
        self._version = 0

    @property
    def token_ids(self) -> list[int]:
        """All ids so far: what the sampler is sent next. A copy."""
        return list(self._ids)

    def __len__(self) -> int:
        return len(self._ids)

    def append_sampled(self, sampled: Sampled) -> None:
        start = len(self._ids)
        self._ids.extend(sampled.token_ids)
        self._logprobs.extend(sampled.logprobs)
        self._turns.append(Turn(start, len(self._ids), weight_version=sampled.weight_version))
        self._version = sampled.weight_version

    def record_tool_calls(self, tool_calls: Sequence[dict[str, Any]]) -> None:
        """The calls that were read from the last sampled turn. Adds no tokens."""
        self._turns[-1] = replace(self._turns[-1], tool_calls=tuple(tool_calls))

    def append_observation(self, observation: Observation) -> None:
        self._ids.extend(observation.token_ids)
        self._logprobs.extend([math.nan] * len(observation.token_ids))
        last = self._turns[-1]
        self._turns[-1] = replace(last, observation=last.observation + observation.messages)

    def finish(
        self,
        builder: EnvGroupBuilder,
        stop_reason: StopReason,
        reward: float,
        metrics: dict[str, float],
        logs: dict[str, Any],
    ) -> Episode:
        sampled = np.zeros(len(self._ids), dtype=bool)
        for turn in self._turns:
            sampled[turn.start : turn.end] = True
        return Episode(
            dataset=builder.dataset,
            row_id=builder.row_id,
            teacher=builder.teacher,
            prompt_messages=self._prompt_messages,
            teacher_messages=builder.teacher_messages,
            token_ids=np.array(self._ids, dtype=np.int32),
            sampled=sampled,
            sampler_logprobs=np.array(self._logprobs, dtype=np.float32),
            turns=tuple(self._turns),
            stop_reason=stop_reason,
            reward=reward,
            weight_version=self._version,
            metrics=metrics,
            logs=logs,
            tools=self._tools,
            teacher_hints=builder.teacher_hints if isinstance(builder, Hinted) else (),
        )
