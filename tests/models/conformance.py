"""What every `Sampler` and every `Scorer` must do, whatever engine is behind it.

A test module subclasses a suite and gives it an `engine` fixture; the tests come along.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import anyio
import numpy as np
import pytest
import torch
from torch import Tensor

from envs.types import Sampled, SamplingParams, StopCondition
from errors import SamplerError, TeacherError
from models.types import Sampler, Scorer, SignalKind, TeacherTopK, TeacherView, WeightSource

Reference = Callable[[Sequence[int], Sequence[int], float], Tensor]
"""(prompt, answer, temperature) -> logprobs of the answer's ids, by a plain transformers forward."""

Distribution = Callable[[Sequence[int], float], Tensor]
"""(ids, temperature) -> [T - 1, v] logprobs of every id at the positions 1 … T-1, by a plain forward."""

HANG_S = 60.0  # longer than this is a hang


def params(max_tokens: int, *, temperature: float = 1.0, seed: int = 0, stop: Sequence[Any] = ()) -> SamplingParams:
    """`stop` holds ids and strings."""
    ids = frozenset(s for s in stop if isinstance(s, int))
    strings = tuple(s for s in stop if isinstance(s, str))
    return SamplingParams(max_tokens, StopCondition(ids, strings), temperature, seed)


async def sample_all(sampler: Sampler, requests: Sequence[tuple[list[int], SamplingParams]]) -> list[Sampled]:
    """All at once, answers in order."""
    answers: dict[int, Sampled] = {}

    async def one(i: int, prompt: list[int], how: SamplingParams) -> None:
        answers[i] = await sampler.sample(prompt, how)

    with anyio.fail_after(HANG_S):
        async with anyio.create_task_group() as tasks:
            for i, (prompt, how) in enumerate(requests):
                tasks.start_soon(one, i, prompt, how)
    return [answers[i] for i in range(len(requests))]


@dataclass
class SamplerEngine:
    """One engine under test, and the truth to compare it with."""

    make: Callable[[], Sampler]  # a new engine on the current weights, not entered
    tokenizer: Any
    vocab_size: int
    reference: Reference  # under the current weights
    change_weights: Callable[[], None]  # of `source` and reference, before `update_weights` is called
    source: WeightSource
    tolerance: float = 1e-4  # nats
    batch_invariant: bool = True  # neighbours never change a sample, not even by rounding

    def prompts(self, count: int, *, shortest: int = 1, longest: int = 12, seed: int = 0) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
        return [torch.randint(1, self.vocab_size, (n,), generator=generator).tolist() for n in lengths]

    def assert_true_logprobs(self, prompt: Sequence[int], sampled: Sampled, temperature: float) -> None:
        expected = self.reference(prompt, sampled.token_ids, temperature or 1.0)
        torch.testing.assert_close(torch.tensor(sampled.logprobs), expected, atol=self.tolerance, rtol=0)


