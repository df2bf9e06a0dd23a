"""The conformance suite on a real vLLM: in this process and behind a URL, with whole weights and with adapters."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio
import conformance
import pytest
import tiny
import torch
import vllm_server
from conformance import SamplerEngine, params

from models.adapters import add_lora
from models.causal_lm import CausalLM
from models.vllm.handover import Model
from models.vllm.in_process import EngineOptions, InProcessEngine
from models.vllm.sampler import VLLMSampler
from models.vllm.server import ServerEngine
from models.weights import LMWeights

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.anyio]

LETTERS = tiny.letters()
RANK = 8


class Kept:
    """An engine that outlives the sampler: one start serves all tests of the module."""

    def __init__(self, engine: Any, *, takes_adapters: bool) -> None:
        self._engine, self.takes_adapters = engine, takes_adapters

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def close(self) -> None: ...


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny.vllm_folder(path, tiny.vllm_model(tie_word_embeddings=True))
    return path


@pytest.fixture(scope="module")
async def in_process(folder: Path) -> AsyncIterator[InProcessEngine]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in vllm_server.SMALL_CPU.items():
            patch.setitem(os.environ, name, value)
        engine = InProcessEngine(
            EngineOptions("float32", max_num_seqs=16, max_model_len=512, enforce_eager=True, lora_rank=RANK)
        )
        await engine.start(folder, "the fixture's")
    yield engine
    await engine.close()


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[vllm_server.Server]:
    log = tmp_path_factory.mktemp("log") / "log"
    flags = ["--enable-lora", "--max-lora-rank", str(RANK), "--max-loras", "2", *vllm_server.SAMPLER_FLAGS]
    with vllm_server.serve(folder, log, flags=flags, env=vllm_server.UPDATABLE) as server:
        yield server


async def sampler_engine(engine: Any, tmp_path: Path, *, lora: bool) -> SamplerEngine:
    """With the weights of a new model."""
    model = tiny.vllm_model(tie_word_embeddings=True)
    lm = CausalLM.verified(model)
    weights = LMWeights(lm)
    await engine.open()
    await weights_are(engine, weights, tmp_path / "first")
    if lora:
        lm.model = add_lora(model, RANK)  # type: ignore[assignment]

    def change_weights() -> None:
        with torch.no_grad():
            for name, p in lm.model.named_parameters():
                if lora and "lora_B" in name:
                    torch.nn.init.normal_(p, std=0.3)
                elif not lora:
                    p.copy_(p.roll(1, 0) if p.dim() == 2 else p)

    def make() -> VLLMSampler:
        kept = Kept(engine, takes_adapters=lora)
        return VLLMSampler([kept], Model(tmp_path, LETTERS, "float32"), temperature=1.0, slots=64)

    return SamplerEngine(
        make=make,
        tokenizer=LETTERS,
        vocab_size=tiny.VOCAB,
        reference=lambda prompt, answer, temperature: torch.tensor(
            weights.logprobs([*prompt, *answer], temperature)[len(prompt) - 1 :]
        ),
        change_weights=change_weights,
        source=weights,
        tolerance=1e-3,
        batch_invariant=False,
    )


async def weights_are(engine: Any, weights: LMWeights, folder: Path) -> None:
    weights.save(folder)
    await engine.reload(folder, "the test's")


class TestInProcess(conformance.SamplerSuite):
    @pytest.fixture
    async def engine(self, in_process: InProcessEngine, tmp_path: Path) -> SamplerEngine:
        return await sampler_engine(in_process, tmp_path, lora=False)


class TestInProcessAdapter(conformance.SamplerSuite):
    @pytest.fixture
    async def engine(self, in_process: InProcessEngine, tmp_path: Path) -> SamplerEngine:
        return await sampler_engine(in_process, tmp_path, lora=True)


class TestServer(conformance.SamplerSuite):
    @pytest.fixture
    async def engine(self, server: vllm_server.Server, tmp_path: Path) -> SamplerEngine:
        return await sampler_engine(ServerEngine(server.url, repacks=True), tmp_path, lora=False)


class TestServerAdapter(conformance.SamplerSuite):
    @pytest.fixture
    async def engine(self, server: vllm_server.Server, tmp_path: Path) -> SamplerEngine:
        return await sampler_engine(ServerEngine(server.url), tmp_path, lora=True)


async def test_requests_in_flight_are_paused_and_go_on_with_the_new_weights(
    in_process: InProcessEngine, tmp_path: Path
):
    engine = await sampler_engine(in_process, tmp_path, lora=False)
    long: list[Any] = []
    async with engine.make() as sampler, anyio.create_task_group() as tasks:

        async def ask() -> None:
            long.append(await sampler.sample([1, 2, 3], params(450)))

        await sampler.update_weights(engine.source, 0)
        tasks.start_soon(ask)
        await sampler.sample([4, 5], params(20))  # the long one has begun by then
        of_old = LMWeights(CausalLM(tiny.vllm_model(tie_word_embeddings=True)))
        engine.change_weights()
        await sampler.update_weights(engine.source, 1)
    (answer,) = long
    assert (len(answer.token_ids), answer.weight_version) == (450, 0)
    log = [1, 2, 3, *answer.token_ids]
    old, new = (torch.tensor(weights.logprobs(log, 1.0)[2:]) for weights in (of_old, engine.source))
    got = torch.tensor(answer.logprobs)
    torch.testing.assert_close(got[:10], old[:10], atol=1e-3, rtol=0)
    torch.testing.assert_close(got[-10:], new[-10:], atol=1e-3, rtol=0)
    assert (got - new)[:10].abs().max() > 0.1
