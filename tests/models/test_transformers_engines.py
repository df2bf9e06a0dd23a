"""The in-process engines: the suites that every engine must pass, and what is theirs alone."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import anyio
import conformance
import numpy as np
import pytest
import tiny
import torch
from conformance import HANG_S, SamplerEngine, ScorerEngine, params, sample_all
from peft import LoraConfig, get_peft_model

from errors import ModelError, SamplerError, TeacherError
from models import generation
from models.attention import Extend
from models.causal_lm import CausalLM
from models.generation import PaddedStepper
from models.transformers_sampler import TransformersSampler, draw
from models.transformers_scorer import TransformersScorer
from models.types import Signal, SignalKind, TeacherTopK, TeacherView
from models.weights import LMWeights

LETTERS = tiny.letters()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def sampler_engine(architecture: str, slots: int = 4) -> SamplerEngine:
    model = tiny.model(architecture)
    lm = CausalLM.verified(model)

    def change_weights() -> None:
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(p.roll(1, 0) if p.dim() == 2 else p)

    return SamplerEngine(
        make=lambda: TransformersSampler(lm, LETTERS, slots=slots),
        tokenizer=LETTERS,
        vocab_size=tiny.VOCAB,
        reference=lambda prompt, answer, temperature: tiny.plain_logprobs(model, prompt, answer, temperature),
        change_weights=change_weights,
        source=LMWeights(lm),
    )


class TestSlotSampler(conformance.SamplerSuite):
    @pytest.fixture
    def engine(self) -> SamplerEngine:
        return sampler_engine("mistral")


class TestTwoSlotSampler(conformance.SamplerSuite):
    """Slots are scarce, and freed and reused all the time."""

    @pytest.fixture
    def engine(self) -> SamplerEngine:
        return sampler_engine("llama", slots=2)


class TestPaddedSampler(conformance.SamplerSuite):
    @pytest.fixture
    def engine(self) -> SamplerEngine:
        return sampler_engine("gemma2")


class TestScorer(conformance.ScorerSuite):
    @pytest.fixture(params=["llama", "mistral", "gemma2"])
    def engine(self, request: pytest.FixtureRequest) -> ScorerEngine:
        model = tiny.model(request.param)
        lm = CausalLM.verified(model)
        return ScorerEngine(
            # a budget below the longest view, and several packs
            make=lambda temperature: TransformersScorer("t", lm, temperature=temperature, token_budget=24),
            vocab_size=tiny.VOCAB,
            reference=lambda prompt, answer, temperature: tiny.plain_logprobs(model, prompt, answer, temperature),
            distribution=lambda ids, temperature: tiny.plain_distribution(model, ids, temperature),
        )


# --- sampler


@pytest.mark.anyio
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
async def test_greedy_equals_generate(architecture: str):
    eager, model = tiny.model(architecture, attn="eager"), tiny.model(architecture)
    prompts = tiny.prompts(5)
    async with TransformersSampler(CausalLM.verified(model), LETTERS, slots=3) as sampler:
        answers = await sample_all(sampler, [(p, params(12, temperature=0.0)) for p in prompts])
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.token_ids == tiny.greedy(eager, prompt, 12)
        expected = tiny.plain_logprobs(eager, prompt, answer.token_ids)
        torch.testing.assert_close(torch.tensor(answer.logprobs), expected, atol=1e-3, rtol=0)


def spy_on_reading(lm: CausalLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of tokens of every prefill forward, as they happen."""
    read: list[int] = []
    flat = lm.flat

    def counted(ids: Any, positions: Any, layout: Any) -> Any:
        if isinstance(layout, Extend):
            read.append(len(ids))
        return flat(ids, positions, layout)

    monkeypatch.setattr(lm, "flat", counted)
    return read


