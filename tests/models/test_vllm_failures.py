"""vLLM engines that fail, die, come back and lie: what the sampler makes of it. No vLLM is needed."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest
import tiny
import torch
from conformance import params
from scripted_vllm import ScriptedEngine, Weights, generated, scripted_server

from errors import ConfigError, ProtegeError, SamplerError, SamplerUnavailableError
from models.vllm.engine import Answer, Transient, Unreachable
from models.vllm.handover import Model
from models.vllm.in_process import EngineOptions, InProcessEngine
from models.vllm.orphans import Brood, runs
from models.vllm.preflight import Asked, NewWeights, check_servers
from models.vllm.sampler import VLLMSampler, Waits
from models.vllm.server import ServerEngine
from models.vllm.worker import EXTENSION

pytestmark = pytest.mark.anyio
LETTERS = tiny.letters()
QUICK = Waits(request_s=5.0, patience_s=0.3, look_every_s=0.02, look_s=5.0, pause_s=0.01)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def sampler(folder: Path, *engines: Any, waits: Waits = QUICK, slots: int = 8) -> VLLMSampler:
    return VLLMSampler(engines, Model(folder, LETTERS, "float32"), temperature=1.0, slots=slots, waits=waits)


# --- weights


async def test_tokens_carry_the_version_that_was_handed_over_and_proven(tmp_path: Path):
    engine, weights = ScriptedEngine(), Weights(-2.5)
    async with sampler(tmp_path, engine) as s:
        before = await s.sample([1, 2], params(2))
        await s.update_weights(weights, 4)
        after = await s.sample([1, 2], params(2))
    assert (before.weight_version, after.weight_version) == (0, 4)
    assert (before.logprobs, after.logprobs) == ([-1.0] * 2, [-2.5] * 2)
    assert list(tmp_path.iterdir()) == [], "the folder that was handed over is removed"


async def test_stale_weights_end_the_run_with_both_numbers(tmp_path: Path):
    async with sampler(tmp_path, ScriptedEngine(deaf=True)) as s:
        with pytest.raises(ProtegeError, match=r"-1\.0000 where the learner gives -3\.0000") as caught:
            await s.update_weights(Weights(-3.0), 1)
    assert not isinstance(caught.value, SamplerError), "no episode is dropped for it: the run ends"
    assert list(tmp_path.iterdir()) == []


async def test_a_full_disk_is_named(tmp_path: Path):
    full = Weights(error=OSError(errno.ENOSPC, "No space left on device"))
    async with sampler(tmp_path, ScriptedEngine()) as s:
        with pytest.raises(ProtegeError, match=r"No space left.*Make room for one copy"):
            await s.update_weights(full, 1)
    assert list(tmp_path.iterdir()) == []


async def test_an_engine_here_starts_with_the_first_weights(tmp_path: Path):
    engine, weights = ScriptedEngine(started=False), Weights()
    async with sampler(tmp_path, engine) as s:
        await s.update_weights(weights, 0)
        await s.sleep()
        await s.sample([1], params(1))
    assert engine.calls == ["open", "start", "wake", "reload", "sleep", "wake", "close"]


async def test_adapters_have_names_that_carry_the_version_and_old_ones_go(tmp_path: Path):
    engine, weights = ScriptedEngine(takes_adapters=True), Weights(-1.5, has_adapter=True)
    async with sampler(tmp_path, engine) as s:
        for version in (1, 2, 3):
            await s.update_weights(weights, version)
            assert (await s.sample([1, 2], params(1))).weight_version == version
            assert len(engine.adapters) == min(version, 2), "requests in flight may need the last one, and no other"
        assert {name.rpartition("-")[2] for name in engine.adapters} == {"2", "3"}
    assert weights.saved == ["base", "adapter", "adapter", "adapter"]
    assert list(tmp_path.iterdir()) == []


async def test_adapters_are_put_on_their_own_base_and_on_no_other(tmp_path: Path):
    """What another run has left at a server may be too like the base for a proof in bfloat16 to tell."""
    first, second = (ScriptedEngine(name, takes_adapters=True) for name in "ab")
    weights = Weights(-1.5, has_adapter=True)
    first.current = "protege-00000000-9"
    async with sampler(tmp_path, first, second, slots=1) as s:
        await s.update_weights(weights, 1)
        assert first.calls.count("reload") == second.calls.count("reload") == 1
        ours = first.current
        assert second.current == ours and ours.endswith("-base")
        first.current = "protege-00000000-10"  # the adapter is still there, under it other weights
        for i in range(3):
            assert (await s.sample([1, i], params(1))).weight_version == 1
            await anyio.sleep(0.03)  # it is looked at meanwhile
        assert len(first.asked) == 2, "the proof, and the request that found it out"
        await s.update_weights(weights, 2)
        assert (first.calls.count("reload"), second.calls.count("reload")) == (2, 1) and first.current == ours
    assert list(tmp_path.iterdir()) == []


async def test_an_answer_that_others_weights_have_finished_is_not_taken(tmp_path: Path):
    class Shared(ScriptedEngine):
        async def generate(self, *args: Any) -> Answer:
            answer = await super().generate(*args)
            return answer if len(self.asked) == 1 else replace(answer, labels=(self.current, "protege-00000000-9"))

    async with sampler(tmp_path, Shared()) as s:
        await s.update_weights(Weights(-2.0), 1)
        with anyio.fail_after(5), pytest.raises(SamplerError, match="-1, protege-00000000-9' and not with this run's"):
            await s.sample([1, 2], params(2))


async def test_tensors_are_handed_over_without_a_folder_and_proven_alike(tmp_path: Path):
    engine, weights = ScriptedEngine(takes_tensors=True), Weights(-2.5)
    async with sampler(tmp_path, engine) as s:
        await s.update_weights(weights, 4)
        sampled = await s.sample([1, 2], params(2))
    assert (sampled.weight_version, sampled.logprobs) == (4, [-2.5] * 2)
    assert weights.saved == ["tensors"] and "reload" not in engine.calls
    async with sampler(tmp_path, ScriptedEngine(takes_tensors=True, deaf=True)) as s:
        with pytest.raises(ProtegeError, match="did not take the weights"):
            await s.update_weights(Weights(-3.0), 1)
    assert list(tmp_path.iterdir()) == []


async def test_an_engine_that_reads_a_folder_beside_one_that_takes_tensors(tmp_path: Path):
    one, other, weights = ScriptedEngine(takes_tensors=True), ScriptedEngine(), Weights(-2.5)
    async with sampler(tmp_path, one, other) as s:
        await s.update_weights(weights, 1)
    assert sorted(weights.saved) == ["tensors", "whole"] and (one.value, other.value) == (-2.5, -2.5)


async def test_one_server_without_adapters_gets_merged_weights_as_do_all(tmp_path: Path):
    able, other, weights = ScriptedEngine(takes_adapters=True), ScriptedEngine(), Weights(-1.5, has_adapter=True)
    async with sampler(tmp_path, able, other) as s:
        await s.update_weights(weights, 1)
    assert weights.saved == ["whole"]
    assert "reload" in able.calls and "reload" in other.calls


async def test_another_run_on_the_same_server_is_found_out(tmp_path: Path):
    engine = ScriptedEngine()
    async with sampler(tmp_path, engine) as s:
        await s.update_weights(Weights(-2.0), 1)
        engine.current = "protege-00000000-9"
        with pytest.raises(SamplerUnavailableError, match="another run uses it"):
            await s.sample([1, 2], params(2))


# --- engines that fail


async def test_a_request_that_returned_nothing_is_asked_again(tmp_path: Path):
    engine = ScriptedEngine(failures=[Transient("hiccup"), Transient("hiccup")])
    async with sampler(tmp_path, engine) as s:
        assert len((await s.sample([1, 2], params(3))).token_ids) == 3
    assert engine.asked == [[1, 2]] * 3


async def test_tries_are_counted_and_refusals_are_final(tmp_path: Path):
    async with sampler(tmp_path, ScriptedEngine(failures=[Transient("hiccup")] * 9)) as s:
        with pytest.raises(SamplerError, match=r"4 tries failed, the last with: hiccup"):
            await s.sample([1, 2], params(3))
    refusing = ScriptedEngine(failures=[SamplerError("too long")])
    async with sampler(tmp_path, refusing) as s:
        with pytest.raises(SamplerError, match="too long"):
            await s.sample([1, 2], params(3))
    assert len(refusing.asked) == 1


async def test_one_of_two_dies_and_nothing_is_lost(tmp_path: Path):
    dying, other = ScriptedEngine("a", delay_s=0.05), ScriptedEngine("b", delay_s=0.01)
    answers = []
    async with sampler(tmp_path, dying, other, slots=2) as s:
        await s.update_weights(Weights(), 1)

        async def one(i: int) -> None:
            answers.append(await s.sample([1, i], params(2)))

        async with anyio.create_task_group() as tasks:
            for i in range(12):
                tasks.start_soon(one, i)
            await anyio.sleep(0.02)
            dying.down = True
    assert len(answers) == 12
    assert dying.asked, "it was used while it lived"


async def test_an_engine_that_is_back_is_used_again_if_it_has_the_weights(tmp_path: Path):
    away, other = ScriptedEngine("a"), ScriptedEngine("b")
    async with sampler(tmp_path, away, other, slots=1) as s:
        await s.update_weights(Weights(), 1)
        away.down = True
        await s.sample([1, 2], params(1))
        await s.sample([1, 3], params(1))
        away.down, other.down = False, True
        await s.sample([1, 4], params(1))
        assert away.asked[-1] == [1, 4]


async def test_an_engine_that_was_started_again_waits_for_the_next_weights(tmp_path: Path):
    engine = ScriptedEngine("a")
    async with sampler(tmp_path, engine) as s:
        await s.update_weights(Weights(), 1)
        engine.down = True
        with pytest.raises(SamplerUnavailableError, match=r"a is gone.*from its last checkpoint"):
            await s.sample([1, 2], params(1))
        engine.down, engine.current = False, "default"
        with pytest.raises(SamplerUnavailableError, match="started again"):
            await s.sample([1, 2], params(1))
        await s.update_weights(Weights(-2.0), 2)
        assert (await s.sample([1, 2], params(1))).weight_version == 2


@pytest.mark.parametrize("adapters", [False, True])
async def test_an_engine_whose_weights_were_not_proven_waits_for_others(tmp_path: Path, adapters: bool):
    """It is deaf, and its label, or its adapter's name, says that it is not."""
    deaf = ScriptedEngine("a", takes_adapters=adapters, deaf=True, failures=[Transient("hiccup")])
    other, weights = ScriptedEngine("b", takes_adapters=adapters), Weights(-2.0, has_adapter=adapters)
    async with sampler(tmp_path, deaf, other, slots=1) as s:
        await s.update_weights(weights, 1)
        for i in range(5):
            assert (await s.sample([1, i], params(1))).logprobs == [-2.0]
            await anyio.sleep(0.03)  # it is looked at meanwhile
        assert len(deaf.asked) == 1, "the proof alone"
        assert s._pool.members[0].down == "hiccup, while it took new weights"
        deaf.deaf = False
        await s.update_weights(weights, 2)
        other.down = True
        assert (await s.sample([1, 2], params(1))).weight_version == 2
        assert len(deaf.asked) == 3