@pytest.mark.anyio
class SamplerSuite:
    @pytest.fixture
    def engine(self) -> SamplerEngine:
        raise NotImplementedError

    @pytest.fixture(scope="module")  # an engine may be shared by a module's tests
    def anyio_backend(self) -> str:
        return "asyncio"

    @pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 1.5])
    async def test_logprobs_are_those_of_a_plain_forward(self, engine: SamplerEngine, temperature: float):
        prompts = engine.prompts(6)
        requests = [(p, params(10, temperature=temperature, seed=i)) for i, p in enumerate(prompts)]
        async with engine.make() as sampler:
            answers = await sample_all(sampler, requests)
        for prompt, answer in zip(prompts, answers, strict=True):
            assert len(answer.token_ids) == 10
            engine.assert_true_logprobs(prompt, answer, temperature)

    async def test_neighbours_may_have_other_temperatures(self, engine: SamplerEngine):
        prompts, temperatures = engine.prompts(4), [0.0, 0.7, 1.0, 1.5]
        requests = [(p, params(10, temperature=t)) for p, t in zip(prompts, temperatures, strict=True)]
        async with engine.make() as sampler:
            answers = await sample_all(sampler, requests)
        for prompt, answer, temperature in zip(prompts, answers, temperatures, strict=True):
            engine.assert_true_logprobs(prompt, answer, temperature)

    async def test_greedy_takes_the_likeliest(self, engine: SamplerEngine):
        (prompt,) = engine.prompts(1, shortest=5)
        async with engine.make() as sampler:
            answer = await sampler.sample(prompt, params(8, temperature=0.0))
        for i in (0, 5):
            token, before = answer.token_ids[i], [*prompt, *answer.token_ids[:i]]
            of_each = [engine.reference(before, [other], 1.0).item() for other in range(engine.vocab_size)]
            assert int(np.argmax(of_each)) == token

    async def test_max_tokens_cuts(self, engine: SamplerEngine):
        async with engine.make() as sampler:
            for n in (1, 7):
                answer = await sampler.sample([1, 2, 3], params(n))
                assert (len(answer.token_ids), answer.stopped) == (n, False)

    async def test_a_stop_id_ends_the_turn_and_is_part_of_it(self, engine: SamplerEngine):
        (prompt,) = engine.prompts(1, shortest=5)
        async with engine.make() as sampler:
            free = await sampler.sample(prompt, params(12, seed=3))
            stop = free.token_ids[5]
            first = free.token_ids.index(stop)
            answer = await sampler.sample(prompt, params(12, seed=3, stop=[stop]))
            last = await sampler.sample(prompt, params(first + 1, seed=3, stop=[stop]))
        assert answer.token_ids == free.token_ids[: first + 1]
        assert answer.stopped
        assert last.stopped, "a stop id in the last place allowed still stopped the turn"
        engine.assert_true_logprobs(prompt, answer, 1.0)

    async def test_a_stop_string_may_span_tokens(self, engine: SamplerEngine):
        (prompt,) = engine.prompts(1, shortest=5)
        async with engine.make() as sampler:
            free = await sampler.sample(prompt, params(12, seed=4))
            string = engine.tokenizer.decode(free.token_ids[4:7])
            answer = await sampler.sample(prompt, params(12, seed=4, stop=["never seen", string]))
        ends = [i for i in range(1, 13) if string in engine.tokenizer.decode(free.token_ids[:i])]
        assert answer.token_ids == free.token_ids[: ends[0]]
        assert answer.stopped

    async def test_a_seed_means_the_same_sample_whatever_the_neighbours(self, engine: SamplerEngine):
        if not engine.batch_invariant:
            pytest.skip("this engine's rounding depends on the batch")
        prompts = engine.prompts(12)
        requests = [(p, params(1 + i % 9, seed=i)) for i, p in enumerate(prompts)]
        async with engine.make() as sampler:
            alone = [await sampler.sample(p, how) for p, how in requests]
        async with engine.make() as sampler:
            together = await sample_all(sampler, requests)
        async with engine.make() as sampler:
            backwards = (await sample_all(sampler, requests[::-1]))[::-1]
        assert [a.token_ids for a in alone] == [a.token_ids for a in together]
        assert [a.token_ids for a in alone] == [a.token_ids for a in backwards]

    async def test_other_seeds_give_other_samples(self, engine: SamplerEngine):
        async with engine.make() as sampler:
            answers = await sample_all(sampler, [([1, 2, 3], params(8, seed=s)) for s in range(8)])
        assert len({tuple(a.token_ids) for a in answers}) == 8

    async def test_fifty_requests_of_unlike_lengths(self, engine: SamplerEngine):
        prompts = engine.prompts(50, longest=40)
        requests = [(p, params(1 + (7 * i) % 23, seed=i)) for i, p in enumerate(prompts)]
        async with engine.make() as sampler:
            answers = await sample_all(sampler, requests)
        for (prompt, how), answer in zip(requests, answers, strict=True):
            assert len(answer.token_ids) == how.max_tokens
            engine.assert_true_logprobs(prompt, answer, 1.0)

    async def test_identical_prompts_at_once(self, engine: SamplerEngine):
        (prompt,) = engine.prompts(1, shortest=9)
        requests = [(prompt, params(9, seed=s)) for s in range(3)] + [([*prompt, 5], params(9, seed=9))]
        async with engine.make() as sampler:
            answers = await sample_all(sampler, requests)
        for (asked, _), answer in zip(requests, answers, strict=True):
            engine.assert_true_logprobs(asked, answer, 1.0)
        assert len({tuple(a.token_ids) for a in answers[:3]}) == 3

    async def test_later_turns_continue_earlier_ones(self, engine: SamplerEngine):
        logs = engine.prompts(6, shortest=3)
        async with engine.make() as sampler:
            for turn in range(3):
                asked = [list(log) for log in logs]
                answers = await sample_all(sampler, [(p, params(5, seed=turn)) for p in asked])
                for i, answer in enumerate(answers):
                    engine.assert_true_logprobs(asked[i], answer, 1.0)
                    logs[i] += [*answer.token_ids, 7, 8, 9][: len(answer.token_ids) + 1 + i % 3]

    async def test_new_weights_are_really_used(self, engine: SamplerEngine):
        (prompt,) = engine.prompts(1, shortest=6)
        async with engine.make() as sampler:
            before = await sampler.sample(prompt, params(6))
            stale = engine.reference(prompt, before.token_ids, 1.0)
            engine.change_weights()
            fresh = engine.reference(prompt, before.token_ids, 1.0)
            assert (stale - fresh).abs().max() > 0.1, "the test's new weights must differ from the old"
            await sampler.update_weights(engine.source, 3)
            longer = [*prompt, *before.token_ids, 2]  # what the old weights have read must not be reused
            continued = await sampler.sample(longer, params(6))
            again = await sampler.sample(prompt, params(6))
        assert (before.weight_version, again.weight_version, continued.weight_version) == (0, 3, 3)
        engine.assert_true_logprobs(prompt, again, 1.0)
        engine.assert_true_logprobs(longer, continued, 1.0)

    async def test_a_cancelled_request_leaves_the_others_alone(self, engine: SamplerEngine):
        prompts = engine.prompts(6)
        others = [(p, params(20, seed=i)) for i, p in enumerate(prompts)]
        async with engine.make() as sampler:
            expected = await sample_all(sampler, others)
        cancelled = []

        async def abandoned(sampler: Sampler, after_s: float) -> None:
            with anyio.move_on_after(after_s) as scope:
                await sampler.sample([1, 2, 3], params(100_000))
            cancelled.append(scope.cancelled_caught)

        async with engine.make() as sampler, anyio.create_task_group() as tasks:
            tasks.start_soon(abandoned, sampler, 0.0)
            tasks.start_soon(abandoned, sampler, 0.01)
            tasks.start_soon(abandoned, sampler, 0.03)
            got = await sample_all(sampler, others)
        assert cancelled == [True] * 3
        for (prompt, _), answer, reference in zip(others, got, expected, strict=True):
            engine.assert_true_logprobs(prompt, answer, 1.0)
            if engine.batch_invariant:
                assert answer.token_ids == reference.token_ids

    async def test_cancelled_requests_free_their_slots(self, engine: SamplerEngine):
        async with engine.make() as sampler:
            with anyio.move_on_after(0.05):
                await sample_all(sampler, [([1, 2], params(100_000)) for _ in range(8)])
            with anyio.fail_after(HANG_S):
                answer = await sampler.sample([1, 2, 3], params(4))
        assert len(answer.token_ids) == 4

    async def test_weights_may_change_right_after_a_cancellation(self, engine: SamplerEngine):
        async with engine.make() as sampler:
            with anyio.move_on_after(0.03):
                await sampler.sample([1, 2], params(100_000))
            with anyio.fail_after(HANG_S):
                await sampler.update_weights(engine.source, 1)
                answer = await sampler.sample([1, 2, 3], params(4))
        assert answer.weight_version == 1
        engine.assert_true_logprobs([1, 2, 3], answer, 1.0)

    async def test_it_answers_only_while_it_runs(self, engine: SamplerEngine):
        sampler = engine.make()
        with pytest.raises(SamplerError):
            await sampler.sample([1, 2], params(2))
        async with sampler:
            await sampler.sample([1, 2], params(2))
        with pytest.raises(SamplerError):
            await sampler.sample([1, 2], params(2))

    async def test_closing_answers_the_requests_in_flight_with_an_error(self, engine: SamplerEngine):
        failed = []

        async def one(sampler: Sampler) -> None:
            try:
                await sampler.sample([1, 2], params(100_000))
            except SamplerError:
                failed.append(True)

        with anyio.fail_after(HANG_S):
            async with anyio.create_task_group() as tasks, engine.make() as sampler:
                for _ in range(6):
                    tasks.start_soon(one, sampler)
                await anyio.sleep(0.03)
        assert failed == [True] * 6

    async def test_nothing_to_do_is_an_error(self, engine: SamplerEngine):
        async with engine.make() as sampler:
            with pytest.raises(SamplerError):
                await sampler.sample([], params(2))
            with pytest.raises(SamplerError):
                await sampler.sample([1], params(0))


