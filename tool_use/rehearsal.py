"""An episode played by hand, to see what an environment does before a model acts in it."""

from __future__ import annotations

from collections.abc import Sequence

from envs.rendering import Renderer
from envs.rollout import run_episode
from envs.types import EnvGroupBuilder, Episode, Sampled, SamplingParams
from errors import ConfigError


class _Script:
    """Says these texts, one a turn, each ended as the renderer's model would."""

    def __init__(self, renderer: Renderer, turns: Sequence[str]) -> None:
        self._renderer = renderer
        self._turns = list(turns)

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams) -> Sampled:
        if not self._turns:
            raise ConfigError("the episode goes on after the last of these turns: give another one")
        text = self._turns.pop(0)
        ids = self._renderer.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = [*ids, self._renderer.end_of_turn_id][: params.max_tokens]
        return Sampled(ids, [0.0] * len(ids), stopped=ids[-1] in params.stop.token_ids)


async def rehearse(builder: EnvGroupBuilder, renderer: Renderer, turns: Sequence[str]) -> Episode:
    """The episode in which a student says these `turns`. Tools run, limits hold, and the tokens are those
    that training would see. Raises what a run would raise, and `ConfigError` if the turns do not end it."""
    try:
        env = (await builder.make_envs())[0]
        script: object = _Script(renderer, turns)
        return await run_episode(env, script, builder, temperature=1.0, seed=0)  # type: ignore[arg-type]
    finally:
        await builder.cleanup()