async def test_no_request_reaches_an_engine_between_its_return_and_its_proof(tmp_path: Path):
    class Slow(ScriptedEngine):
        async def wake(self) -> None:
            await anyio.sleep(0.1)

    engine = Slow("a", failures=[Transient("hiccup")])
    async with sampler(tmp_path, engine) as s:
        with pytest.raises(SamplerUnavailableError, match="hiccup, while it took new weights"):
            await s.update_weights(Weights(-2.0), 1)
        with anyio.fail_after(5), pytest.raises(SamplerUnavailableError, match="hiccup"):
            await s.sample([1, 2], params(1))  # for `patience_s`, though it answers every look

        async def ask() -> None:
            assert (await s.sample([1, 2], params(1))).weight_version == 2

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(s.update_weights, Weights(-3.0), 2)
            await anyio.sleep(0.05)  # it is back, and wakes
            assert s._pool.alive
            tasks.start_soon(ask)


async def test_an_update_that_was_broken_off_leaves_no_engine_in_use(tmp_path: Path):
    class Slow(ScriptedEngine):
        async def wake(self) -> None:
            await anyio.sleep(0.2)

    async with sampler(tmp_path, Slow("a")) as s:
        with anyio.move_on_after(0.1):
            await s.update_weights(Weights(), 1)
        with anyio.fail_after(5), pytest.raises(SamplerUnavailableError, match="not proven"):
            await s.sample([1, 2], params(1))
        await s.update_weights(Weights(), 2)
        assert (await s.sample([1, 2], params(1))).weight_version == 2


