"""Each objective against the reference values of the design and against `references`, gradients included."""

import math
import warnings
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import references
import torch
from hypothesis import given
from hypothesis import strategies as st
from references import finite_differences

from errors import ConfigError
from models.types import SignalKind
from training.distribution_losses import JSD, _Divergence, divergence
from training.objectives import (
    SFT,
    ReverseKL,
    TokenBatch,
    _ChosenLogprobs,
    chosen_logprobs,
    discounted_sums,
    token_logprobs,
)

N, V = 7, 9
LENGTHS = [3, 1, 3]


def doubles(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def make_batch(logits: torch.Tensor, seed: int = 1, distance: float = 0.7) -> TokenBatch:
    """Ids, and logprobs of a sampler and a teacher some way from softmax(logits). All float64."""
    n, v = logits.shape
    ids = torch.randint(0, v, (n,), generator=torch.Generator().manual_seed(seed))
    own = torch.log(references.of_ids(references.probabilities(logits), ids))
    return TokenBatch(
        ids=ids,
        sampler_logprobs=(own + doubles(n, seed=seed + 1, scale=distance)).clamp(max=-1e-3),
        teacher_logprobs=(own + doubles(n, seed=seed + 2, scale=distance)).clamp(max=-1e-3),
        teacher_logits=doubles(n, v, seed=seed + 3, scale=1.5),
    )


def one_token(log_ratio: float, advantage: float, **options) -> tuple[float, float]:
    """Loss and d loss / d log pi of one token at a ratio of e^log_ratio, with coef 1."""
    # Two ids: log pi(0) is a free number below 0, and d log pi / d logit_0 is 1 - pi.
    logprob = min(-40.0, -40.0 - log_ratio) if abs(log_ratio) > 5 else -2.0
    logits = torch.tensor([[logprob - math.log1p(-math.exp(logprob)), 0.0]], dtype=torch.float64, requires_grad=True)
    batch = TokenBatch(
        ids=torch.tensor([0]),
        sampler_logprobs=torch.tensor([logprob - log_ratio], dtype=torch.float64),
        teacher_logprobs=torch.tensor([logprob + advantage], dtype=torch.float64),
    )
    loss = ReverseKL(**options).loss(logits, batch).loss
    loss.sum().backward()
    assert logits.grad is not None
    return loss.item(), logits.grad[0, 0].item() / (1 - math.exp(logprob))


# --- values worked out by hand


@pytest.mark.parametrize(
    ("beta", "expected"),
    [
        (0, 1.757780),
        (0.1, 0.146311),
        (0.25, 0.285781),
        (0.5, 0.368064),
        (0.75, 0.285781),
        (0.9, 0.146311),
        (1, 1.757780),
    ],
)
def test_j1_divergence_of_two_coins(beta, expected):
    student, teacher = torch.tensor([[0.1, 0.9]]).log(), torch.tensor([[0.9, 0.1]]).log()
    assert divergence(student, teacher, beta).item() == pytest.approx(expected, abs=2e-6)


def test_j1_orientation_beta_0_is_forward_and_beta_1_is_reverse():
    # Asymmetric on purpose: J1 itself cannot tell the two KLs apart.
    s, t = [0.5, 0.25, 0.25], [0.125, 0.125, 0.75]
    student, teacher = torch.tensor([s]).log(), torch.tensor([t]).log()
    forward = 0.125 * math.log(0.25) + 0.125 * math.log(0.5) + 0.75 * math.log(3)
    reverse = 0.5 * math.log(4) + 0.25 * math.log(2) + 0.25 * math.log(1 / 3)
    assert divergence(student, teacher, 0).item() == pytest.approx(forward, rel=1e-6)
    assert divergence(student, teacher, 1).item() == pytest.approx(reverse, rel=1e-6)
    m = [0.7 * a + 0.3 * b for a, b in zip(s, t, strict=True)]  # (1 - beta) s + beta t
    mixed = sum(0.3 * b * math.log(b / c) + 0.7 * a * math.log(a / c) for a, b, c in zip(s, t, m, strict=True))
    assert divergence(student, teacher, 0.3).item() == pytest.approx(mixed, rel=1e-5)


def test_j1_near_the_endpoints_the_divergence_vanishes_and_the_user_is_warned():
    student, teacher = torch.tensor([[0.1, 0.9]]).double().log(), torch.tensor([[0.9, 0.1]]).double().log()
    assert divergence(student, teacher, 0.001).item() == pytest.approx(0.00175, abs=5e-6)
    for beta in (0.001, 0.049, 0.951, 0.999):
        with pytest.warns(UserWarning, match="tends to 0"):
            JSD(beta=beta)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for beta in (0, 0.05, 0.5, 0.95, 1):
            JSD(beta=beta)


def test_r1_advantage_is_the_teachers_logprob_minus_the_students():
    logits = torch.tensor([[-0.5, math.log1p(-math.exp(-0.5))], [-0.7, math.log1p(-math.exp(-0.7))]])
    own = torch.tensor([-0.5, -0.7])
    batch = TokenBatch(torch.tensor([0, 0]), own, teacher_logprobs=torch.tensor([-0.1, -0.3]))
    objective = ReverseKL()
    advantages = objective.advantages(token_logprobs(logits, batch.ids), batch, [2]).values
    torch.testing.assert_close(advantages, torch.tensor([0.4, 0.4]))
    torch.testing.assert_close(objective.loss(logits, batch).loss, torch.tensor([-0.4, -0.4]))  # pi = mu: ratio 1
    torch.testing.assert_close(ReverseKL(coef=0.5).loss(logits, batch).loss, torch.tensor([-0.2, -0.2]))


def test_r2_discounted_sums_count_sampled_tokens_only():
    # Two tokens of a tool lie between the second and third: they are not in the stream, so they take no time.
    values = torch.tensor([-0.5, 0.2, -0.4])
    torch.testing.assert_close(discounted_sums(values, [3], 0.5), torch.tensor([-0.5, 0.0, -0.4]))
    torch.testing.assert_close(discounted_sums(values, [2, 1], 0.5), torch.tensor([-0.4, 0.2, -0.4]))


def test_r3_loss_and_gradient_at_ratio_one():
    logits = doubles(3, V, seed=3).requires_grad_()
    ids = torch.tensor([2, 5, 2])
    own = token_logprobs(logits, ids)
    own.retain_grad()
    batch = TokenBatch(ids, own.detach(), own.detach(), advantages=torch.tensor([0.3, -0.2, 0.4]).double())
    out = ReverseKL().loss(logits, batch)
    assert out.loss.sum().item() == pytest.approx(-0.5)
    out.loss.sum().backward()
    # d L / d logits = -A (onehot - p) at every token, which is d L / d log pi = [-.3, .2, -.4].
    p = references.probabilities(logits.detach())
    onehot = torch.eye(V, dtype=torch.float64)[ids]
    expected = torch.tensor([-0.3, 0.2, -0.4]).double()[:, None] * (onehot - p)
    torch.testing.assert_close(logits.grad, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "loss", "gradient"),
    [
        (math.log(1.1), 1.0, -1.1, -1.1),  # within the bounds
        (math.log(1.5), 1.0, -1.2, 0.0),  # far enough already: clipped, no gradient
        (math.log(1.5), -1.0, 1.5, 1.5),  # wrong direction: not clipped
        (math.log(0.5), 1.0, -0.5, -0.5),
        (math.log(0.5), -1.0, 0.8, 0.0),
    ],
)
def test_ppo_by_hand(log_ratio, advantage, loss, gradient):
    assert one_token(log_ratio, advantage, variant="ppo") == pytest.approx((loss, gradient), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "weight"),
    [(math.log(0.5), 1.0, 0.5), (math.log(3.0), -2.0, 3.0), (math.log(8.0), 1.0, 4.0), (math.log(8.0), -1.0, 4.0)],
)
def test_cispo_by_hand_keeps_the_gradient_of_clipped_tokens(log_ratio, advantage, weight):
    expected = (-weight * advantage * -2.0, -weight * advantage)  # log pi is -2
    assert one_token(log_ratio, advantage, variant="cispo") == pytest.approx(expected, rel=1e-9)