@dataclass
class ScorerEngine:
    """One engine under test, and the truth to compare it with."""

    make: Callable[[float], Scorer]  # temperature -> engine
    vocab_size: int
    reference: Reference
    tolerance: float = 1e-4
    distribution: Distribution | None = None  # None: an engine that gives the sampled tokens' logprobs alone
    gives_full: bool = True  # kind FULL too, where there is a distribution to compare with

    def views(self, count: int, *, longest: int = 30, seed: int = 0) -> list[TeacherView]:
        """Views of unlike lengths; about half of the positions are asked for."""
        generator = np.random.default_rng(seed)
        made = []
        for _ in range(count):
            ids = generator.integers(1, self.vocab_size, size=generator.integers(3, longest))
            chosen = np.flatnonzero(generator.random(len(ids) - 1) < 0.5) + 1
            made.append(TeacherView(ids, chosen, chosen))
        return made

    def expected(self, view: TeacherView, temperature: float = 1.0) -> Tensor:
        of_all = self.reference(view.token_ids[:1].tolist(), view.token_ids[1:].tolist(), temperature)
        return of_all[torch.from_numpy(view.positions) - 1]

    def rows(self, view: TeacherView, temperature: float) -> Tensor:
        """[n, v] logprobs at the view's positions."""
        if self.distribution is None:
            pytest.skip("this engine gives the sampled tokens' logprobs alone")
        return self.distribution(view.token_ids.tolist(), temperature)[torch.from_numpy(view.positions) - 1]