async def test_a_turn_that_takes_too_long_is_given_up(tmp_path: Path):
    waits = Waits(request_s=0.1, patience_s=0.3, look_every_s=30, look_s=0.2)
    async with sampler(tmp_path, ScriptedEngine(delay_s=60), waits=waits) as s:
        with anyio.fail_after(5), pytest.raises(SamplerError, match=r"more than 0.1 s.*sampler.timeout_s"):
            await s.sample([1, 2], params(1))


async def test_an_engine_that_dies_as_it_goes_to_sleep_is_no_crash(tmp_path: Path):
    class Dies(ScriptedEngine):
        async def sleep(self) -> None:
            self.down = True
            self._check()

    async with sampler(tmp_path, Dies("a")) as s:
        await s.update_weights(Weights(), 1)
        await s.sleep()
        with pytest.raises(SamplerUnavailableError, match="a is gone"):
            await s.update_weights(Weights(), 2)


async def test_a_server_that_dies_as_old_adapters_are_dropped_is_no_crash(tmp_path: Path):
    class Dies(ScriptedEngine):
        async def has_adapter(self, name: str) -> bool:
            self.down = True
            self._check()
            return True

    dying, other, weights = Dies("a", takes_adapters=True), ScriptedEngine("b", takes_adapters=True), Weights()
    weights.has_adapter = True
    async with sampler(tmp_path, dying, other) as s:
        for version in (1, 2, 3):
            await s.update_weights(weights, version)
        assert (await s.sample([1, 2], params(1))).weight_version == 3
    assert dying.down and len(other.adapters) == 2