@pytest.mark.anyio
async def test_identical_prompts_are_read_once(monkeypatch: pytest.MonkeyPatch):
    lm = CausalLM.verified(tiny.model())
    read = spy_on_reading(lm, monkeypatch)
    async with TransformersSampler(lm, LETTERS, slots=8) as sampler:
        await sample_all(sampler, [(p, params(3, seed=s)) for s, p in enumerate([[1, 2, 3, 4]] * 5 + [[5, 6]] * 3)])
    assert read == [6]


@pytest.mark.anyio
async def test_a_next_turn_reads_only_what_is_new(monkeypatch: pytest.MonkeyPatch):
    model = tiny.model()
    lm = CausalLM.verified(model)
    read = spy_on_reading(lm, monkeypatch)
    async with TransformersSampler(lm, LETTERS, slots=4) as sampler:
        firsts = [list(range(1, 11)), list(range(21, 26)), list(range(31, 38))]
        answers = await sample_all(sampler, [(p, params(6 + i, seed=i)) for i, p in enumerate(firsts)])
        read.clear()
        nexts = [[*p, *a.token_ids, 7, 8, 9] for p, a in zip(firsts, answers, strict=True)]
        reused = await sample_all(sampler, [(p, params(6, seed=9)) for p in nexts[::-1]])
        assert read == [3 * (1 + 3)]  # per sequence the last sampled token, never fed, and three new ones
        read.clear()
        await sampler.update_weights(LMWeights(lm), 1)
        third = [*nexts[0], *reused[-1].token_ids, 4]
        await sampler.sample(third, params(2))
        assert read == [len(third)]
    async with TransformersSampler(lm, LETTERS, slots=4) as sampler:
        fresh = await sample_all(sampler, [(p, params(6, seed=9)) for p in nexts[::-1]])
    for a, b in zip(reused, fresh, strict=True):
        assert a.token_ids == b.token_ids
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-4, rtol=0)


