"""Weights from memory to memory by vLLM's own weight transfer: with a transport for CPUs, and on a GPU with its own."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import anyio
import httpx2
import pytest
import tiny
import torch
import vllm_server
from conformance import params
from test_vllm_sampler import Kept

from errors import ConfigError, ProtegeError, SamplerError, SamplerUnavailableError
from models.causal_lm import CausalLM
from models.vllm import transfer
from models.vllm.engine import Unreachable
from models.vllm.handover import Model
from models.vllm.in_process import EngineOptions, InProcessEngine
from models.vllm.preflight import Asked, NewWeights, check_servers
from models.vllm.sampler import VLLMSampler
from models.vllm.server import ServerEngine
from models.weights import LMWeights
from recipes import samplers
from tests.recipes import tiny_models

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.anyio]

LETTERS = tiny.letters()
SMALL = EngineOptions("float32", max_num_seqs=16, max_model_len=512, enforce_eager=True)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def by_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    import file_transfer

    with pytest.MonkeyPatch.context() as patch:
        for name, value in vllm_server.SMALL_CPU.items():
            patch.setitem(os.environ, name, value)
        file_transfer.install(tmp_path_factory.mktemp("site"), patch)
        file_transfer.register()
        backend = transfer.Backend("file_transfer", "TrainerInfo", {})
        patch.setitem(transfer.BACKENDS, file_transfer.NAME, backend)
        yield file_transfer


# --- whole runs: before the engine below, whose event loop goes on until the last test


def test_a_run_trains_as_by_way_of_a_folder(by_file: Any, tmp_path: Path):
    """Two steps, each sampled from what the last one made: the same tokens, logprobs and KL."""
    models = {
        "model_name": tiny_models.make_model(tmp_path / "student", seed=1, hidden=64),
        "teacher_model": tiny_models.make_model(tmp_path / "teacher", seed=2, hidden=64),
    }
    options = {
        "objective": "jsd", "learning_rate": 3e-2, "eval_size": 0, "sampler": "vllm", "sampler__enforce_eager": True,
        "sampler__max_model_len": 128,
    }  # fmt: skip
    folder = tiny_models.run(tmp_path / "folder", models, **options)
    made, before = samplers.engine_options, len(by_file.Trainer.sent)

    def with_transfer(*arguments: Any, **named: Any) -> EngineOptions:
        return replace(made(*arguments, **named), transfer=by_file.NAME)

    with mock.patch.object(samplers, "engine_options", with_transfer):
        transferred = tiny_models.run(tmp_path / "transfer", models, **options)
    assert len(by_file.Trainer.sent) == before + 3, "before the first step, and after each"
    for step in (1, 2):
        ours, theirs = (tiny_models.episodes(run, step) for run in (transferred, folder))
        assert [e["token_ids"] for e in ours] == [e["token_ids"] for e in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert one["sampler_logprobs"] == pytest.approx(other["sampler_logprobs"], abs=1e-4, nan_ok=True)
            assert one["weight_version"] == step - 1
    for one, other in zip(tiny_models.training_rows(transferred), tiny_models.training_rows(folder), strict=True):
        assert one["kl"] == pytest.approx(other["kl"], abs=1e-4) and one["sampler_gap/max"] < 0.01


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_run_trains_over_cuda_ipc(tmp_path: Path):
    """On a GPU that student and engine share."""
    models = {
        "model_name": tiny_models.make_model(tmp_path / "student", seed=1, hidden=128),
        "teacher_model": tiny_models.make_model(tmp_path / "teacher", seed=2, hidden=128),
    }
    options = {
        "objective": "jsd", "learning_rate": 3e-2, "eval_size": 0, "device": "cuda", "sampler": "vllm",
        "sampler__enforce_eager": True, "sampler__max_model_len": 128, "sampler__gpu_memory_utilization": 0.3,
    }  # fmt: skip
    for handover in ("ipc", "folder"):
        run = tiny_models.run(tmp_path / handover, models, **options, sampler__handover=handover)
        rows = tiny_models.training_rows(run)
        assert len(rows) == 2 and all(row["mismatch_kl"] < 0.01 for row in rows)
        assert not tiny_models.leftovers(run)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a GPU for the run and one for its server")
def test_a_run_trains_over_nccl(tmp_path: Path):
    models = {
        "model_name": tiny_models.make_model(tmp_path / "student", seed=1, hidden=128),
        "teacher_model": tiny_models.make_model(tmp_path / "teacher", seed=2, hidden=128),
    }
    flags = (*vllm_server.SAMPLER_FLAGS, "--weight-transfer-config", json.dumps({"backend": "nccl"}))
    env = {**vllm_server.UPDATABLE, "CUDA_VISIBLE_DEVICES": "1"}
    dtype = ("--dtype", "bfloat16")
    with vllm_server.serve(models["model_name"], tmp_path / "log", flags=(*flags, *dtype), env=env) as server:
        for handover in ("nccl", "folder"):
            run = tiny_models.run(
                tmp_path / handover, models, objective="jsd", learning_rate=3e-2, eval_size=0, device="cuda",
                sampler__url=server.url, sampler__handover=handover,
            )  # fmt: skip
            rows = tiny_models.training_rows(run)
            assert len(rows) == 2 and all(row["mismatch_kl"] < 0.01 for row in rows)


# --- vLLM's half for NCCL, without NCCL


async def test_the_half_for_nccl_meets_sends_and_is_freed_when_its_server_dies(monkeypatch: pytest.MonkeyPatch):
    """vLLM's own class; what it would put on the wire is a double, which blocks as a collective does."""
    from vllm.distributed.weight_transfer import nccl_engine

    class Group:
        def __init__(self, info: Any) -> None:
            self.info, self.ended = info, threading.Event()

        def destroy(self) -> None:
            self.ended.set()

    groups: list[Group] = []
    sent: list[list[str]] = []
    dies = False

    def meet(info: Any) -> Group:
        groups.append(Group(info))
        return groups[-1]

    def broadcast(iterator: Any, group: Group, **_: Any) -> None:
        sent.append([name for name, _ in iterator])
        if dies:
            assert group.ended.wait(30)
            raise RuntimeError("aborted")

    calls: list[tuple[str, Any]] = []

    async def call(method: str, argument: Any = None) -> None:
        calls.append((method, argument))
        if method == "update_weights" and dies:
            raise Unreachable("the server cannot be reached")

    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", meet)
    monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_producer", broadcast)
    weights = LMWeights(CausalLM.verified(tiny.vllm_model()))
    sender = transfer.Sender("http://a", "nccl", call, master_address="10.0.0.1", master_port=5, world_size=3)
    await sender.send(weights)
    names = list(weights.tensors())
    assert [name for name, _ in calls] == [
        "init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update",
    ]  # fmt: skip
    told = calls[0][1]
    assert (told["master_address"], told["master_port"], told["world_size"], told["rank_offset"]) == (
        "10.0.0.1",
        5,
        3,
        1,
    )
    assert told["packed"] and json.dumps(calls) and calls[2][1]["names"] == names == sent[0]
    assert (groups[0].info.master_port, groups[0].info.world_size) == (5, 3)
    dies = True
    with anyio.fail_after(20), pytest.raises(Unreachable):
        await sender.send(weights)
    assert groups[0].ended.is_set() and len(groups) == 1