async def test_what_answers_in_place_of_a_server_is_not_used_and_does_not_end_the_run(tmp_path: Path):
    class Replaced(ScriptedEngine):
        async def label(self) -> str:
            raise SamplerError("a sent no JSON")

    away, other = Replaced("a"), ScriptedEngine("b")
    async with sampler(tmp_path, away, other, slots=1) as s:
        await s.update_weights(Weights(), 1)
        away.down = True
        await s.sample([1, 2], params(1))
        away.down = False
        before = len(away.asked)
        for _ in range(5):
            await s.sample([1, 3], params(1))
            await anyio.sleep(0.03)  # it is looked at meanwhile
        assert len(away.asked) == before


async def test_requests_that_come_at_once_wake_an_engine_once(monkeypatch: pytest.MonkeyPatch):
    engine, calls = InProcessEngine(EngineOptions("float32", 4, sleeps=True)), []

    async def call(method: str, **_: Any) -> None:
        calls.append(method)
        await anyio.sleep(0.01)

    monkeypatch.setattr(engine, "_call", call)
    monkeypatch.setattr(engine, "_llm", object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("what the learner no longer uses"))
    await engine.sleep()
    async with anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(engine.wake)
    assert calls == ["sleep", "what the learner no longer uses", "wake_up"]


async def test_one_broken_connection_breaks_no_other(tmp_path: Path):
    engine, answers = ScriptedEngine(failures=[Unreachable("broken")], delay_s=0.05), []
    async with sampler(tmp_path, engine) as s:

        async def one(i: int) -> None:
            answers.append(await s.sample([1, i], params(1)))

        async with anyio.create_task_group() as tasks:
            for i in range(3):
                tasks.start_soon(one, i)
    assert len(answers) == 3
    assert len(engine.asked) == 4, "the broken one twice, the others once"


async def test_turns_of_an_episode_stay_where_their_prefix_is(tmp_path: Path):
    engines = ScriptedEngine("a"), ScriptedEngine("b")
    async with sampler(tmp_path, *engines, slots=64) as s:

        async def episode(i: int) -> None:
            log = [1, 2, i]
            for _ in range(4):
                log += [*(await s.sample(log, params(3))).token_ids, 50, i]

        async with anyio.create_task_group() as tasks:
            for i in range(10):
                tasks.start_soon(episode, i)
    where = [{prompt[2] for prompt in engine.asked} for engine in engines]
    assert not where[0] & where[1] and len(where[0]) == len(where[1]) == 5


async def test_no_more_than_the_slots_are_in_flight(tmp_path: Path):
    engine, most = ScriptedEngine(delay_s=0.01), 0
    async with sampler(tmp_path, engine, slots=3) as s:

        async def one(i: int) -> None:
            nonlocal most
            await s.sample([1, i], params(1))

        async with anyio.create_task_group() as tasks:
            for i in range(9):
                tasks.start_soon(one, i)
            for _ in range(5):
                await anyio.sleep(0.004)
                most = max(most, s._pool.members[0].load)
    assert most == 3 and len(engine.asked) == 9