@pytest.mark.anyio
class ScorerSuite:
    @pytest.fixture
    def engine(self) -> ScorerEngine:
        raise NotImplementedError

    @pytest.fixture(scope="module")  # an engine may be shared by a module's tests
    def anyio_backend(self) -> str:
        return "asyncio"

    @pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
    async def test_logprobs_are_those_of_a_plain_forward_in_order(self, engine: ScorerEngine, temperature: float):
        views = engine.views(12)
        scorer = engine.make(temperature)
        assert scorer.temperature == temperature
        signals = await scorer.score(views, SignalKind.SAMPLED)
        for view, signal in zip(views, signals, strict=True):
            assert signal.logprobs is not None
            torch.testing.assert_close(
                signal.logprobs, engine.expected(view, temperature), atol=engine.tolerance, rtol=0
            )

    async def test_scoring_twice_agrees(self, engine: ScorerEngine):
        views = engine.views(5)
        scorer = engine.make(1.0)
        first = await scorer.score(views, SignalKind.SAMPLED)
        second = [(await scorer.score([view], SignalKind.SAMPLED))[0] for view in views]
        for a, b in zip(first, second, strict=True):
            torch.testing.assert_close(a.logprobs, b.logprobs, atol=engine.tolerance, rtol=0)

    async def test_concurrent_calls_do_not_mix(self, engine: ScorerEngine):
        views, answers = engine.views(8), {}
        scorer = engine.make(1.0)

        async def one(i: int) -> None:
            (answers[i],) = await scorer.score([views[i]], SignalKind.SAMPLED)

        with anyio.fail_after(HANG_S):
            async with anyio.create_task_group() as tasks:
                for i in range(len(views)):
                    tasks.start_soon(one, i)
        for i, view in enumerate(views):
            torch.testing.assert_close(answers[i].logprobs, engine.expected(view), atol=engine.tolerance, rtol=0)

    async def test_the_end_to_end_swap_is_handed_on(self, engine: ScorerEngine):
        view = TeacherView(np.array([1, 2, 3]), np.array([1, 2]), np.array([4, 5]), swap=(2, 3))
        (signal,) = await engine.make(1.0).score([view], SignalKind.SAMPLED)
        assert signal.swap == (2, 3)

    async def test_an_id_that_the_teacher_lacks_is_an_error(self, engine: ScorerEngine):
        view = TeacherView(np.array([1, 2, engine.vocab_size]), np.array([1]), np.array([1]))
        with pytest.raises(TeacherError, match=str(engine.vocab_size)):
            await engine.make(1.0).score([view], SignalKind.SAMPLED)

    @pytest.mark.parametrize("temperature", [0.7, 1.0])
    async def test_the_top_k_are_the_likeliest_of_the_whole_distribution(
        self, engine: ScorerEngine, temperature: float
    ):
        views = engine.views(6, seed=1)
        expected = [engine.rows(view, temperature) for view in views]
        signals = await engine.make(temperature).score(views, TeacherTopK(5))
        for view, signal, rows in zip(views, signals, expected, strict=True):
            assert signal.topk_ids is not None and signal.topk_logprobs is not None
            assert signal.topk_ids.shape == (len(view.positions), 5) and signal.topk_ids.dtype == torch.int64
            close = dict(atol=engine.tolerance, rtol=0)
            torch.testing.assert_close(signal.topk_logprobs, rows.topk(5).values, **close)
            torch.testing.assert_close(signal.topk_logprobs, rows.gather(1, signal.topk_ids), **close)
            torch.testing.assert_close(signal.logprobs, engine.expected(view, temperature), **close)

    async def test_top_k_ids_are_the_students(self, engine: ScorerEngine):
        view = TeacherView(np.array([1, 2, 3, 4]), np.array([1, 3]), np.array([1, 3]))
        likeliest = engine.rows(view, 1.0).topk(2).indices[0].tolist()
        swapped = TeacherView(view.token_ids, view.positions, view.student_positions, swap=tuple(likeliest))
        (plain,), (signal,) = [await engine.make(1.0).score([v], TeacherTopK(2)) for v in (view, swapped)]
        assert plain.topk_ids is not None and signal.topk_ids is not None
        assert signal.topk_ids[0].tolist() == plain.topk_ids[0].tolist()[::-1] == likeliest[::-1]

    @pytest.mark.parametrize("temperature", [0.7, 1.0])
    async def test_hidden_states_and_head_make_the_whole_distribution(self, engine: ScorerEngine, temperature: float):
        views = engine.views(6, seed=2)
        expected = [engine.rows(view, temperature) for view in views]
        if not engine.gives_full:
            pytest.skip("this engine gives no hidden states")
        scorer = engine.make(temperature)
        signals = [*await scorer.score(views[:4], SignalKind.FULL), *await scorer.score(views[4:], SignalKind.FULL)]
        for signal, rows in zip(signals, expected, strict=True):
            assert signal.head is not None and signal.hidden is not None
            logprobs = signal.head(signal.hidden).log_softmax(-1)
            torch.testing.assert_close(logprobs, rows, atol=engine.tolerance, rtol=0)
        assert len({signal.head for signal in signals}) == 1, "the learner takes signals of one head together"

    async def test_an_id_that_the_teacher_lacks_takes_no_neighbour_with_it(self, engine: ScorerEngine):
        (good,) = engine.views(1, seed=3)
        bad = TeacherView(np.array([1, 2, engine.vocab_size]), np.array([1]), np.array([1]))
        scorer, failed, answers = engine.make(1.0), [], []

        async def one(view: TeacherView) -> None:
            try:
                answers.extend(await scorer.score([view], SignalKind.SAMPLED))
            except TeacherError:
                failed.append(view)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(one, bad)
            tasks.start_soon(one, good)
        assert failed == [bad] and len(answers) == 1
        torch.testing.assert_close(answers[0].logprobs, engine.expected(good), atol=engine.tolerance, rtol=0)