@pytest.mark.anyio
async def test_long_prefills_are_split(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(generation, "PREFILL_TOKENS", 10)
    engine = sampler_engine("mistral", slots=8)
    prompts = engine.prompts(8, longest=25)
    async with engine.make() as sampler:
        answers = await sample_all(sampler, [(p, params(4, seed=i)) for i, p in enumerate(prompts)])
    for prompt, answer in zip(prompts, answers, strict=True):
        engine.assert_true_logprobs(prompt, answer, 1.0)


@pytest.mark.anyio
async def test_a_failing_engine_fails_its_batch_and_goes_on(monkeypatch: pytest.MonkeyPatch):
    engine = sampler_engine("llama", slots=2)
    failures = iter([False, False, True])
    sampler = engine.make()
    lm = sampler._lm  # type: ignore[attr-defined]
    flat = lm.flat

    def failing(*args: Any) -> Any:
        if next(failures, False):
            raise RuntimeError("out of memory")
        return flat(*args)

    monkeypatch.setattr(lm, "flat", failing)
    outcomes: dict[int, object] = {}
    prompts = engine.prompts(5)

    async def one(i: int) -> None:
        try:
            outcomes[i] = await sampler.sample(prompts[i], params(9, seed=i))
        except SamplerError as error:
            outcomes[i] = str(error)

    with anyio.fail_after(HANG_S):
        async with sampler, anyio.create_task_group() as tasks:
            for i in range(5):
                tasks.start_soon(one, i)
    for i in (0, 1):  # in the batch that failed
        assert "out of memory" in str(outcomes[i])
    for i in (2, 3, 4):  # waiting for a slot
        engine.assert_true_logprobs(prompts[i], outcomes[i], 1.0)  # type: ignore[arg-type]


@pytest.mark.anyio
async def test_requests_that_come_and_go_all_the_time_are_all_answered():
    engine = sampler_engine("llama", slots=3)
    prompts = engine.prompts(60)
    random = torch.Generator().manual_seed(1)
    delays = (torch.rand(60, 2, generator=random) * 0.1).tolist()
    answers = {}

    async def one(i: int) -> None:
        await anyio.sleep(delays[i][0])
        if i % 3 == 0:
            with anyio.move_on_after(delays[i][1]):
                await sampler.sample(prompts[i], params(100_000))
            return
        answers[i] = await sampler.sample(prompts[i], params(1 + i % 12, seed=i))

    with anyio.fail_after(HANG_S):
        async with engine.make() as sampler, anyio.create_task_group() as tasks:
            for i in range(60):
                tasks.start_soon(one, i)
    assert sorted(answers) == [i for i in range(60) if i % 3]
    for i, answer in answers.items():
        engine.assert_true_logprobs(prompts[i], answer, 1.0)


@pytest.mark.anyio
async def test_weights_cannot_change_under_a_running_request():
    engine = sampler_engine("llama")
    async with engine.make() as sampler, anyio.create_task_group() as tasks:
        tasks.start_soon(sampler.sample, [1, 2], params(100_000))
        await anyio.sleep(0.02)
        with pytest.raises(SamplerError, match="running"):
            await sampler.update_weights(engine.source, 1)
        tasks.cancel_scope.cancel()


def test_nothing_outlives_the_engine():
    engine = sampler_engine("llama", slots=2)
    threads = set(threading.enumerate())
    left = []

    async def main() -> None:
        before = asyncio.all_tasks()
        with anyio.move_on_after(0.05):
            async with engine.make() as sampler:
                await sample_all(sampler, [([1, 2], params(100_000)) for _ in range(5)])
        left.extend(asyncio.all_tasks() - before)

    anyio.run(main)
    assert left == []
    for thread in set(threading.enumerate()) - threads:
        thread.join(HANG_S)  # anyio's idle workers end with their loop
        assert not thread.is_alive()


@pytest.mark.anyio
async def test_an_exception_inside_the_context_is_the_users_own():
    with pytest.raises(ZeroDivisionError):
        async with sampler_engine("llama").make():
            raise ZeroDivisionError


def test_a_state_that_padding_spoils_is_found_at_start(monkeypatch: pytest.MonkeyPatch):
    lm = CausalLM.verified(tiny.model("mamba"))
    monkeypatch.setattr(lm.model.config, "model_type", "something_new")
    forward = lm.trunk.forward

    def without_mask(*args: Any, attention_mask: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    monkeypatch.setattr(lm.trunk, "forward", without_mask)
    with pytest.raises(ModelError, match="left-padded"):
        TransformersSampler(lm, LETTERS, slots=2)
    assert isinstance(generation.make_stepper(lm, 1), PaddedStepper)


# --- draw

N = 20_000


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_draws_follow_the_distribution(temperature: float):
    logits = torch.tensor([-float("inf"), 0.0, 1.0, -1.0, -float("inf"), 2.0, 0.5, -3.0, -float("inf")])
    uniforms = torch.rand(N, generator=torch.Generator().manual_seed(0))
    ids, logprobs = draw(logits.expand(N, -1), torch.full((N,), temperature), uniforms)
    probabilities = (logits / temperature).softmax(-1)
    counts = torch.bincount(ids, minlength=len(logits)).double()
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = probabilities[possible] * N
    chi2 = ((counts[possible] - expected) ** 2 / expected).sum().item()
    assert chi2 < 25.7  # 5 degrees of freedom: exceeded once in 10,000
    torch.testing.assert_close(logprobs, probabilities.log()[ids])


@pytest.mark.parametrize("uniform", [0.0, 2.0**-24, 0.5, 1 - 2.0**-24])
def test_extreme_uniforms_never_draw_the_impossible(uniform: float):
    for seed in range(200):
        logits = torch.randn(1, 500, generator=torch.Generator().manual_seed(seed)) * 3
        logits[:, :100] = logits[:, 400:] = -float("inf")
        ids, logprobs = draw(logits, torch.ones(1), torch.tensor([uniform]))
        assert 100 <= ids.item() < 400
        assert torch.isfinite(logprobs).all()


def test_a_greedy_draw_ignores_its_uniform():
    logits = torch.tensor([[0.0, 3.0, 1.0]] * 2)
    ids, logprobs = draw(logits, torch.tensor([0.0, 1.0]), torch.tensor([0.999, 0.0]))
    assert ids.tolist() == [1, 0]
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[[0, 1], [1, 0]])


# --- scorer


@pytest.mark.anyio
@pytest.mark.parametrize("temperature", [1.0, 1.5])
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
async def test_a_full_signal_is_the_whole_distribution(architecture: str, temperature: float):
    model = tiny.model(architecture)
    scorer = TransformersScorer("t", CausalLM.verified(model), temperature=temperature, token_budget=9)
    rng = np.random.default_rng(0)
    views = [
        TeacherView(rng.integers(1, tiny.VOCAB, size=n), np.arange(n // 2, n), np.arange(n // 2, n)) for n in (7, 12, 3)
    ]
    for view, signal in zip(views, await scorer.score(views, SignalKind.FULL), strict=True):
        assert signal.head is not None and signal.hidden is not None
        plain = tiny.plain_logits(model, view.token_ids.tolist())[view.positions - 1] / temperature
        got = signal.head(signal.hidden).log_softmax(-1)
        torch.testing.assert_close(got, plain.log_softmax(-1), atol=1e-4, rtol=0)


@pytest.mark.anyio
@pytest.mark.parametrize("temperature", [1.0, 1.5])
@pytest.mark.parametrize("swap", [None, (3, 9)])
async def test_a_top_k_signal_is_the_head_of_the_whole_distribution(temperature: float, swap: tuple[int, int] | None):
    model = tiny.model()
    scorer = TransformersScorer("t", CausalLM.verified(model), temperature=temperature, token_budget=9)
    rng = np.random.default_rng(0)
    views = [
        TeacherView(rng.integers(1, tiny.VOCAB, size=n), np.arange(n // 2, n), np.arange(n // 2, n), swap)
        for n in (7, 12, 3)
    ]
    sampled = await scorer.score(views, SignalKind.SAMPLED)
    seen = set()
    for view, signal, alone in zip(views, await scorer.score(views, TeacherTopK(4)), sampled, strict=True):
        plain = tiny.plain_logits(model, view.token_ids.tolist())[view.positions - 1] / temperature
        expected = plain.log_softmax(-1).topk(4)
        trade = {} if swap is None else {swap[0]: swap[1], swap[1]: swap[0]}
        assert signal.topk_ids is not None and signal.topk_logprobs is not None
        assert signal.topk_ids.tolist() == [[trade.get(i, i) for i in row] for row in expected.indices.tolist()]
        seen.update(expected.indices.flatten().tolist())
        torch.testing.assert_close(signal.topk_logprobs, expected.values, atol=1e-4, rtol=0)
        torch.testing.assert_close(signal.logprobs, alone.logprobs)
    assert len(seen) > 4  # the rows differ


@pytest.mark.anyio
async def test_top_k_of_a_smaller_vocabulary_is_all_of_it(monkeypatch: pytest.MonkeyPatch):
    scorer = TransformersScorer("t", CausalLM.verified(tiny.model()))
    view = TeacherView(np.arange(1, 20), np.arange(1, 19), np.arange(1, 19))
    (whole,) = await scorer.score([view], TeacherTopK(10 * tiny.VOCAB))
    assert whole.topk_logprobs is not None and whole.topk_ids is not None
    assert whole.topk_ids.shape == (18, tiny.VOCAB)
    torch.testing.assert_close(whole.topk_logprobs.exp().sum(-1), torch.ones(18))
    monkeypatch.setattr("models.transformers_scorer.HEAD_ELEMENTS", 5 * tiny.VOCAB)
    (chunked,) = await scorer.score([view], TeacherTopK(10 * tiny.VOCAB))
    torch.testing.assert_close(whole.topk_logprobs, chunked.topk_logprobs)


@pytest.mark.parametrize(
    ("ids", "logprobs"),
    [
        (None, [[-1.0]] * 2),
        ([[1]] * 2, None),
        ([[1]], [[-1.0]]),
        ([[1]] * 2, [[-1.0, -2.0]] * 2),
        ([[1]] * 2, [[-1.0], [float("nan")]]),
        ([[1]] * 2, [[-1.0], [0.5]]),
    ],
)
def test_a_broken_top_k_signal_is_refused(ids: list | None, logprobs: list | None):
    with pytest.raises(ValueError, match="top-k"):
        Signal(
            logprobs=torch.tensor([-1.0, -2.0]),
            topk_ids=None if ids is None else torch.tensor(ids),
            topk_logprobs=None if logprobs is None else torch.tensor(logprobs),
        )


@pytest.mark.anyio
async def test_a_small_head_chunk_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    scorer = TransformersScorer("t", CausalLM.verified(tiny.model()))
    view = TeacherView(np.arange(1, 20), np.arange(1, 19), np.arange(1, 19))
    (whole,) = await scorer.score([view], SignalKind.SAMPLED)
    monkeypatch.setattr("models.transformers_scorer.HEAD_ELEMENTS", 5 * tiny.VOCAB)
    (chunked,) = await scorer.score([view], SignalKind.SAMPLED)
    torch.testing.assert_close(whole.logprobs, chunked.logprobs)


@pytest.mark.anyio
async def test_a_base_view_scores_without_the_adapter():
    base = tiny.model()
    ids = np.arange(1, 20)
    view = TeacherView(ids, np.arange(5, 19), np.arange(5, 19))
    expected_base = tiny.plain_logprobs(base, ids[:5].tolist(), ids[5:].tolist())
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    expected_adapted = tiny.plain_logprobs(adapted, ids[:5].tolist(), ids[5:].tolist())
    assert (expected_base - expected_adapted).abs().max() > 0.1
    lm = CausalLM.verified(adapted)  # type: ignore[arg-type]
    student, teacher = TransformersScorer("s", lm), TransformersScorer("t", lm.with_adapter(None))
    for _ in range(2):  # one never leaves the other's switch behind
        for scorer, expected in ((teacher, expected_base), (student, expected_adapted)):
            (signal,) = await scorer.score([view], SignalKind.SAMPLED)
            torch.testing.assert_close(signal.logprobs, expected, atol=1e-4, rtol=0)
            (full,) = await scorer.score([view], SignalKind.FULL)
            assert full.head is not None and full.hidden is not None
            logprobs = full.head(full.hidden).log_softmax(-1)
            chosen = logprobs.gather(1, torch.from_numpy(ids[5:])[:, None])[:, 0]
            torch.testing.assert_close(chosen, expected, atol=1e-4, rtol=0)


@pytest.mark.anyio
async def test_a_teacher_that_is_not_finite_is_an_error():
    model = tiny.model()
    lm = CausalLM.verified(model)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    view = TeacherView(np.arange(1, 5), np.array([2]), np.array([2]))
    for need in (SignalKind.SAMPLED, SignalKind.FULL):
        with pytest.raises(TeacherError, match="not finite"):
            await TransformersScorer("t", lm).score([view], need)


@pytest.mark.anyio
async def test_a_view_longer_than_the_teacher_s_context_is_an_error():
    lm = CausalLM.verified(tiny.model())
    assert lm.context_length is not None
    fits, too_long = (
        TeacherView(np.ones(lm.context_length + more, dtype=np.int64), np.array([2]), np.array([2])) for more in (0, 1)
    )
    scorer = TransformersScorer("t", lm)
    assert len(await scorer.score([fits], SignalKind.SAMPLED)) == 1
    with pytest.raises(TeacherError, match=f"t reads {lm.context_length + 1} tokens .* its context is"):
        await scorer.score([fits, too_long], SignalKind.SAMPLED)