# --- servers, over a real socket


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ((200, generated([7, 8], logprob=-9999.0)), "no usable logprob for 2 of 2"),
        ((200, {"choices": []}), "malformed"),
        ((200, "<html>"), "no JSON"),
        ((200, generated([])), "0 tokens"),
        ((400, {"error": {"message": "the prompt is too long"}}), "400 the prompt is too long"),
    ],
)
async def test_what_a_server_may_not_answer(tmp_path: Path, answer: Any, says: str):
    async with scripted_server(lambda path, body: answer) as server, sampler(tmp_path, ServerEngine(server.url)) as s:
        with pytest.raises(SamplerError, match=says):
            await s.sample([1, 2], params(2))
    assert server.paths == ["/inference/v1/generate"], "asked once: another try would change nothing"


async def test_a_server_that_fails_is_asked_again(tmp_path: Path):
    answers = [(500, {"error": {"message": "oops"}}), (503, "busy"), (200, generated([7, 8]))]
    async with (
        scripted_server(lambda path, body: answers.pop(0)) as server,
        sampler(tmp_path, ServerEngine(server.url)) as s,
    ):
        assert (await s.sample([1, 2], params(2))).token_ids == [7, 8]


async def test_leaving_a_request_closes_its_connection(tmp_path: Path):
    async with scripted_server(lambda path, body: None) as server, sampler(tmp_path, ServerEngine(server.url)) as s:
        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(s.sample, [1, 2], params(2))
                while not server.paths:
                    await anyio.sleep(0.01)
                tasks.cancel_scope.cancel()
            await server.gone.wait()


async def test_a_silent_server_is_not_waited_for(tmp_path: Path):
    waits = replace(QUICK, look_s=0.3)
    async with (
        scripted_server(lambda path, body: None, healthy=False) as silent,
        scripted_server(lambda path, body: (200, generated([7]))) as other,
        sampler(tmp_path, ServerEngine(silent.url), ServerEngine(other.url), waits=waits) as s,
    ):
        with anyio.fail_after(30):
            assert (await s.sample([1, 2], params(1))).token_ids == [7]


async def test_what_is_sent_leaves_nothing_to_the_models_defaults(tmp_path: Path):
    sent: list[dict[str, Any]] = []

    def reply(path: str, body: dict[str, Any]) -> Any:
        sent.append(body)
        return 200, generated([7])

    async with scripted_server(reply) as server, sampler(tmp_path, ServerEngine(server.url)) as s:
        await s.sample([1, 2], params(1, temperature=0.7, seed=5, stop=[9, "###"]))
    how = sent[0]["sampling_params"]
    assert sent[0]["token_ids"] == [1, 2]
    assert (how["top_p"], how["top_k"], how["min_p"], how["repetition_penalty"]) == (1.0, 0, 0.0, 1.0)
    assert (how["temperature"], how["seed"], how["stop_token_ids"], how["stop"]) == (0.7, 5, [9], ["###"])
    assert how["ignore_eos"] and how["include_stop_str_in_output"] and how["detokenize"]


class Updatable:
    """A server that takes weights, fails the next `refusals` resumes, and answers nobody while it is paused."""

    def __init__(self, refusals: int) -> None:
        self.refusals, self.paused, self.label = refusals, False, "default"

    def __call__(self, path: str, body: dict[str, Any]) -> Any:
        route = path.partition("?")[0]
        if route == "/resume" and self.refusals:
            self.refusals -= 1
            return 503, "busy"
        self.paused = (self.paused or route == "/pause") and route != "/resume"
        if route == "/update_weight_version":
            self.label = body["new_version"]
        if route == "/weight_info":
            return 200, {"weight_version": self.label}
        if route == "/inference/v1/generate":
            ids = range(7, 7 + body["sampling_params"]["max_tokens"])
            return None if self.paused else (200, generated(ids, label=self.label))
        return 200, {}


@pytest.mark.parametrize(("refusals", "used"), [(2, True), (3, False)])
async def test_a_server_that_does_not_resume_is_asked_again_and_else_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusals: int, used: bool
):
    monkeypatch.setattr("models.vllm.server.RESUME_PAUSES_S", (0.01, 0.01))
    one, two = Updatable(refusals), Updatable(0)
    async with (
        scripted_server(one) as server,
        scripted_server(two) as other,
        sampler(tmp_path, ServerEngine(server.url), ServerEngine(other.url), slots=1) as s,
    ):
        await s.update_weights(Weights(), 1)
        assert server.paths.count("/resume") == 3 and one.paused is not used
        await anyio.sleep(0.1)  # it is looked at
        with anyio.fail_after(5):
            for i in range(3):
                await s.sample([1, i], params(1))
        assert (s._pool.members[0].down is None) is used
        await s.update_weights(Weights(), 2)
        assert not one.paused and s._pool.members[0].down is None