def test_clip_thresholds_replace_the_defaults_one_by_one():
    assert one_token(math.log(1.5), 1.0, variant="ppo", clip_high=1.4)[0] == pytest.approx(-1.4)
    assert one_token(math.log(0.5), -1.0, variant="ppo", clip_high=1.4)[0] == pytest.approx(0.8)
    assert one_token(math.log(0.5), -1.0, variant="ppo", clip_low=0.6)[0] == pytest.approx(0.6)
    assert one_token(math.log(8.0), 1.0, variant="cispo", clip_high=6.0)[1] == pytest.approx(-6.0)
    assert one_token(math.log(0.1), 1.0, variant="cispo", clip_low=0.5)[1] == pytest.approx(-0.5)


@pytest.mark.parametrize("variant", ["importance_sampling", "ppo", "cispo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("log_ratio", [30.0, -30.0, 300.0, -300.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_runaway_ratios_stay_finite_in_value_gradient_and_metrics(variant, dtype, log_ratio, advantage):
    logits = torch.tensor([[0.0, -1.0, 350.0]], dtype=dtype, requires_grad=True)
    batch = TokenBatch(
        ids=torch.tensor([0]),
        sampler_logprobs=torch.tensor([-350.0 - log_ratio], dtype=dtype),
        teacher_logprobs=torch.tensor([-350.0 + advantage], dtype=dtype),
    )
    out = ReverseKL(variant=variant).loss(logits, batch)
    out.loss.sum().backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all()
    assert all(torch.isfinite(x).all() for x in (out.loss, *out.metrics.values()))
    cap = {"importance_sampling": 5.0, "ppo": 1.2 if advantage > 0 else 5.0, "cispo": 4.0 * -350.0}[variant]
    floor = {"importance_sampling": 0.0, "ppo": 0.0 if advantage > 0 else 0.8, "cispo": 0.0}[variant]
    expected = -advantage * (cap if log_ratio > 0 else floor)
    assert out.loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert out.metrics["ratio_truncated"].item() == (log_ratio > 0)


def test_truncation_acts_at_the_cap_and_not_before():
    assert one_token(math.log(4.9), 1.0) == pytest.approx((-4.9, -4.9))
    assert one_token(math.log(5.1), 1.0) == pytest.approx((-5.0, 0.0))
    assert one_token(math.log(5.1), 1.0, is_cap=6.0) == pytest.approx((-5.1, -5.1))
    assert one_token(math.log(0.01), 1.0) == pytest.approx((-0.01, -0.01))


def test_advantage_clip_bounds_each_token_before_the_discounted_sum_and_is_counted():
    logits = doubles(4, V, seed=5)
    ids = torch.tensor([0, 1, 2, 3])
    own = token_logprobs(logits, ids)
    batch = TokenBatch(ids, own, own + torch.tensor([3.0, -3.0, 0.5, -0.25]).double())
    objective = ReverseKL(advantage_clip=1.0, discount=0.5)
    torch.testing.assert_close(
        objective.advantages(own, batch, [4]).values,
        torch.tensor([1 - 0.5 + 0.125 - 0.03125, -1 + 0.25 - 0.0625, 0.5 - 0.125, -0.25]).double(),
    )
    out = ReverseKL(advantage_clip=1.0).loss(logits, batch)
    torch.testing.assert_close(out.loss, torch.tensor([-1.0, 1.0, -0.5, 0.25]).double())
    assert out.metrics["advantage_clipped"].tolist() == [1, 1, 0, 0]
    torch.testing.assert_close(out.metrics["kl"], torch.tensor([-3.0, 3.0, -0.5, 0.25]).double())  # not clipped
    assert "advantage_clipped" not in ReverseKL().loss(logits, batch).metrics


def test_signal_policy_sampler_judges_what_was_sampled_and_current_what_the_student_is_now():
    log_two = math.log(2.0)
    # The sampler gave half the student's probability; the teacher gives e^0.3 of the student's.
    assert one_token(log_two, 0.3, signal_policy="current")[0] == pytest.approx(-2 * 0.3)
    assert one_token(log_two, 0.3, signal_policy="sampler")[0] == pytest.approx(-2 * (0.3 + log_two))


def test_metrics_mean_what_their_names_say():
    logits = doubles(N, V, seed=0)
    batch = make_batch(logits)
    out = ReverseKL(is_cap=1.5).loss(logits.clone().requires_grad_(), batch)
    pi = references.of_ids(references.probabilities(logits), batch.ids)
    mu, teacher = batch.sampler_logprobs.exp(), batch.teacher_logprobs.exp()  # type: ignore[union-attr]
    torch.testing.assert_close(out.metrics["kl"], torch.log(pi / teacher))
    torch.testing.assert_close(out.metrics["teacher_logprob"], torch.log(teacher))
    torch.testing.assert_close(out.metrics["ratio"], pi / mu)
    torch.testing.assert_close(out.metrics["mismatch_kl"], pi / mu - 1 - torch.log(pi / mu))
    torch.testing.assert_close(out.metrics["sampler_gap"], torch.log(pi / mu).abs())
    assert out.metrics["ratio_truncated"].tolist() == (pi / mu > 1.5).float().tolist()
    assert 0 < out.metrics["ratio_truncated"].sum() < N  # the case has both kinds
    assert not any(values.requires_grad for values in out.metrics.values())


def test_mismatch_kl_is_in_expectation_the_kl_from_sampler_to_learner():
    pi, mu = (references.probabilities(doubles(1, V, seed=s)) for s in (8, 9))
    batch = TokenBatch(torch.arange(V), torch.log(mu[0]), torch.log(mu[0]))
    k3 = ReverseKL().loss(torch.log(pi).expand(V, V), batch).metrics["mismatch_kl"]
    assert (mu[0] * k3).sum().item() == pytest.approx((mu * torch.log(mu / pi)).sum().item(), rel=1e-9)


# --- against the references, in value and gradient

REVERSE_KL_CASES = [
    {},
    {"coef": 0.3},
    {"discount": 0.5},
    {"discount": 1.0, "coef": 2.0},
    {"signal_policy": "sampler"},
    {"signal_policy": "sampler", "discount": 0.9},
    {"advantage_clip": 0.4},
    {"advantage_clip": 0.4, "discount": 0.5},
    {"is_cap": 1.3},
    {"variant": "ppo"},
    {"variant": "ppo", "discount": 0.5},
    {"variant": "cispo"},
    {"variant": "cispo", "discount": 0.5},
]


@pytest.mark.parametrize("options", REVERSE_KL_CASES, ids=str)
def test_reverse_kl_equals_the_reference(options):
    logits = doubles(N, V, seed=10, scale=1.5)
    batch = make_batch(logits)
    teacher_logprobs = batch.teacher_logprobs
    assert teacher_logprobs is not None
    objective = ReverseKL(**options)
    assert objective.need is SignalKind.SAMPLED and objective.looks_ahead == bool(options.get("discount"))
    if objective.looks_ahead:
        ahead = objective.advantages(token_logprobs(logits, batch.ids), batch, LENGTHS).values
        batch = TokenBatch(batch.ids, batch.sampler_logprobs, batch.teacher_logprobs, advantages=ahead)
    bounds = {"low": 0.0, "high": 4.0} if options.get("variant") == "cispo" else {}

    def reference(at):
        return references.reverse_kl(
            at, batch.ids, batch.sampler_logprobs, teacher_logprobs, LENGTHS, frozen=logits, **bounds, **options
        )

    weights = torch.linspace(0.5, 2.0, N, dtype=torch.float64)  # unlike per token, as the learner's may be
    _compare(lambda at: objective.loss(at, batch).loss, reference, logits, weights)


@pytest.mark.parametrize("beta", [0, 0.05, 0.3, 0.5, 0.9, 1])
def test_jsd_equals_the_reference(beta):
    logits = doubles(N, V, seed=11, scale=2.0)
    batch = make_batch(logits)
    weights = torch.linspace(0.5, 2.0, N, dtype=torch.float64)
    objective = JSD(beta=beta)
    _compare(
        lambda at: objective.loss(at, batch).loss,
        lambda at: references.jsd(at, batch.teacher_logits, beta),  # type: ignore[arg-type]
        logits,
        weights,
    )


def test_sft_equals_the_reference():
    logits = doubles(N, V, seed=12, scale=2.0)
    batch = make_batch(logits)
    weights = torch.linspace(0.5, 2.0, N, dtype=torch.float64)
    _compare(lambda at: SFT().loss(at, batch).loss, lambda at: references.cross_entropy(at, batch.ids), logits, weights)
    assert SFT().loss(logits, batch).metrics.keys() == {"nll"}


def _compare(ours, reference, logits, weights):
    """Values; gradients against plain autograd of the reference, and against its finite differences."""
    live = logits.clone().requires_grad_()
    loss = ours(live)
    torch.testing.assert_close(loss.detach(), reference(logits), rtol=1e-9, atol=1e-12)
    (loss * weights).sum().backward()
    plain = logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad((reference(plain) * weights).sum(), plain)
    assert expected.abs().max() > 1e-2  # the case says something
    torch.testing.assert_close(live.grad, expected, rtol=1e-8, atol=1e-11)
    numeric = finite_differences(lambda at: (reference(at) * weights).sum(), logits)
    torch.testing.assert_close(live.grad, numeric, rtol=1e-6, atol=1e-8)


def test_custom_functions_pass_gradcheck():
    logits = doubles(N, V, seed=13, scale=2.0).requires_grad_()
    ids = make_batch(logits.detach()).ids
    several = torch.stack([ids, (ids + 1) % V, ids], dim=1)  # an id may come twice
    assert torch.autograd.gradcheck(lambda z: _ChosenLogprobs.apply(z, several), (logits,))
    raw_teacher = doubles(N, V, seed=15) + doubles(N, 1, seed=14)  # logits, not normalised
    for beta in (0, 0.4, 1):
        assert torch.autograd.gradcheck(lambda z, b=beta: divergence(z, raw_teacher, b), (logits,))


@pytest.mark.parametrize("beta", [0, 0.3, 1])
def test_custom_backward_leaves_its_inputs_as_they_were(beta):
    # Both reuse buffers in place; an input written over would corrupt the metrics.
    logits = doubles(N, V, seed=16).requires_grad_()
    teacher = doubles(N, V, seed=17).log_softmax(-1)
    before, teacher_before = logits.detach().clone(), teacher.clone()
    loss = divergence(logits, teacher, beta)
    (loss.sum() + token_logprobs(logits, torch.arange(N)).sum()).backward()
    assert torch.equal(logits.detach(), before) and torch.equal(teacher, teacher_before)


@pytest.mark.parametrize("beta", [0, 0.3, 1])
def test_what_a_divergence_measures_besides(beta):
    logits, teacher = doubles(N, V, seed=18, scale=3.0), doubles(N, V, seed=19, scale=3.0)
    ids = make_batch(logits).ids
    _, entropy, live, judged = _Divergence.apply(logits, teacher, beta, ids)  # type: ignore[misc]
    s, t = references.probabilities(logits), references.probabilities(teacher)
    torch.testing.assert_close(entropy, -(s * torch.log(s)).sum(-1))
    torch.testing.assert_close(live, torch.log(references.of_ids(s, ids)))
    torch.testing.assert_close(judged, torch.log(references.of_ids(t, ids)))


def test_chosen_logprobs_are_of_the_whole_distribution():
    logits = doubles(N, V, seed=25, scale=2.0)
    ids = torch.tensor([[0, V - 1]] * N)
    expected = torch.log(references.probabilities(logits))[:, [0, V - 1]]
    torch.testing.assert_close(chosen_logprobs(logits, ids), expected)


def test_extreme_logits_do_not_make_nan():
    logits = torch.tensor([[1e4, 0.0, -1e4], [0.0, 80.0, -80.0]], requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [0.0, 80.0, -80.0]])
    for beta in (0, 0.5, 1):
        logits.grad = None
        loss = JSD(beta).loss(logits, replace(make_batch(torch.zeros(2, 3)), teacher_logits=teacher)).loss
        loss.sum().backward()
        assert torch.isfinite(loss).all() and logits.grad is not None and torch.isfinite(logits.grad).all()
        assert loss[1].item() == pytest.approx(0.0, abs=1e-6)
    assert divergence(logits.log_softmax(-1), teacher.log_softmax(-1), 0.5)[0].item() == pytest.approx(math.log(2))


# --- what the sampled objective estimates


def test_expected_policy_gradient_is_the_gradient_of_the_exact_reverse_kl():
    """Enumerated, not sampled: the sum over ids of mu(x) times the gradient at x, for pi != mu."""
    logits = doubles(V, seed=20)
    teacher = doubles(V, seed=21)
    mu = references.probabilities(logits + doubles(V, seed=22, scale=0.2)[None])[0]
    ratio = references.probabilities(logits) / mu
    assert 0.5 < ratio.min() < ratio.max() < 4  # no truncation: the estimate is unbiased
    exact = logits.clone().requires_grad_()
    JSD(beta=1).loss(
        exact[None], TokenBatch(torch.tensor([0]), torch.zeros(1).double(), teacher_logits=teacher[None])
    ).loss.sum().backward()
    batch = TokenBatch(torch.arange(V), torch.log(mu), torch.log(references.probabilities(teacher)))
    for variant in ("importance_sampling", "cispo"):
        sampled = logits.clone().requires_grad_()
        loss = ReverseKL(variant=variant).loss(sampled.expand(V, V), batch).loss
        (loss * mu).sum().backward()
        torch.testing.assert_close(sampled.grad, exact.grad, rtol=1e-9, atol=1e-12)


def test_expected_sampled_kl_is_the_exact_kl():
    logits, teacher = doubles(V, seed=23), doubles(V, seed=24)
    s, t = references.probabilities(logits), references.probabilities(teacher)
    kl = ReverseKL().loss(logits.expand(V, V), TokenBatch(torch.arange(V), torch.log(s), torch.log(t))).metrics["kl"]
    batch = TokenBatch(torch.arange(V), torch.log(s), teacher_logits=teacher.expand(V, V))
    out = JSD(beta=1).loss(logits.expand(V, V), batch)
    torch.testing.assert_close((s * kl).sum().expand(V), out.metrics["exact_kl"])
    torch.testing.assert_close(out.metrics["kl"], kl)
    torch.testing.assert_close(out.metrics["teacher_logprob"], torch.log(t))
    assert "exact_kl" not in JSD(beta=0).loss(logits.expand(V, V), batch).metrics


# --- discounted sums


@given(
    st.lists(st.lists(st.floats(-5, 5), min_size=1, max_size=8), min_size=1, max_size=5),
    st.floats(0, 1),
)
def test_discounted_sums_equal_a_double_loop(episodes, discount):
    values = [a for episode in episodes for a in episode]
    lengths = [len(episode) for episode in episodes]
    ours = discounted_sums(torch.tensor(values, dtype=torch.float64), lengths, discount)
    # 0 ** 0 is 1 in Python, as the formula wants it at discount 0.
    expected = references.advantage_to_go(values, lengths, discount)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-9, atol=1e-9)


