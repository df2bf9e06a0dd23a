"""Our losses on random inputs against the definitions that others document, each written in probability space.

- TRL's DistillationTrainer: generalised JSD of both models' logits over one temperature, `beta` from forward KL (0) to
  reverse KL (1), averaged over completion tokens.
- Fireworks' distillation recipes: `sampled_reverse_kl` weighs the importance-sampling loss of each sampled token by
  teacher_logprob - sampling_logprob; `topk_forward_kl` is cross-entropy with the teacher's top K as soft labels, which
  several teachers' `blend_weight`s mix.
- The Tinker cookbook: the sampled KL of later tokens is added, discounted; what the environment wrote is left out.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from episodes import make_episode, sampled_item
from hypothesis import given, settings
from hypothesis import strategies as st
from test_learner import VOCAB, make_model, plain_copy, plain_logits, sampled_ids
from torch import Tensor

from models.blending import blended
from models.causal_lm import CausalLM
from models.types import Signal, TeacherTopK
from training.distribution_losses import JSD, TopKForwardKL
from training.learner import Learner
from training.objectives import ReverseKL, TokenBatch

SEEDS, SIZES = st.integers(0, 10_000), st.tuples(st.integers(1, 5), st.integers(3, 12))
many = settings(deadline=None, max_examples=30)  # a busy machine is no error


def logits(size: tuple[int, int], seed: int, scale: float = 3.0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def softmax(rows: Tensor, temperature: float = 1.0) -> np.ndarray:
    weights = np.exp(rows.numpy() / temperature)
    return weights / weights.sum(-1, keepdims=True)


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.array(
        [sum(a * (np.log(a) - np.log(b)) for a, b in zip(x, y, strict=True)) for x, y in zip(p, q, strict=True)]
    )


def batch_of(student: Tensor, **given: Tensor) -> TokenBatch:
    n = len(student)
    return TokenBatch(torch.zeros(n, dtype=torch.long), torch.full((n,), -1.0).double(), **given)


@many
@given(SIZES, SEEDS, st.sampled_from([0.0, 0.07, 0.5, 0.8, 1.0]), st.floats(0.5, 4.0))
def test_trl_s_generalised_jsd(size, seed, beta, temperature):
    student, teacher = logits(size, seed), logits(size, seed + 1)
    s, t = softmax(student, temperature), softmax(teacher, temperature)
    mixed = beta * t + (1 - beta) * s
    expected = kl(t, s) if beta == 0 else kl(s, t) if beta == 1 else beta * kl(t, mixed) + (1 - beta) * kl(s, mixed)
    batch = batch_of(student, teacher_logits=teacher)
    ours = JSD(beta, loss_temperature=temperature).loss(student, batch).loss  # TRL divides by its one temperature
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-7, atol=1e-9)


@many
@given(SIZES, SEEDS)
def test_fireworks_sampled_reverse_kl(size, seed):
    student, teacher, old = logits(size, seed), logits(size, seed + 1), logits(size, seed + 2, 1.0) + logits(size, seed)
    ids = torch.randint(0, size[1], (size[0],), generator=torch.Generator().manual_seed(seed))
    now, judged, sampled = (softmax(x)[np.arange(size[0]), ids.numpy()] for x in (student, teacher, old))
    advantage = np.log(judged) - np.log(sampled)
    expected = -(now / sampled) * advantage
    batch = TokenBatch(ids, torch.from_numpy(np.log(sampled)), torch.from_numpy(np.log(judged)))
    ours = ReverseKL(signal_policy="sampler", is_cap=1e8).loss(student, batch).loss
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-7, atol=1e-9)


@many
@given(SIZES, SEEDS, st.integers(1, 3), st.floats(0.1, 0.9))
def test_fireworks_topk_forward_kl_of_two_blended_teachers(size, seed, k, weight):
    student, teachers = logits(size, seed), [logits(size, seed + i) for i in (1, 2)]
    expected = []
    for row in range(size[0]):
        mass = dict.fromkeys(range(size[1]), 0.0)
        for share, teacher in zip((weight, 1 - weight), teachers, strict=True):
            p = softmax(teacher)[row]
            best = sorted(range(size[1]), key=lambda i, p=p: -p[i])[:k]
            for i in best:
                mass[i] += share * p[i] / sum(p[j] for j in best)
        kept = sorted(mass, key=lambda i, mass=mass: -mass[i])[:k]
        total = sum(mass[i] for i in kept)
        expected.append(-sum(mass[i] / total * np.log(softmax(student)[row][i]) for i in kept))
    said = {}
    for i, teacher in enumerate(teachers):
        top = teacher.log_softmax(-1).topk(k)
        said[str(i)] = Signal(logprobs=torch.full((size[0],), -1.0), topk_ids=top.indices, topk_logprobs=top.values)
    blend = blended(said, (weight, 1 - weight), TeacherTopK(k, renormalised=True))
    assert blend.topk_ids is not None and blend.topk_logprobs is not None
    batch = batch_of(
        student,
        teacher_logprobs=torch.zeros(size[0]).double(),
        topk_ids=blend.topk_ids,
        topk_logprobs=blend.topk_logprobs.double(),
    )
    np.testing.assert_allclose(TopKForwardKL(k).loss(student, batch).loss.numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("discount", [0.0, 0.9])
def test_the_cookbook_s_masks_and_discount(discount):
    """Two turns with a tool's answer between: its tokens bring no KL, no loss, and take no time."""
    model = make_model(0)
    episode = make_episode([4, 7, 9], [([11, 12, 2], [20, 21, 22, 23]), ([13, 2], [])], [-1.0, -0.5, -2.0, -0.7, -1.1])
    judged = np.array([-0.3, -2.0, -1.0, -0.2, -3.0])
    with torch.no_grad():
        rows = softmax(plain_logits(plain_copy(model), episode))
    own = np.log(rows[np.arange(5), sampled_ids(episode).numpy()])
    sampler = episode.sampler_logprobs[episode.sampled].astype(float)
    gain = judged - own
    future = [sum(discount ** (j - i) * gain[j] for j in range(i, 5)) for i in range(5)]
    expected = -np.minimum(np.exp(own - sampler), 5.0) * np.array(future)
    learner = Learner(CausalLM(model), head_elements=2 * VOCAB)
    (measured,) = learner.measure([sampled_item(episode, torch.from_numpy(judged))], ReverseKL(discount=discount))
    np.testing.assert_allclose(measured.values["loss"], expected, rtol=1e-4, atol=1e-5)
