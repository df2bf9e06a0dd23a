"""`python scripted_shell_run.py RECORDS key=value…`: the Harbor recipe with a student that really works in its shell.

The student's turns are scripts, chosen by the episode's seed, with the log-probabilities that the model being trained
gives them. What the sampler is sent and returns, and which sandbox every attempt has, is appended to RECORDS. Each
script says what its commands print, so that whoever reads the records can tell a true tool result from a made-up one.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from envs.types import Sampled, SamplingParams
from models.device_thread import compute
from models.transformers_sampler import TransformersSampler
from recipes import on_policy_distillation_harbor_multi_turn as recipe
from recipes import samplers
from recipes.cli import run_cli
from recipes.embedded_shell import call, transcripts
from sandbox.docker_sandbox import DockerSandbox, DockerSandboxFactory
from sandbox.types import with_cut

OUTPUT_BYTES = 1000  # max_output_bytes of these runs
COMMAND_TIMEOUT_S = 20.0  # generous: a solution that a busy machine makes late would fail for good reason
DONE = "Done."


@dataclass(frozen=True)
class Script:
    """What the student says, turn by turn, and the whole tool result that each turn but the last is answered with.

    None: not foretold."""

    turns: tuple[str, ...]
    results: tuple[str | None, ...]


def script(seed: int) -> Script:
    """A training episode's: one of the things that students do in shells, with a secret of its own."""
    secret = f"s{seed:x}"
    flood = "".join(f"{secret}\n" for _ in range(4000)).encode()
    kept = flood[: OUTPUT_BYTES - OUTPUT_BYTES // 2] + flood[-(OUTPUT_BYTES // 2) :]
    ended = "[this ended the shell; the next command has a new one, without earlier `cd`s and variables]"
    killed = (
        f"[killed after {COMMAND_TIMEOUT_S:g} s, with all that it had started; the next command has a new shell]",
        "[the shell had ended; this is a new one, without earlier `cd`s and variables]",
    )
    kinds: list[tuple[list[str], list[str | None]]] = [
        ([f"cd /tmp && export WORD={secret}; sleep 0.5", "echo $WORD in $PWD"], ["[exit code 0]", f"{secret} in /tmp"]),
        ([f"sleep 1; echo {secret} woke"], [f"{secret} woke"]),
        ([f"cat > note << end\n{secret}\nend", "sleep 0.7; cat note"], ["[exit code 0]", secret]),
        ([f"yes {secret} | head -n 4000"], [with_cut(kept, len(flood)).removesuffix("\n")]),
        ([f"echo {secret}; exit 3", "echo again"], [f"{secret}\n[exit code 3]\n{ended}", f"{killed[1]}\nagain"]),
        ([f"sleep 900 & echo {secret} started", "jobs | wc -l"], [f"{secret} started", "1"]),
        ([f"echo {secret} began; sleep 600", "echo back"], [f"{secret} began\n{killed[0]}", f"{killed[1]}\nback"]),
        ([f"setsid sleep 900 < /dev/null > /dev/null 2>&1 & echo {secret} $HOSTNAME"], [f"{secret} sandbox"]),
    ]  # fmt: skip
    commands, results = kinds[seed % len(kinds)]
    if seed % 11 == 0:  # a call that cannot be read
        return Script((f"<tool_call>\n{{{secret} is no call", DONE), (None, None))
    return Script((*map(call, commands), DONE), (*results, None))


def solving_script(prompt: str) -> Script | None:
    """The script that solves the task of a prompt, if it is one of those that ship."""
    for known in transcripts():
        if known.instructions[0] in prompt:
            turns = [turn for command in known.commands for turn in (call(f"sleep 0.5\n{command}"), DONE)]
            return Script(tuple(turns), (None,) * len(turns))
    return None


@dataclass
class Place:
    """One episode's place in its script. `evaluated`: it is graded, so it solves its task."""

    number: int
    script: Script
    evaluated: bool
    turn: int = 0


PLACE: ContextVar[Place | None] = ContextVar("place", default=None)  # every episode runs in a task of its own
SANDBOX: ContextVar[str | None] = ContextVar("sandbox", default=None)
NUMBERS = itertools.count()


class Records:
    """A file that is complete up to the moment of a kill."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 (open as long as the run is)

    def add(self, kind: str, **values: Any) -> None:
        self._file.write(json.dumps({"kind": kind, "process": os.getpid(), "time": time.time(), **values}) + "\n")


class ScriptedSampler(TransformersSampler):
    """Says what scripts say, in place of drawing."""

    records: Records
    held_out: frozenset[str] = frozenset()  # instructions of the tasks that are evaluated

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams) -> Sampled:
        place = PLACE.get()
        if place is None:
            prompt = self._tokenizer.decode(prompt_ids)
            evaluated = any(instruction in prompt for instruction in self.held_out)
            chosen = solving_script(prompt) if evaluated else None
            place = Place(next(NUMBERS), chosen or script(params.seed), evaluated)
            PLACE.set(place)
        text = place.script.turns[min(place.turn, len(place.script.turns) - 1)]
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"] + [min(params.stop.token_ids)]
        stopped = len(ids) <= params.max_tokens
        ids = ids[: params.max_tokens]
        logprobs = await compute(self._logprobs, list(prompt_ids), ids)
        self.records.add(
            "turn", attempt=place.number, turn=place.turn, sandbox=SANDBOX.get(), sent=list(prompt_ids),
            returned=ids, evaluated=place.evaluated, results=place.script.results, version=self._version,
        )  # fmt: skip
        place.turn += 1
        return Sampled(ids, logprobs, stopped, self._version)

    @torch.no_grad()
    def _logprobs(self, prompt: list[int], ids: list[int]) -> list[float]:
        whole = torch.tensor(prompt + ids)
        hidden = self._lm.hidden([whole])[len(prompt) - 1 : -1]
        found = self._lm.logits(hidden).log_softmax(-1)
        return found.gather(1, whole[len(prompt) :, None])[:, 0].tolist()


def main(records: str, argv: Sequence[str]) -> None:
    ScriptedSampler.records = Records(Path(records))
    create = DockerSandboxFactory.create

    async def recorded(self: DockerSandboxFactory, *arguments: Any) -> DockerSandbox:
        sandbox = await create(self, *arguments)
        SANDBOX.set(sandbox.id)
        ScriptedSampler.records.add("sandbox", sandbox=sandbox.id)
        return sandbox

    check = recipe.check

    def checked(config: recipe.Config) -> recipe.Checked:
        found = check(config)
        ScriptedSampler.held_out = frozenset(found.data.tasks[name].instruction for name in found.data.test)
        return found

    DockerSandboxFactory.create = recorded  # type: ignore[method-assign]
    recipe.check = checked
    samplers.TransformersSampler = ScriptedSampler  # type: ignore[misc]
    run_cli(recipe.main, recipe.Config, argv=list(argv))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
