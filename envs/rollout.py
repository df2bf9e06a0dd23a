"""From environments to episodes: the agent loop, with structured concurrency and counted failures."""

from __future__ import annotations

import hashlib
import logging
from typing import TYPE_CHECKING

import anyio

from envs.types import (
    Closable,
    Env,
    EnvGroupBuilder,
    Episode,
    EpisodeGroup,
    EpisodeLog,
    GivenEpisodes,
    SamplingParams,
    StopReason,
)
from errors import InfrastructureError

if TYPE_CHECKING:  # at run time it would bring torch into every environment
    from models.types import Sampler

logger = logging.getLogger(__name__)
CLOSE_S = 120.0  # for giving back what an env or a builder holds: it is not cancelled, and may be anybody's code


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any values, the same on every machine: no shared random state to save or race for."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


async def run_episode(
    env: Env, sampler: Sampler, builder: EnvGroupBuilder, *, temperature: float, seed: int
) -> Episode:
    """One attempt, turn by turn. The sampler is always sent the log as it stands, never a new rendering.
    What the env holds is given back as soon as the attempt ends, however it ends."""
    with anyio.CancelScope() as scope:
        try:
            return await _run_turns(env, sampler, builder, temperature=temperature, seed=seed)
        finally:
            if isinstance(env, Closable):
                # Not a scope of its own: a task group that the env has opened must be left inside of the scope that it
                # was entered in.
                scope.shield, scope.deadline = True, anyio.current_time() + CLOSE_S
                await env.aclose()
    raise InfrastructureError(f"{builder.row_id}: what an episode held was not given back within {CLOSE_S:g} s")


async def _run_turns(env: Env, sampler: Sampler, builder: EnvGroupBuilder, *, temperature: float, seed: int) -> Episode:
    log = EpisodeLog(await env.initial_observation())
    reward, metrics, logs = 0.0, {}, {}
    turn = 0
    while True:
        params = SamplingParams(
            max_tokens=min(env.max_generation_tokens, env.max_trajectory_tokens - len(log)),
            stop=env.stop,
            temperature=temperature,
            seed=derive_seed(seed, turn),
        )
        sampled = await sampler.sample(log.token_ids, params)
        log.append_sampled(sampled)
        result = await env.step(sampled)
        log.record_tool_calls(result.tool_calls)
        reward += result.reward
        _add(metrics, result.metrics)
        logs.update(result.logs)
        if result.stop_reason is not None:
            return log.finish(builder, result.stop_reason, reward, metrics, logs)
        assert result.observation is not None
        log.append_observation(result.observation)
        if len(log) >= env.max_trajectory_tokens:
            return log.finish(builder, StopReason.CONTEXT_OVERFLOW, reward, metrics, logs)
        turn += 1


def _add(total: dict[str, float], more: dict[str, float]) -> None:
    for name, value in more.items():
        total[name] = total.get(name, 0.0) + value


async def run_group(builder: EnvGroupBuilder, sampler: Sampler, *, temperature: float, seed: int) -> EpisodeGroup:
    """All attempts at one row, at once. A failure of ours drops that episode alone, under its reason. Given
    episodes are taken as they are."""
    if isinstance(builder, GivenEpisodes):
        return EpisodeGroup(builder.dataset, builder.row_id, builder.teacher, tuple(builder.given))
    results: dict[int, Episode | InfrastructureError] = {}

    async def attempt(k: int, env: Env) -> None:
        try:
            results[k] = await run_episode(env, sampler, builder, temperature=temperature, seed=derive_seed(seed, k))
        except InfrastructureError as error:
            results[k] = error

    try:
        envs = await builder.make_envs()
        async with anyio.create_task_group() as tasks:
            for k, env in enumerate(envs):
                tasks.start_soon(attempt, k, env)
    except InfrastructureError as error:  # of make_envs: attempts catch their own
        results.update(dict.fromkeys(range(builder.group_size), error))
    finally:
        with anyio.move_on_after(CLOSE_S, shield=True) as cleaning:
            await builder.cleanup()
        if cleaning.cancelled_caught:
            logger.warning("%s: its cleanup did not end within %g s and was given up", builder.row_id, CLOSE_S)
    ordered = [results[k] for k in range(builder.group_size)]
    return EpisodeGroup(
        dataset=builder.dataset,
        row_id=builder.row_id,
        teacher=builder.teacher,
        episodes=tuple(r for r in ordered if isinstance(r, Episode)),
        dropped=tuple(r.reason for r in ordered if isinstance(r, InfrastructureError)),
        causes=tuple(str(r) for r in ordered if isinstance(r, InfrastructureError)),
    )