async def test_a_server_that_freezes_while_it_reads_weights_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its own limit is half an hour: a large model takes a while to be read."""

    class Freezing(Updatable):
        frozen = False

        def __call__(self, path: str, body: dict[str, Any]) -> Any:
            self.frozen = self.frozen or path == "/collective_rpc"
            return None if self.frozen else super().__call__(path, body)

    monkeypatch.setattr("models.vllm.server.LOOK_S", 0.05)
    monkeypatch.setattr("models.vllm.server.CONTROL_S", 0.3)
    async with (
        scripted_server(Freezing(0), healthy=False) as server,
        scripted_server(Updatable(0)) as other,
        sampler(tmp_path, ServerEngine(server.url), ServerEngine(other.url)) as s,
    ):
        with anyio.fail_after(10):
            await s.update_weights(Weights(), 1)
        assert [member.down is None for member in s._pool.members] == [False, True]
        assert "while it took new weights" in str(s._pool.members[0].down)


async def test_a_server_is_resumed_whose_pause_was_not_waited_for(tmp_path: Path):
    class Slow(Updatable):
        def __call__(self, path: str, body: dict[str, Any]) -> Any:
            answer = super().__call__(path, body)
            return None if path.startswith("/pause") else answer  # it does it all the same

    slow = Slow(0)
    async with scripted_server(slow) as server, sampler(tmp_path, ServerEngine(server.url)) as s:
        with anyio.move_on_after(0.5):
            await s.update_weights(Weights(), 1)
        assert server.paths[-1] == "/resume" and not slow.paused


# --- before a run


def served(**changes: Any) -> Any:
    """A server that is fit, but for the changes."""
    config = {"dtype": "torch.float32", "max_model_len": 99} | changes.get("model", {})
    factor = changes.get("follows", True)

    def reply(path: str, body: dict[str, Any]) -> Any:
        if path == "/tokenize":
            return 200, {"tokens": changes.get("tokens", LETTERS.encode(body["prompt"], add_special_tokens=False))}
        if path.startswith("/server_info"):
            if not changes.get("dev", True):
                return 404, {"detail": "Not Found"}
            return 200, {"vllm_config": {"model_config": config, "lora_config": None}, "vllm_env": {}}
        if path == "/v1/models":
            return 200, {"data": [{"id": "m", "max_model_len": 99}] if changes.get("vllm", True) else []}
        if path == "/inference/v1/generate":
            if not changes.get("scale_out", True):
                return 403, {"error": {"message": "Restart vllm serve with --enable-scale-out"}}
            scale = 1 / body["sampling_params"]["temperature"] if factor else 1.0
            top = [{"token_id": i, "logprob": -scale * (1.0 + i)} for i in range(4)]
            return 200, {"choices": [{"logprobs": {"content": [{"token_id": 0, "top_logprobs": top}]}}]}
        return 200, {}

    return reply


async def test_a_server_that_a_killed_run_has_left_paused_goes_on():
    paused, answer = [True], served()

    def reply(path: str, body: dict[str, Any]) -> Any:
        if path == "/is_paused":
            return 200, {"is_paused": paused[0]}
        if path == "/resume":
            paused[0] = False
            return 200, {}
        return None if path == "/inference/v1/generate" and paused[0] else answer(path, body)

    async with scripted_server(reply) as server:
        with anyio.fail_after(10):
            await check_servers(Asked((server.url,)), LETTERS, NewWeights("float32"))
    assert paused == [False]


async def test_a_server_on_a_cpu_must_be_able_to_pack_a_tied_head_anew(tmp_path: Path):
    def reply(path: str, body: dict[str, Any]) -> Any:
        status, found = answer(path, body)
        if path.startswith("/server_info"):
            found["vllm_config"] |= {"device_config": {"device": "cpu"}, "parallel_config": parallel}
        return status, found

    answer, parallel = served(), {"worker_extension_cls": ""}
    async with scripted_server(reply) as server:
        asked = Asked((server.url,))
        for lora_rank in (0, 2):  # an adapter's base is handed over as well
            with pytest.raises(ConfigError, match=f"Start it with --worker-extension-cls {EXTENSION}"):
                await check_servers(asked, LETTERS, NewWeights("float32", lora_rank, tied=True))
        (untied,) = await check_servers(asked, LETTERS, NewWeights("float32"))
        parallel["worker_extension_cls"] = EXTENSION
        (facts,) = await check_servers(asked, LETTERS, NewWeights("float32", tied=True))
    assert (untied.repacks, facts.repacks) == (False, True)


async def test_a_head_is_packed_anew_after_a_reload_and_before_the_label(tmp_path: Path):
    asked: list[Any] = []

    def reply(path: str, body: dict[str, Any]) -> Any:
        asked.append((path, body.get("method")))
        return 200, {}

    async with scripted_server(reply) as server:
        engine = ServerEngine(server.url, repacks=True)
        await engine.open()
        await engine.reload(tmp_path, "new")
        await engine.close()
    order = [(path.partition("?")[0], method) for path, method in asked]
    assert order == [
        ("/pause", None), ("/collective_rpc", "reload_weights"), ("/collective_rpc", "repack_heads"),
        ("/update_weight_version", None), ("/resume", None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("paused", "resume", "dry_run", "says", "posts"),
    [
        ((200, "<html>"), (200, {}), False, "its /is_paused is not vLLM's", 0),
        ((200, [True]), (200, {}), False, "its /is_paused is not vLLM's", 0),
        ((200, {"is_paused": True}), (400, {"error": {"message": "no"}}), False, r"does not resume \(400 no\)", 1),
        ((200, {"is_paused": True}), (200, {}), True, "a dry run changes nothing.*curl -X POST http://.*/resume", 0),
    ],
)
async def test_a_paused_server_that_is_not_resumed_is_named(
    paused: Any, resume: Any, dry_run: bool, says: str, posts: int
):
    answer = served()

    def reply(path: str, body: dict[str, Any]) -> Any:
        return {"/is_paused": paused, "/resume": resume}.get(path) or answer(path, body)

    async with scripted_server(reply) as server:
        with pytest.raises(ConfigError, match=says):
            await check_servers(Asked((server.url,)), LETTERS, NewWeights("float32"), dry_run=dry_run)
    assert server.paths.count("/resume") == posts


async def test_a_server_that_is_fit():
    async with scripted_server(served()) as server:
        (facts,) = await check_servers(Asked((server.url,)), LETTERS, NewWeights("float32"))
    assert (facts.url, facts.max_model_len, facts.takes_adapters) == (server.url, 99, False)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"follows": False}, "--logprobs-mode processed_logprobs"),
        ({"tokens": [1, 2, 3]}, "it serves another"),
        ({"dev": False}, "VLLM_SERVER_DEV_MODE=1"),
        ({"dev": False, "vllm": False}, "no vLLM server answers there"),
        ({"scale_out": False}, "--enable-scale-out"),
        ({"model": {"dtype": "torch.bfloat16"}}, "--dtype float32"),
    ],
)
async def test_a_server_that_is_not_fit_is_told_what_to_set(changes: dict[str, Any], says: str):
    async with scripted_server(served(**changes)) as server:
        with pytest.raises(ConfigError, match=says):
            await check_servers(Asked((server.url,)), LETTERS, NewWeights("float32"))


async def test_a_dead_url_is_named():
    with pytest.raises(ConfigError, match=r"http://127.0.0.1:9 cannot be reached"):
        await check_servers(Asked(("http://127.0.0.1:9",)), LETTERS, NewWeights("float32"))


# --- an engine in this process


async def test_an_engine_that_freezes_in_an_update_does_not_outlast_its_limit(monkeypatch: pytest.MonkeyPatch):
    class Frozen:
        errored = False

        async def pause_generation(self, **_: Any) -> None: ...

        async def collective_rpc(self, *_: Any, **__: Any) -> None:
            await anyio.sleep_forever()

        async def resume_generation(self) -> None:
            await anyio.sleep_forever()

    async def update() -> None:
        with anyio.fail_after(0.05):
            await engine.reload(Path("m"), "label")

    monkeypatch.setattr("models.vllm.in_process.RESUME_S", 0.05)
    engine = InProcessEngine(EngineOptions("float32", 4))
    monkeypatch.setattr(engine, "_llm", Frozen())
    task = asyncio.create_task(update())  # a limit of anyio's around it would not end it either
    try:
        await asyncio.wait([task], timeout=5.0)
        assert task.done() and isinstance(task.exception(), TimeoutError)
    finally:
        task.cancel()


async def test_an_engine_that_dies_in_an_update_is_not_waited_for(monkeypatch: pytest.MonkeyPatch):
    """vLLM never answers a call that its engine's death has left open."""

    class Dying:
        errored, dead_error = False, RuntimeError("EngineCore died")

        async def pause_generation(self, **_: Any) -> None: ...

        async def collective_rpc(self, *_: Any, **__: Any) -> None:
            asyncio.get_running_loop().call_later(0.05, setattr, self, "errored", True)
            await anyio.sleep_forever()

        async def resume_generation(self) -> None:
            await anyio.sleep_forever()

    monkeypatch.setattr("models.vllm.in_process.LOOK_S", 0.01)
    engine = InProcessEngine(EngineOptions("float32", 4))
    monkeypatch.setattr(engine, "_llm", Dying())
    before = asyncio.all_tasks()
    with anyio.fail_after(10), pytest.raises(Unreachable, match="has died"):
        await engine.reload(Path("m"), "label")
    await anyio.sleep(0)
    assert asyncio.all_tasks() == before


