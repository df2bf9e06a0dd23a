"""A teacher on a real `vllm serve` on CPUs: the numbers of its model, and a run's KL curve."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from errors import ConfigError, ProtegeError
from models.server_pool import Access, ServerPool
from models.types import TeacherTopK, TeacherView
from models.vllm import teacher_server as vllm
from models.vllm.scorer import VllmScorer
from recipes.embedded import char_tokenizer
from tests.models import tiny, vllm_server
from tests.models.conformance import ScorerEngine, ScorerSuite
from tests.recipes.tiny_models import EVALUATED, REVERSE_KL, evaluation_rows, make_model, run, training_rows

pytestmark = pytest.mark.vllm

VOCAB = len(char_tokenizer())
CLOSE = 1e-3  # nats of a KL: vLLM's float32 attention rounds otherwise than ours
TOP_K = {"objective": "topk_forward_kl", "top_k": 20}
LENGTH = {"max_model_len": 127}  # less than the models' own 128


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    model = tiny.vllm_model(vocab_size=VOCAB, max_position_embeddings=128)
    model.config.eos_token_id = char_tokenizer().eos_token_id
    return tiny.vllm_folder(tmp_path_factory.mktemp("teacher"), model, char_tokenizer())


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("student"), seed=1)


@pytest.fixture(scope="module")
def server(teacher: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[vllm_server.Server]:
    with vllm_server.serve(teacher, tmp_path_factory.mktemp("log") / "log", **LENGTH) as server:  # type: ignore[arg-type]
        yield server


def access(server: vllm_server.Server) -> Access:
    return Access((server.url,), timeout_s=120.0, patience_s=1.0)


class TestConformance(ScorerSuite):
    @pytest.fixture
    def engine(self, server: vllm_server.Server, teacher: str) -> ScorerEngine:
        model = AutoModelForCausalLM.from_pretrained(teacher, attn_implementation="eager").eval()

        def make(temperature: float) -> VllmScorer:
            pool = ServerPool(access(server))
            if temperature != 1.0:
                with pytest.raises(ConfigError, match=r"recipes\.serve_teacher"):
                    VllmScorer("T", teacher, pool, vocab_size=VOCAB, temperature=temperature)
                pytest.skip("a plain vLLM server scores at temperature 1 alone")
            return VllmScorer("T", teacher, pool, vocab_size=VOCAB)

        return ScorerEngine(
            make=make,
            vocab_size=VOCAB,
            reference=partial(tiny.plain_logprobs, model),
            distribution=lambda ids, temperature: (tiny.plain_logits(model, ids) / temperature).log_softmax(-1),
            gives_full=False,
        )


def test_the_real_server_is_described_probed_and_has_its_tokenizer_compared(server: vllm_server.Server, teacher: str):
    found = anyio.run(vllm.describe, access(server), None, "teacher.")
    assert found == vllm.VllmServer(teacher, teacher, 127)
    assert anyio.run(vllm.check_tokenizer, access(server), found, "T", char_tokenizer(), teacher) is None
    where = np.arange(1, 6)
    view = TeacherView(np.array([3, 4, 5, 6, 7, 8]), where, where)
    probe = partial(vllm.probe, vocab_size=VOCAB, option="teacher.")
    assert anyio.run(probe, access(server), found, "T", view, TeacherTopK(20)) <= 1e-5
    with pytest.raises(ConfigError, match=r"max allowed: 20.*--max-logprobs 21, or lower top_k=21"):
        anyio.run(probe, access(server), found, "T", view, TeacherTopK(21))


def test_a_prompt_in_the_prefix_cache_is_scored_anew(server: vllm_server.Server, teacher: str):
    ids = np.random.default_rng(0).integers(0, VOCAB, 100)  # several blocks of the cache
    where = np.arange(1, 100)
    scorer = VllmScorer("T", teacher, ServerPool(access(server)), vocab_size=VOCAB)
    first, second = [anyio.run(scorer.score, [TeacherView(ids, where, where)], TeacherTopK(3)) for _ in range(2)]
    model = AutoModelForCausalLM.from_pretrained(teacher, attn_implementation="eager").eval()
    expected = tiny.plain_logprobs(model, ids[:1].tolist(), ids[1:].tolist())
    for (signal,) in (first, second):
        assert signal.logprobs is not None and (signal.logprobs - expected).abs().max() < 1e-4


@pytest.mark.parametrize("objective", [REVERSE_KL, TOP_K])
def test_a_run_has_the_kl_curve_of_the_teacher_in_this_process(
    tmp_path: Path, student: str, teacher: str, server: vllm_server.Server, objective: dict[str, Any]
):
    options = {"max_steps": 4, **EVALUATED, **objective}
    local = run(tmp_path / "local", {"model_name": student, "teacher_model": teacher}, **options)
    remote = run(tmp_path / "remote", {"model_name": student}, **{"teacher.url": server.url, **options})
    for ours, theirs in zip(training_rows(local), training_rows(remote), strict=True):
        assert theirs["kl"] == pytest.approx(ours["kl"], abs=CLOSE)
        assert theirs["loss"] == pytest.approx(ours["loss"], abs=CLOSE)
    last, other = evaluation_rows(local)[-1], evaluation_rows(remote)[-1]
    assert other["eval/reverse_kl"] == pytest.approx(last["eval/reverse_kl"], abs=CLOSE)


def test_the_server_is_killed_in_mid_run_and_the_run_goes_on_at_another(
    tmp_path: Path, student: str, teacher: str, server: vllm_server.Server
):
    options = {"max_steps": 6, "save_every": 1, "eval_size": 0, "teacher.patience_s": 1.0, **REVERSE_KL}
    whole = run(
        tmp_path / "whole", {"model_name": student, "teacher_model": teacher}, **options_without_server(options)
    )
    with (
        vllm_server.serve(teacher, tmp_path / "log", **LENGTH) as first,  # type: ignore[arg-type]
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(ProtegeError, match="the run can be resumed"),
    ):
        _kill_after_scoring(patch, first, calls=3)
        run(tmp_path / "run", {"model_name": student}, **{"teacher.url": first.url, **options})
    done = training_rows(tmp_path / "run")
    assert 0 < len(done) < 6 and all(row["trained_episodes"] == 4 for row in done)
    run(tmp_path / "run", {"model_name": student}, **{"teacher.url": server.url, **options})
    for ours, theirs in zip(training_rows(whole), training_rows(tmp_path / "run"), strict=True):
        assert theirs["kl"] == pytest.approx(ours["kl"], abs=CLOSE)


def options_without_server(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if not name.startswith("teacher.")}


def _kill_after_scoring(patch: pytest.MonkeyPatch, server: vllm_server.Server, *, calls: int) -> None:
    """SIGKILL, once the run (not its checks) has had so many batches scored."""
    score, count = VllmScorer.score, [0]

    async def counted(self: VllmScorer, views: Any, need: Any) -> Any:
        if not isinstance(need, TeacherTopK):  # the checks ask for a top k
            count[0] += 1
            if count[0] > calls:
                server.kill()
                time.sleep(0.2)
        return await score(self, views, need)

    patch.setattr(VllmScorer, "score", counted)
