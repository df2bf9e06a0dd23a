"""A blend's signal against the mixture written out in probability space, id by id."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.blending import blended
from models.types import Signal, SignalKind, TeacherTopK

INF = math.inf


def rows(n: int, v: int, seed: int) -> Tensor:
    """Random distributions, float64."""
    weights = torch.rand(n, v, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3 + 1e-3
    return weights / weights.sum(-1, keepdim=True)


def top(p: Tensor, k: int, ids: Tensor) -> Signal:
    """What a teacher of these probabilities says of the tokens `ids`."""
    best = p.topk(k)
    return Signal(logprobs=of(p, ids).log().float(), topk_ids=best.indices, topk_logprobs=best.values.log().float())


def of(p: Tensor, ids: Tensor) -> Tensor:
    return p.gather(1, ids[:, None])[:, 0]


def mixed(tops: Sequence[dict[int, float]], weights: Sequence[float], renormalised: bool) -> dict[int, float]:
    """Union of ids, sum of weight times mass."""
    total: dict[int, float] = {}
    for mass, weight in zip(tops, weights, strict=True):
        whole = sum(mass.values()) if renormalised else 1.0
        for token, p in mass.items():
            total[token] = total.get(token, 0.0) + weight * p / whole
    return total


def test_two_teachers_top_two_by_hand():
    """T1's teacher, of which [103, 102] are [.625, .375], and another, of which [101, 103] are [2/3, 1/3]."""
    ids = torch.tensor([103])
    p = torch.zeros(2, 104, dtype=torch.float64)
    p[0, 101:], p[1, 101:] = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.6, 0.1, 0.3])
    said = {"a": top(p[:1], 2, ids), "b": top(p[1:], 2, ids)}
    shares = blended(said, (0.5, 0.5), TeacherTopK(2, renormalised=True))
    assert shares.topk_ids is not None and shares.topk_logprobs is not None and shares.logprobs is not None
    assert shares.topk_ids.tolist() == [[103, 101]]
    assert shares.topk_logprobs.softmax(-1)[0].tolist() == pytest.approx([0.479167 / 0.8125, 1 / 3 / 0.8125], abs=1e-6)
    whole = blended(said, (0.5, 0.5), TeacherTopK(2))
    assert whole.topk_ids is not None and whole.topk_logprobs is not None
    assert whole.topk_ids.tolist() == [[103, 101]]
    assert whole.topk_logprobs.exp()[0].tolist() == pytest.approx([0.4, 0.3])  # 102 and the rest: in the bucket
    assert whole.logprobs is not None and whole.logprobs.exp().tolist() == pytest.approx([0.4])


@settings(deadline=None)  # a busy machine is no error
@given(st.integers(1, 7), st.integers(0, 999), st.lists(st.floats(0.05, 1), min_size=2, max_size=4), st.booleans())
def test_top_k_of_a_blend_equals_the_sums_by_id(k, seed, raw, renormalised):
    n, v = 4, 7
    weights = [x / sum(raw) for x in raw]
    teachers = [rows(n, v, seed + i) for i in range(len(raw))]
    ids = torch.arange(n)
    said = {str(i): top(p, k, ids) for i, p in enumerate(teachers)}
    signal = blended(said, weights, TeacherTopK(k, renormalised=renormalised))
    assert signal.topk_ids is not None and signal.topk_logprobs is not None and signal.logprobs is not None
    for j in range(n):
        tops = [{int(i): float(p[j, i]) for i in p[j].topk(k).indices} for p in teachers]
        expected = mixed(tops, weights, renormalised)
        held = sum(w * sum(t.values()) for w, t in zip(weights, tops, strict=True)) if renormalised else 1.0
        got = dict(zip(signal.topk_ids[j].tolist(), signal.topk_logprobs[j].exp().tolist(), strict=True))
        assert got == pytest.approx({i: expected[i] * held for i in got}, rel=1e-5)
        best = sorted(expected.values(), reverse=True)[:k]  # by value: equal ones have no order
        assert list(got.values()) == pytest.approx([p * held for p in best], rel=1e-5)
    torch.testing.assert_close(
        signal.logprobs.exp().double(),
        sum(w * of(p, ids) for w, p in zip(weights, teachers, strict=True)),
        rtol=1e-5, atol=1e-7,
    )  # fmt: skip
    for i, p in enumerate(teachers):
        opinion = signal.opinions[str(i)]
        torch.testing.assert_close(opinion.logprobs, of(p, ids).log().float())
        torch.testing.assert_close(opinion.topk_mass, p.topk(k).values.sum(-1).float())