def test_what_an_engine_here_is_told():
    told = EngineOptions("bfloat16", 64, 4096, 0.4, lora_rank=20, sleeps=True).arguments(Path("m"))
    assert (told["logprobs_mode"], told["generation_config"]) == ("processed_logprobs", "vllm")
    assert (told["gpu_memory_utilization"], told["max_model_len"], told["enable_sleep_mode"]) == (0.4, 4096, True)
    assert (told["max_lora_rank"], told["enable_lora"]) == (32, True)
    assert EngineOptions("float32", 1, transfer="ipc").arguments(Path("m"))["weight_transfer_config"] == {
        "backend": "ipc"
    }
    assert "weight_transfer_config" not in told
    assert "kv_cache_memory_bytes" not in told and "enable_lora" not in EngineOptions("float32", 1).arguments(Path("m"))


# What an engine is to a run: it starts a process of its own, and soon neither has the environment that it began with.
ENGINE = """
import os, subprocess, sys, time
deep = int(sys.argv[1])
if deep:
    subprocess.Popen([sys.executable, __file__, str(deep - 1)], start_new_session=True)
time.sleep(1)
os.execve(sys.executable, [sys.executable, "-c", "import time; time.sleep(1000)"], {"TITLED": "1"})
"""
RUN = """
import subprocess, sys, time
from models.vllm.orphans import Brood
brood, how = Brood(grace_s=0.2), sys.argv[2]
with brood.hatching():
    child = subprocess.Popen([sys.executable, sys.argv[1], "1"], start_new_session=True)
    print(child.pid, flush=True)
    sys.stdin.readline()
bystander = subprocess.Popen(["sleep", "1000"])
print(bystander.pid, flush=True)
if how == "ended":
    brood.end()
print("so", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("how", ["killed at once", "killed while it starts", "killed later", "ended"])
def test_what_a_run_started_for_an_engine_ends_with_it_and_nothing_else_does(tmp_path: Path, how: str):
    (tmp_path / "engine.py").write_text(ENGINE)
    command = [sys.executable, "-c", RUN, str(tmp_path / "engine.py"), how]
    run = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None and run.stdin is not None
    brood, bystander = [psutil.Process(int(run.stdout.readline()))], None
    try:
        if how != "killed at once":
            until(lambda: len(brood[0].children()) == 1)
            brood += brood[0].children()
            until(lambda: all("TITLED" in process.environ() for process in brood))
        if how in ("killed later", "ended"):
            run.stdin.write("go on\n")
            run.stdin.flush()
            bystander = psutil.Process(int(run.stdout.readline()))
            run.stdout.readline()
        if how == "ended":
            assert not [process for process in brood if runs(process)], "`end` has waited for them"
        run.kill()
        run.wait()
        until(lambda: not [process for process in (*brood, *_children(brood[0])) if runs(process)])
        assert bystander is None or runs(bystander)
    finally:
        for process in [run, *brood, *([bystander] if bystander else [])]:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)


def test_an_engine_that_fails_at_once_is_ended_all_the_same():
    brood = Brood(grace_s=0.1)
    with brood.hatching():
        child = subprocess.Popen(["sleep", "1000"])
    try:
        brood.end()
        assert child.poll() == -signal.SIGKILL
    finally:
        child.kill()
        child.wait()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _children(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.children(recursive=True)
    return []


async def test_an_adapter_that_could_not_be_handed_over_leaves_no_folder(tmp_path: Path):
    class Full(ScriptedEngine):
        async def load_adapter(self, folder: Path, name: str) -> None:
            raise ProtegeError("no room for an adapter")

    async with sampler(tmp_path, Full(takes_adapters=True)) as s:
        with pytest.raises(ProtegeError, match="no room"):
            await s.update_weights(Weights(-1.5, has_adapter=True), 1)
        assert list(tmp_path.iterdir()) == []
