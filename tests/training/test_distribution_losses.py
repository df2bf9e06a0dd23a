"""Supports, tails and top-k losses against the reference values of the design and against `references`."""

from __future__ import annotations

import math

import pytest
import references
import torch
from hypothesis import given
from hypothesis import strategies as st
from references import finite_differences

from errors import ConfigError
from models.types import SignalKind, TeacherTopK
from training.distribution_losses import JSD, Support, Tail, TopKForwardKL, divergence, outcomes
from training.objectives import TokenBatch

N, V = 6, 9
INF = math.inf


def doubles(*shape: int, seed: int, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def batch_of(teacher_logits: torch.Tensor, ids: torch.Tensor | None = None, k: int = 4) -> TokenBatch:
    """Everything that any objective needs of this teacher."""
    n, v = teacher_logits.shape
    ids = torch.arange(n) % v if ids is None else ids
    logprobs = torch.log(references.probabilities(teacher_logits))
    top = logprobs.topk(k)
    return TokenBatch(
        ids=ids,
        sampler_logprobs=torch.full((n,), -1.0, dtype=torch.float64),
        teacher_logprobs=references.of_ids(logprobs, ids),
        teacher_logits=teacher_logits,
        topk_ids=top.indices,
        topk_logprobs=top.values,
    )


def loss_of(objective: JSD | TopKForwardKL, student: list[float], teacher: list[float], token: int = 0) -> float:
    """Of one token, from two lists of probabilities."""
    s, t = (torch.tensor([x], dtype=torch.float64).log() for x in (student, teacher))
    k = objective.top_k or 1
    return objective.loss(s, batch_of(t, torch.tensor([token]), k)).loss.item()


# --- values worked out by hand


@pytest.mark.parametrize(("tail", "expected"), [("renormalise", 0.290788), ("bucket", 0.232630)])
def test_j2_students_top_two_at_beta_0(tail, expected):
    objective = JSD(beta=0, support="student_topk", top_k=2, tail=tail)
    assert loss_of(objective, [0.5, 0.3, 0.2], [0.2, 0.6, 0.2]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("beta", "expected"), [(1, 0.183787), (0, 0.192042)])
def test_j3_binary_divergence_on_the_sampled_token(beta, expected):
    objective = JSD(beta=beta, support="sampled")
    assert loss_of(objective, [0.3, 0.5, 0.2], [0.6, 0.1, 0.3]) == pytest.approx(expected, abs=1e-6)


def test_t1_weights_are_the_teachers_top_two_renormalised():
    student = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    out = TopKForwardKL(2).loss(
        student.log(),
        TokenBatch(
            ids=torch.tensor([1]),
            sampler_logprobs=torch.tensor([-1.0]).double(),
            teacher_logprobs=torch.tensor([0.2]).double().log(),
            topk_ids=torch.tensor([[3, 2]]),  # the teacher: .2 on token 1, .3 on 2, .5 on 3
            topk_logprobs=torch.tensor([[0.5, 0.3]]).double().log(),
        ),
    )
    assert out.loss.item() == pytest.approx(-0.625 * math.log(0.4) - 0.375 * math.log(0.3))
    assert out.metrics["topk_mass"].item() == pytest.approx(0.8)
    assert out.metrics["no_teacher_mass"].item() == 0


def test_teachers_top_one_forward_kl_is_cross_entropy_with_its_argmax():
    assert loss_of(TopKForwardKL(1), [0.7, 0.1, 0.2], [0.2, 0.5, 0.3]) == pytest.approx(-math.log(0.1))


# --- against the references, in value and gradient

TAILS: tuple[Tail, ...] = ("bucket", "renormalise")
TOPK: tuple[Support, ...] = ("teacher_topk", "student_topk")
CASES = [
    *[JSD(beta=b, support=s, top_k=3, tail=t) for b in (0, 0.3, 1) for s in TOPK for t in TAILS],
    *[JSD(beta=b, support="sampled") for b in (0, 0.3, 1)],
    TopKForwardKL(1),
    TopKForwardKL(3),
]


def reference(objective: JSD | TopKForwardKL, logits: torch.Tensor, teacher: torch.Tensor, at: torch.Tensor):
    """The loss at `logits`; a support of the student's is chosen at `at`, and stays."""
    if isinstance(objective, TopKForwardKL):
        return references.topk_forward_kl(logits, teacher, references.likeliest(teacher, objective.top_k))
    support = [[i % V] for i in range(len(logits))]
    if objective.top_k is not None:
        support = references.likeliest(teacher if objective.support == "teacher_topk" else at, objective.top_k)
    return references.jsd_on(logits, teacher, support, objective.beta, objective.tail or "bucket")


@pytest.mark.parametrize("objective", CASES, ids=str)
def test_value_and_gradient_equal_the_reference(objective):
    logits, teacher = doubles(N, V, seed=1), doubles(N, V, seed=2)
    weights = torch.linspace(0.5, 2.0, N, dtype=torch.float64)
    live = logits.clone().requires_grad_()
    loss = objective.loss(live, batch_of(teacher, k=objective.top_k or 1)).loss
    torch.testing.assert_close(loss.detach(), reference(objective, logits, teacher, logits), rtol=1e-9, atol=1e-11)
    (loss * weights).sum().backward()
    plain = logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad((reference(objective, plain, teacher, logits) * weights).sum(), plain)
    assert expected.abs().max() > 1e-2  # the case says something
    torch.testing.assert_close(live.grad, expected, rtol=1e-7, atol=1e-10)
    numeric = finite_differences(lambda at: (reference(objective, at, teacher, logits) * weights).sum(), logits)
    torch.testing.assert_close(live.grad, numeric, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("beta", [0, 0.3, 1])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("support", ["teacher_topk", "student_topk"])
def test_a_support_of_the_whole_vocabulary_is_the_full_divergence(support, tail, beta):
    logits, teacher = doubles(N, V, seed=3), doubles(N, V, seed=4)
    batch = batch_of(teacher, k=V)
    full, full_gradient = with_gradient(JSD(beta=beta), logits, batch)
    ours, gradient = with_gradient(JSD(beta=beta, support=support, top_k=V, tail=tail), logits, batch)
    torch.testing.assert_close(ours, full, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, full_gradient, rtol=1e-5, atol=1e-5)


def with_gradient(objective, logits: torch.Tensor, batch: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
    live = logits.clone().requires_grad_()
    loss = objective.loss(live, batch).loss
    loss.sum().backward()
    assert live.grad is not None
    return loss.detach(), live.grad


# --- properties


@given(st.integers(1, V - 1), st.floats(0.05, 0.95), st.integers(0, 99))
def test_a_coarser_view_never_diverges_more_than_the_whole(k, beta, seed):
    """Merging outcomes loses information: bucket <= full, and both are at least 0."""
    logits, teacher = doubles(N, V, seed=seed), doubles(N, V, seed=seed + 100)
    batch = batch_of(teacher, k=k)
    full = JSD(beta=beta).loss(logits, batch).loss
    for objective in (
        JSD(beta=beta, support="teacher_topk", top_k=k),
        JSD(beta=beta, support="student_topk", top_k=k),
        JSD(beta=beta, support="sampled"),
    ):
        coarse = objective.loss(logits, batch).loss
        assert (coarse <= full + 1e-6).all() and (coarse >= -1e-12).all()


@given(st.integers(1, V), st.integers(0, 99))
def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(k, seed):
    logits = doubles(N, V, seed=seed)
    for support in ("teacher_topk", "student_topk", "sampled"):
        objective = JSD(beta=0.5, support=support, top_k=None if support == "sampled" else k)
        loss, gradient = with_gradient(objective, logits, batch_of(logits, k=k))
        torch.testing.assert_close(loss, torch.zeros(N).double(), atol=1e-9, rtol=0)
        torch.testing.assert_close(gradient, torch.zeros(N, V).double(), atol=1e-6, rtol=0)


# --- rows without some or any of the teacher's tokens


ABSENT = [
    JSD(beta=0.3, support="teacher_topk", top_k=3),
    JSD(beta=0, support="teacher_topk", top_k=3, tail="renormalise"),
    JSD(beta=1, support="teacher_topk", top_k=3),
    TopKForwardKL(3),
]


@pytest.mark.parametrize("objective", ABSENT, ids=str)
def test_absent_tokens_leave_the_support_and_an_empty_row_gives_nothing_and_is_counted(objective):
    logits, teacher = doubles(2, V, seed=5), doubles(2, V, seed=6)
    batch = batch_of(teacher, k=3)
    assert batch.topk_ids is not None and batch.topk_logprobs is not None
    kept = batch.topk_ids[0, [0, 2]].tolist()
    batch.topk_logprobs[0, 1] = -INF
    batch.topk_logprobs[1] = -INF
    batch.topk_ids[1] = 0
    loss, gradient = with_gradient(objective, logits, batch)
    if isinstance(objective, JSD):
        expected = references.jsd_on(logits, teacher, [kept, []], objective.beta, objective.tail or "bucket")
    else:
        expected = references.topk_forward_kl(logits, teacher, [kept, []])
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    assert loss[1] == 0 and (gradient[1] == 0).all()
    metrics = objective.loss(logits, batch).metrics
    assert metrics["no_teacher_mass"].tolist() == [0, 1]
    t = references.probabilities(teacher)
    assert metrics["topk_mass"].tolist() == pytest.approx([t[0][kept].sum().item(), 0])


# --- numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", [0, 0.5, 1])
@pytest.mark.parametrize("tail", TAILS)
def test_sure_models_stay_finite(dtype, beta, tail):
    """All of the mass inside the support, or none of it, on either side."""
    logits = torch.tensor([[90.0, 0, 0, 0], [0, 0, 0, 90.0], [0, 0, 0, 0], [40.0, 40, 0, 0]], dtype=dtype)
    teacher = torch.tensor([[0, 0, 0, 90.0], [90.0, 0, 0, 0], [90.0, 0, 0, 0], [90.0, 89, 0, 0]], dtype=dtype)
    logprobs = teacher.log_softmax(-1)
    top = logprobs.topk(2)
    batch = TokenBatch(
        torch.tensor([0, 1, 2, 3]),
        torch.full((4,), -1.0, dtype=dtype),
        logprobs[:, 0],
        teacher,
        top.indices,
        top.values,
    )
    for objective in (
        JSD(beta=beta, support="teacher_topk", top_k=2, tail=tail),
        JSD(beta=beta, support="student_topk", top_k=2, tail=tail),
        JSD(beta=beta, support="sampled"),
        TopKForwardKL(2),
    ):
        live = logits.clone().requires_grad_()
        out = objective.loss(live, batch)
        out.loss.sum().backward()
        assert (
            live.grad is not None and torch.isfinite(live.grad).all() and live.grad.abs().max() < 90
        )  # the largest KL here
        assert all(torch.isfinite(x).all() for x in (out.loss, *out.metrics.values()))


def test_mass_is_taken_from_the_whole_distribution():
    """Not from a softmax over the support, which would make the bucket empty."""
    rows = torch.tensor([[0.5, 0.2, 0.3]], dtype=torch.float64).log()
    inside = outcomes(rows[:, :2], torch.tensor([[True, True]]), "bucket")
    torch.testing.assert_close(inside.exp(), torch.tensor([[0.5, 0.2, 0.3]]).double())
    renormalised = outcomes(rows[:, :2], torch.tensor([[True, True]]), "renormalise").softmax(-1)
    torch.testing.assert_close(renormalised, torch.tensor([[5 / 7, 2 / 7]]).double())


def test_metrics_of_every_support():
    logits, teacher = doubles(N, V, seed=7), doubles(N, V, seed=8)
    batch = batch_of(teacher, k=3)
    s, t = references.probabilities(logits), references.probabilities(teacher)
    kl = torch.log(references.of_ids(s, batch.ids) / references.of_ids(t, batch.ids))
    for objective in CASES:
        if objective.top_k in (None, 3):
            metrics = objective.loss(logits.clone().requires_grad_(), batch).metrics
            torch.testing.assert_close(metrics["kl"], kl)
            assert not any(x.requires_grad for x in metrics.values())
            assert ("topk_mass" in metrics) == (objective.top_k is not None)
    torch.testing.assert_close(JSD().loss(logits, batch).metrics["entropy"], -(s * torch.log(s)).sum(-1))
    ids = references.likeliest(s, 3)
    mass = JSD(support="student_topk", top_k=3).loss(logits, batch).metrics["topk_mass"]
    torch.testing.assert_close(mass, torch.stack([t[i][row].sum() for i, row in enumerate(ids)]))


def test_the_teacher_gets_no_gradient():
    logits, teacher = doubles(N, V, seed=9).requires_grad_(), doubles(N, V, seed=10).requires_grad_()
    divergence(logits, teacher, 0.5).sum().backward()
    assert logits.grad is not None and teacher.grad is None


# --- what they need, and what is refused


def test_each_objective_needs_no_more_than_it_uses():
    assert JSD().need is SignalKind.FULL
    assert JSD(support="student_topk", top_k=5).need is SignalKind.FULL
    assert JSD(support="teacher_topk", top_k=5).need == TeacherTopK(5)
    assert JSD(support="teacher_topk", top_k=5, tail="renormalise").need == TeacherTopK(5, renormalised=True)
    assert JSD(support="sampled").need is SignalKind.SAMPLED
    assert TopKForwardKL(5).need == TeacherTopK(5, renormalised=True)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"support": "sampled", "tail": "renormalise"}, "always 0"),
        ({"support": "teacher_topk", "top_k": 1, "tail": "renormalise"}, "always 0"),
        ({"support": "teacher_topk"}, "needs top_k"),
        ({"support": "sampled", "top_k": 3}, "top_k=3"),
        ({"top_k": 3}, "not of full"),
        ({"support": "student_topk", "top_k": 0}, "1 or more"),
        ({"tail": "bucket"}, "leaves no token out"),
        ({"support": "everything"}, "teacher_topk, student_topk, sampled"),
        ({"support": "sampled", "tail": "drop"}, "bucket, renormalise"),
    ],
)
def test_jsd_refuses(options, named):
    with pytest.raises(ConfigError, match=named):
        JSD(**options)


def test_top_k_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="top_k=0"):
        TopKForwardKL(0)
