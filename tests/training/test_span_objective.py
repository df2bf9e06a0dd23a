"""Reverse KL on spans of text: a teacher of another tokenizer has one number for several of the student's tokens."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from episodes import random_episode, sampled_item
from test_learner import VOCAB, assert_same, learner_gradients, make_model, plain_gradients, sampled_ids
from torch import Tensor

from models.causal_lm import CausalLM
from models.types import Signal, Spans
from training.learner import ItemMetrics, Learner
from training.loop import add_episode
from training.metrics import SumMetrics
from training.objectives import ReverseKL, TokenBatch, token_logprobs
from training.packing import TrainingItem

OPTIONS: list[dict[str, Any]] = [
    {}, {"coef": 0.3}, {"discount": 0.5}, {"discount": 1.0}, {"signal_policy": "sampler", "discount": 0.9},
    {"advantage_clip": 0.4, "discount": 0.5}, {"variant": "ppo"}, {"variant": "cispo", "discount": 0.5},
]  # fmt: skip


def advantages_of_spans(
    policy: Sequence[float], spans: Sequence[int], teacher: Sequence[float], **options: Any
) -> list[float]:
    """By the definition, token by token. `teacher` has one number per span."""
    coef, discount, clip = (
        options.get("coef", 1.0),
        options.get("discount", 0.0),
        options.get("advantage_clip", math.inf),
    )
    of_span = {}
    for span in set(spans) - {-1}:
        k = sum(p for p, s in zip(policy, spans, strict=True) if s == span) - teacher[span]
        of_span[span] = max(-clip, min(clip, -coef * k))
    starts = {span: spans.index(span) for span in of_span}
    return [
        of_span.get(span, 0.0)
        + sum(discount ** (at - i) * of_span[s] for s, at in starts.items() if at > i and discount)
        for i, span in enumerate(spans)
    ]


def random_spans(generator: np.random.Generator, count: int, unscored: int) -> list[int]:
    """Runs of one to three tokens; the last `unscored` tokens are in none."""
    spans: list[int] = []
    while len(spans) < count - unscored:
        spans += [spans[-1] + 1 if spans else 0] * int(generator.integers(1, 4))
    return spans[: count - unscored] + [-1] * min(unscored, count)


def make_items(model: Any, seed: int = 3) -> list[TrainingItem]:
    generator = np.random.default_rng(seed)
    items = []
    for k in range(6):
        episode = random_episode(generator, VOCAB, turns=1 + k % 3, longest_turn=6)
        spans = random_spans(generator, episode.num_sampled, unscored=k % 3)
        if max(spans) < 0:
            spans[0] = 0
        logprobs = torch.tensor(generator.uniform(-6.0, -0.5, max(spans) + 1), dtype=torch.float32)
        items.append(TrainingItem(episode, Signal(logprobs=logprobs, spans=torch.tensor(spans))))
    return items


def plain(options: dict[str, Any]) -> Any:
    def loss(logits: Tensor, item: TrainingItem) -> Tensor:
        assert item.signal is not None and item.signal.spans is not None and item.signal.logprobs is not None
        live = logits.log_softmax(-1).gather(1, sampled_ids(item.episode)[:, None])[:, 0]
        sampler = torch.from_numpy(item.episode.sampler_logprobs[item.episode.sampled]).to(live)
        policy = sampler if options.get("signal_policy") == "sampler" else live.detach()
        found = advantages_of_spans(
            policy.tolist(), item.signal.spans.tolist(), item.signal.logprobs.tolist(), **options
        )
        advantages = torch.tensor(found, dtype=live.dtype)
        ratio = (live - sampler).exp()
        if options.get("variant") == "cispo":
            return -ratio.detach().clamp(0, 4) * advantages * live
        if options.get("variant") == "ppo":
            return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        return -torch.clamp(ratio, max=5.0) * advantages

    return loss


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model(0)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradient_of_every_parameter_equals_the_plain_computation(model: Any, options: dict[str, Any]):
    items = make_items(model)
    ours, _ = learner_gradients(model, items, ReverseKL(**options), token_budget=40, head_elements=2 * VOCAB)
    assert_same(ours, plain_gradients(model, items, plain(options)))


@pytest.mark.parametrize("options", [{}, {"discount": 0.5}], ids=str)
def test_gradient_and_metrics_do_not_depend_on_how_the_work_is_cut(model: Any, options: dict[str, Any]):
    items = make_items(model)
    expected, metrics = learner_gradients(model, items, ReverseKL(**options), token_budget=10_000)
    for changed in ({"head_elements": 1}, {"token_budget": 1}, {"token_budget": 20, "head_elements": 3 * VOCAB}):
        ours, same = learner_gradients(model, items, ReverseKL(**options), **{"token_budget": 10_000, **changed})
        assert_same(ours, expected)
        for a, b in zip(same, metrics, strict=True):
            for name in b.values:
                np.testing.assert_allclose(a.values[name], b.values[name], atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_spans_of_one_token_are_no_spans_to_the_bit(model: Any, options: dict[str, Any]):
    generator = np.random.default_rng(4)
    episodes = [random_episode(generator, VOCAB, turns=2) for _ in range(3)]
    by_ids = [sampled_item(e, torch.from_numpy(generator.uniform(-5, -0.5, e.num_sampled))) for e in episodes]
    by_spans = [
        TrainingItem(item.episode, Signal(logprobs=item.signal.logprobs, spans=torch.arange(item.episode.num_sampled)))
        for item in by_ids
        if item.signal is not None
    ]
    expected, expected_metrics = learner_gradients(model, by_ids, ReverseKL(**options))
    ours, metrics = learner_gradients(model, by_spans, ReverseKL(**options))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    for a, b in zip(metrics, expected_metrics, strict=True):
        assert all(np.array_equal(a.values[name], b.values[name]) for name in b.values)
        assert a.values.keys() - b.values.keys() == {"unscored"} and not a.values["unscored"].any()


def test_episodes_of_both_kinds_may_share_a_pack(model: Any):
    items = make_items(model)
    generator = np.random.default_rng(5)
    episode = random_episode(generator, VOCAB, turns=2)
    by_ids = sampled_item(episode, torch.from_numpy(generator.uniform(-5, -0.5, episode.num_sampled)))
    assert by_ids.signal is not None
    own = TrainingItem(episode, Signal(logprobs=by_ids.signal.logprobs, spans=torch.arange(episode.num_sampled)))
    for objective in (ReverseKL(), ReverseKL(discount=0.5)):
        ours, _ = learner_gradients(model, [items[0], by_ids, items[1]], objective)
        expected, _ = learner_gradients(model, [items[0], own, items[1]], objective)
        assert_same(ours, expected)


@pytest.mark.parametrize("options", [{"advantage_clip": 0.4}, {"advantage_clip": 0.4, "discount": 0.5}], ids=str)
def test_what_is_measured_does_not_depend_on_who_shares_a_pack(model: Any, options: dict[str, Any]):
    generator = np.random.default_rng(6)
    episode = random_episode(generator, VOCAB, turns=2)
    by_ids = sampled_item(episode, torch.from_numpy(generator.uniform(-5, -0.5, episode.num_sampled)))
    items = [make_items(model)[2], by_ids]
    learner = Learner(CausalLM(model), token_budget=4096)
    together = learner.measure(items, ReverseKL(**options))
    for measured, item in zip(together, items, strict=True):
        (alone,) = learner.measure([item], ReverseKL(**options))
        assert measured.values.keys() == alone.values.keys()
        for name, values in alone.values.items():
            np.testing.assert_allclose(measured.values[name], values, atol=1e-6, err_msg=name)
        assert 0 < alone.values["advantage_clipped"].mean() < 1
    assert "unscored" in together[0].values and "unscored" not in together[1].values


def test_tokens_in_no_span_have_no_gradient_no_kl_and_are_counted():
    logits = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ids = torch.tensor([1, 2, 3, 4, 5])
    own = token_logprobs(logits, ids).detach()
    spans = torch.tensor([0, 0, 1, -1, -1])
    share = torch.tensor([-1.0, -1.0, -3.0, math.nan, math.nan], dtype=torch.float64)
    batch = TokenBatch(ids, own, share, spans=spans)
    advantages = ReverseKL().advantages(own, batch, [5]).values
    out = ReverseKL().loss(logits, TokenBatch(ids, own, share, advantages=advantages, spans=spans))
    out.loss.sum().backward()
    assert logits.grad is not None and logits.grad[:3].abs().sum(-1).min() > 0 and not logits.grad[3:].any()
    k = [own[0] + own[1] + 2, own[0] + own[1] + 2, own[2] + 3]
    torch.testing.assert_close(advantages, torch.tensor([*(-x for x in k), 0, 0], dtype=torch.float64))
    assert out.metrics["unscored"].tolist() == [0, 0, 0, 1, 1]
    assert torch.isnan(out.metrics["kl"]).tolist() == [False] * 3 + [True] * 2
    assert float(out.metrics["kl"][:3].sum()) == pytest.approx(float(own[:3].sum()) + 5)


def test_a_step_s_kl_is_over_the_tokens_that_were_scored(model: Any):
    item = make_items(model)[2]
    measured = ItemMetrics(3, {"kl": np.array([1.0, 3.0, math.nan]), "unscored": np.array([0.0, 0.0, 1.0])})
    sums = SumMetrics()
    add_episode(sums, item, measured)
    row = sums.as_dict()
    assert row["kl"] == 2.0 and row["unscored"] == pytest.approx(1 / 3)


def test_a_signal_that_does_not_fit_its_spans_is_an_error(model: Any):
    spans = Spans(np.array([0, 0, 1]), np.array([0, 1]), 2)
    assert torch.equal(
        Signal(logprobs=torch.tensor([-1.0, -2.0, -4.0])).of_spans(spans).logprobs, torch.tensor([-3.0, -4.0])
    )  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="each of the teacher's 3 tokens"):
        Signal(logprobs=torch.tensor([-1.0, -2.0])).of_spans(spans)
    item = make_items(model)[0]
    short = TrainingItem(item.episode, Signal(logprobs=torch.tensor([-1.0]), spans=torch.tensor([0])))
    assert item.episode.num_sampled > 1
    with pytest.raises(ValueError, match="not one logprob per sampled token"):
        learner_gradients(model, [short], ReverseKL())


# --- what the estimator estimates, by enumeration


def policy(logits: dict[tuple[int, ...], Tensor], text: tuple[int, ...]) -> list[Tensor]:
    return [logits[text[:i]].log_softmax(-1)[token] for i, token in enumerate(text)]


@pytest.mark.parametrize("discount", [0.0, 1.0])
def test_the_expected_gradient_is_that_of_the_kl_of_pairs(discount: float):
    """A student of single letters, four a text; a teacher of pairs. At gamma 1 it is the gradient of the KL of whole
    texts, at 0 that of each pair's KL at the states that the student visits."""
    generator = torch.Generator().manual_seed(1)
    prefixes = [p for n in range(4) for p in itertools.product((0, 1), repeat=n)]
    logits = {p: torch.randn(2, dtype=torch.float64, generator=generator).requires_grad_() for p in prefixes}
    first = torch.randn(2, 2, dtype=torch.float64, generator=generator).flatten().log_softmax(0).view(2, 2)
    second = torch.randn(4, 4, dtype=torch.float64, generator=generator).log_softmax(-1).view(2, 2, 2, 2)
    estimate, exact = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for text in itertools.product((0, 1), repeat=4):
        live = torch.stack(policy(logits, text))
        teacher = [float(first[text[:2]]), float(second[text])]
        probability = live.sum().exp()
        batch = TokenBatch(
            torch.zeros(4, dtype=torch.long), live.detach(),
            torch.tensor([teacher[0] / 2] * 2 + [teacher[1] / 2] * 2, dtype=torch.float64),
            spans=torch.tensor([0, 0, 1, 1]),
        )  # fmt: skip
        advantages = ReverseKL(discount=discount).advantages(live.detach(), batch, [4]).values
        estimate = estimate - probability.detach() * (advantages * live).sum()
        if discount:
            exact = exact + probability * (live.sum() - sum(teacher))
        else:
            exact = exact + live[:2].sum().exp() * (live[:2].sum() - teacher[0]) * live[2:].sum().exp().detach()
            exact = exact + live[:2].sum().exp().detach() * live[2:].sum().exp() * (live[2:].sum() - teacher[1])
    ours = torch.autograd.grad(estimate, list(logits.values()), retain_graph=True)
    expected = torch.autograd.grad(exact, list(logits.values()))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert max(float(b.abs().max()) for b in expected) > 0.1