@pytest.mark.parametrize("renormalised", [True, False])
def test_equal_teachers_are_one_teacher_and_the_whole_vocabulary_is_the_mixture(renormalised):
    p, q, ids = rows(5, 9, 1), rows(5, 9, 2), torch.tensor([0, 3, 8, 2, 2])
    one = top(p, 4, ids)
    same = blended({"a": one, "b": one, "c": one}, (0.5, 0.3, 0.2), TeacherTopK(4, renormalised))
    assert one.topk_logprobs is not None and same.topk_ids is not None and same.topk_logprobs is not None
    assert torch.equal(same.topk_ids, one.topk_ids)  # type: ignore[arg-type]
    torch.testing.assert_close(same.topk_logprobs, one.topk_logprobs)
    torch.testing.assert_close(same.logprobs, one.logprobs)
    whole = blended({"a": top(p, 9, ids), "b": top(q, 9, ids)}, (0.7, 0.3), TeacherTopK(9, renormalised))
    assert whole.topk_ids is not None and whole.topk_logprobs is not None
    expected = (0.7 * p + 0.3 * q).log().float()
    torch.testing.assert_close(whole.topk_logprobs, expected.gather(1, whole.topk_ids))


def test_what_is_no_token_adds_nothing():
    """A teacher of a small vocabulary, one that has nothing to say at a position, and both at once."""
    a = Signal(
        logprobs=torch.tensor([-1.0, -1.0]),
        topk_ids=torch.tensor([[5, 0], [0, 0]]),
        topk_logprobs=torch.tensor([[math.log(0.6), -INF], [-INF, -INF]]),
    )
    b = Signal(
        logprobs=torch.tensor([-1.0, -1.0]),
        topk_ids=torch.tensor([[0, 5, 2], [0, 0, 0]]),
        topk_logprobs=torch.tensor([[math.log(0.5), math.log(0.3), -INF], [-INF, -INF, -INF]]),
    )
    for renormalised in (True, False):
        signal = blended({"a": a, "b": b}, (0.5, 0.5), TeacherTopK(3, renormalised))
        assert signal.topk_ids is not None and signal.topk_logprobs is not None
        mass = signal.topk_logprobs.exp()
        assert signal.topk_ids[0, :2].tolist() == [5, 0] and mass[0, 2] == 0 and mass[1].tolist() == [0, 0, 0]
        ratio = (0.5 * 1 + 0.5 * 0.375) / (0.5 * 0.625) if renormalised else 0.45 / 0.25
        assert (mass[0, 0] / mass[0, 1]).item() == pytest.approx(ratio)


def test_whole_distributions_are_mixed_by_each_teacher_s_own_head():
    """Teachers of unlike width and vocabulary, of which one ends its turns with another token."""
    torch.manual_seed(0)
    heads = [torch.nn.Linear(3, 6), torch.nn.Linear(5, 8)]
    states = [torch.randn(4, 3), torch.randn(4, 5)]
    said = {
        "narrow": Signal(hidden=states[0], head=heads[0], swap=(1, 4)),
        "wide": Signal(hidden=states[1], head=heads[1]),
    }
    signal = blended(said, (0.25, 0.75), SignalKind.FULL)
    assert signal.head is not None and signal.hidden is not None and signal.swap is None and not signal.opinions
    with torch.no_grad():
        p, q = (head(x).softmax(-1) for head, x in zip(heads, states, strict=True))
        expected = 0.75 * q
        expected[:, :6] += 0.25 * p[:, [0, 4, 2, 3, 1, 5]]
        torch.testing.assert_close(signal.head(signal.hidden).exp(), expected)
    again = blended(said, (0.25, 0.75), SignalKind.FULL)
    assert again.head == signal.head  # so that the learner sees that episodes share a head


def test_a_blend_needs_as_much_of_each_teacher():
    full = Signal(hidden=torch.zeros(2, 3), head=torch.nn.Linear(3, 4))
    sampled = Signal(logprobs=torch.tensor([-1.0, -2.0]))
    for need in (SignalKind.FULL, SignalKind.SAMPLED, TeacherTopK(2)):
        with pytest.raises(ValueError, match="less than the others"):
            blended({"a": full, "b": sampled}, (0.5, 0.5), need)