# --- servers


@pytest.fixture(scope="module")
def server(by_file: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[vllm_server.Server]:
    folder = tmp_path_factory.mktemp("served")
    tiny.vllm_folder(folder, tiny.vllm_model())
    flags = (*vllm_server.SAMPLER_FLAGS, "--weight-transfer-config", json.dumps({"backend": by_file.NAME}))
    env = {**vllm_server.UPDATABLE, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with vllm_server.serve(folder, folder / "log", flags=flags, env=env) as server:
        yield server


async def test_a_server_takes_the_weights_without_a_folder(
    server: vllm_server.Server, by_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """By the calls that NCCL makes. What a killed run has left in the midst of an update is no hindrance."""
    asked = Asked((server.url,))
    with pytest.raises(ConfigError, match=f"by {by_file.NAME}, and sampler.handover is nccl. Start it with --weight"):
        await check_servers(asked, LETTERS, NewWeights("float32", transfer="nccl"))
    await check_servers(asked, LETTERS, NewWeights("float32", transfer=by_file.NAME))
    httpx2.post(server.url + "/init_weight_transfer_engine", json={"init_info": {"greeting": "hello"}}, timeout=60)
    assert httpx2.post(server.url + "/start_weight_update", timeout=60).status_code == 200
    model = tiny.vllm_model()
    weights, prompt = LMWeights(CausalLM.verified(model)), tiny.prompts(1)[0]
    greetings = len(by_file.Trainer.made)
    for run in range(2):  # a second run finds what the first has left behind
        engine = ServerEngine(server.url, repacks=True, transfer=by_file.NAME)
        async with VLLMSampler([engine], Model(tmp_path, LETTERS, "float32"), temperature=1.0, slots=4) as sampler:
            for version in (1, 2):
                change(model)
                await sampler.update_weights(weights, version)
                answer = await sampler.sample(prompt, params(12, seed=7))
                expected = weights.logprobs([*prompt, *answer.token_ids], 1.0)[len(prompt) - 1 :]
                assert answer.weight_version == version and answer.logprobs == pytest.approx(expected, abs=1e-3)
        assert len(by_file.Trainer.made) == greetings + run + 1, "the halves meet once a run"
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(by_file.Trainer, "fault", "lost")
    async with VLLMSampler([engine], Model(tmp_path, LETTERS, "float32"), temperature=1.0, slots=4) as sampler:
        with pytest.raises(ProtegeError, match="did not take new weights: POST /update_weights: 500"):
            await sampler.update_weights(weights, 3)
        monkeypatch.setattr(by_file.Trainer, "fault", None)
        await sampler.update_weights(weights, 4)
        assert (await sampler.sample(prompt, params(2))).weight_version == 4


async def test_a_server_that_is_killed_in_the_midst_of_a_transfer_is_taken_out(
    server: vllm_server.Server, by_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The last test of this server."""
    weights = LMWeights(CausalLM.verified(tiny.vllm_model()))
    engine = ServerEngine(server.url, repacks=True, transfer=by_file.NAME)
    monkeypatch.setattr(by_file.Trainer, "before_part", staticmethod(lambda part: server.kill() if part == 1 else None))
    async with VLLMSampler([engine], Model(tmp_path, LETTERS, "float32"), temperature=1.0, slots=4) as sampler:
        with anyio.fail_after(60), pytest.raises(SamplerUnavailableError, match="while it took new weights"):
            await sampler.update_weights(weights, 1)


# --- one engine


@pytest.fixture(scope="module")
async def engine(by_file: Any, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[InProcessEngine]:
    folder = tmp_path_factory.mktemp("model")
    tiny.vllm_folder(folder, tiny.vllm_model())
    engine = InProcessEngine(replace(SMALL, transfer=by_file.NAME))
    await engine.start(folder, "the fixture's")
    yield engine
    await engine.close()


def change(model: Any) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.roll(1, 0) if p.dim() == 2 else p)


async def test_what_is_sampled_is_what_is_sampled_by_way_of_a_folder(
    engine: InProcessEngine, by_file: Any, tmp_path: Path
):
    model = tiny.vllm_model()
    weights, said = LMWeights(CausalLM.verified(model)), {}
    change(model)
    for how in ("transfer", "folder"):
        kept: Any = Kept(engine, takes_adapters=False)
        kept.takes_tensors = how == "transfer"
        model.load_state_dict(tiny.vllm_model().state_dict())
        async with VLLMSampler([kept], Model(tmp_path, LETTERS, "float32"), temperature=1.0, slots=64) as sampler:
            found = []
            for version in (1, 2):
                change(model)
                await sampler.update_weights(weights, version)
                assert how == "folder" or list(tmp_path.iterdir()) == []
                for prompt in tiny.prompts(4):
                    answer = await sampler.sample(prompt, params(12, seed=7))
                    assert answer.weight_version == version
                    found.append((answer.token_ids, answer.logprobs))
                    expected = weights.logprobs([*prompt, *answer.token_ids], 1.0)[len(prompt) - 1 :]
                    assert answer.logprobs == pytest.approx(expected, abs=1e-3)
            said[how] = found
    assert said["transfer"] == said["folder"]
    assert by_file.Trainer.sent[-1] and set(by_file.Trainer.sent[-1]) == set(weights.tensors())


async def test_requests_in_flight_are_paused_and_go_on(engine: InProcessEngine, tmp_path: Path):
    model, long = tiny.vllm_model(), []
    weights = LMWeights(CausalLM.verified(model))
    kept: Any = Kept(engine, takes_adapters=False)
    async with (
        VLLMSampler([kept], Model(tmp_path, LETTERS, "float32"), temperature=1.0, slots=64) as sampler,
        anyio.create_task_group() as tasks,
    ):

        async def ask() -> None:
            long.append(await sampler.sample([1, 2, 3], params(450)))

        await sampler.update_weights(weights, 0)
        tasks.start_soon(ask)
        await sampler.sample([4, 5], params(20))  # the long one has begun by then
        change(model)
        await sampler.update_weights(weights, 1)
        assert not long, "it was still on its way"
    (answer,) = long
    new = torch.tensor(weights.logprobs([1, 2, 3, *answer.token_ids], 1.0)[2:])
    got = torch.tensor(answer.logprobs)
    assert (len(got), answer.weight_version) == (450, 0)
    torch.testing.assert_close(got[-10:], new[-10:], atol=1e-3, rtol=0)
    assert (got - new)[:10].abs().max() > 0.1


@pytest.mark.parametrize(("fault", "says"), [("silent", "did not take the weights"), ("lost", "update_weights failed")])
async def test_a_transfer_that_fails_ends_the_run_and_never_goes_on_with_stale_weights(
    engine: InProcessEngine, by_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, says: str
):
    """The last tests of this engine: what one has after half an update is nothing to go on with."""
    model = tiny.vllm_model()
    weights = LMWeights(CausalLM.verified(model))
    kept: Any = Kept(engine, takes_adapters=False)
    async with VLLMSampler([kept], Model(tmp_path, LETTERS, "float32"), temperature=1.0, slots=64) as sampler:
        await sampler.update_weights(weights, 0)
        change(model)
        monkeypatch.setattr(by_file.Trainer, "fault", fault)
        with pytest.raises(ProtegeError, match=says) as caught:
            await sampler.update_weights(weights, 1)
    assert not isinstance(caught.value, SamplerError), "no episode is dropped for it: the run ends"