def test_discounted_sums_do_not_change_their_input_and_keep_its_dtype():
    values = torch.tensor([1.0, 2.0, 3.0])
    assert discounted_sums(values, [3], 1.0).tolist() == [6.0, 5.0, 3.0]
    assert values.tolist() == [1.0, 2.0, 3.0]
    assert discounted_sums(values, [3], 0.5).dtype == torch.float32


def test_discount_one_over_many_tokens_stays_exact_in_float32():
    values = torch.full((20_000,), 0.1)
    sums = discounted_sums(values, [20_000], 1.0)
    assert sums[0].item() == pytest.approx(float(np.float32(0.1)) * 20_000, rel=1e-6)
    assert all(a > b for a, b in pairwise(sums[::500].tolist()))


# --- options that make no sense


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"discount": 1.5}, "1.5"),
        ({"discount": -0.1}, "-0.1"),
        ({"clip_low": 0.2}, "importance_sampling"),
        ({"variant": "ppo", "clip_low": 1.3}, "1.3"),
        ({"variant": "cispo", "clip_low": -0.1}, "-0.1"),
        ({"is_cap": 0.0}, "is_cap"),
        ({"is_cap": math.nan}, "is_cap"),
        ({"advantage_clip": math.nan}, "advantage_clip"),
        ({"advantage_clip": 0.0}, "advantage_clip"),
    ],
)
def test_reverse_kl_refuses(options, named):
    with pytest.raises(ConfigError, match=named):
        ReverseKL(**options)


@pytest.mark.parametrize("beta", [-0.1, 1.1, math.nan])
def test_jsd_refuses_beta_outside_0_to_1(beta):
    with pytest.raises(ConfigError, match="beta"):
        JSD(beta=beta)
