"""A temperature of the loss alone, and classic distillation: against `references` on raw logits.

Through learner and scorer too, each of which divides by the sampling temperature first."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import references
import torch
from episodes import random_episode
from test_learner import (
    VOCAB,
    assert_same,
    gradients,
    make_model,
    make_teacher,
    plain_gradients,
    sampled_ids,
    teacher_logits_of,
)
from torch import Tensor

from errors import ConfigError
from models.blending import blended
from models.causal_lm import CausalLM
from models.transformers_scorer import TransformersScorer
from models.types import Signal, TeacherView
from training.distribution_losses import JSD, ClassicKD, TopKForwardKL
from training.learner import Learner
from training.objectives import SFT, Objective, TokenBatch
from training.packing import TrainingItem

T, TAU = 0.8, 2.5  # of sampling, of the loss
OBJECTIVES: list[Objective] = [
    *[JSD(beta=b, loss_temperature=TAU) for b in (0, 0.3, 1)],
    *[JSD(beta=b, support="student_topk", top_k=3, loss_temperature=TAU) for b in (0, 0.3, 1)],
    JSD(beta=0.3, support="student_topk", top_k=3, tail="renormalise", loss_temperature=TAU),
    *[JSD(beta=b, support="teacher_topk", top_k=3, tail="renormalise", loss_temperature=TAU) for b in (0, 0.3, 1)],
    TopKForwardKL(3, loss_temperature=TAU),
    ClassicKD(0.3, JSD(0, loss_temperature=TAU)),
    ClassicKD(0.6, JSD(0, "teacher_topk", 3, "renormalise", TAU)),
]


def reference(objective: Objective, student: Tensor, teacher: Tensor, ids: Tensor) -> Tensor:
    """The formula, of raw logits."""
    if isinstance(objective, ClassicKD):
        soft = TAU**2 * reference(objective.soft, student, teacher, ids)
        return (1 - objective.alpha) * references.cross_entropy(student, ids) + objective.alpha * soft
    s, t = student.double() / TAU, teacher.double() / TAU
    if isinstance(objective, TopKForwardKL):
        return references.topk_forward_kl(s, t, references.likeliest(t, objective.top_k))
    assert isinstance(objective, JSD)
    if objective.support == "full":
        return references.jsd(s, t, objective.beta)
    assert objective.top_k is not None
    support = references.likeliest(t if objective.support == "teacher_topk" else s, objective.top_k)
    return references.jsd_on(s, t, support, objective.beta, objective.tail or "bucket")


def doubles(seed: int) -> Tensor:
    return torch.randn(6, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def batch_at(temperature: float, teacher: Tensor, ids: Tensor) -> TokenBatch:
    """What a teacher of these raw logits says at a temperature."""
    logprobs = torch.log(references.probabilities(teacher / temperature))
    top = logprobs.topk(3)
    return TokenBatch(
        ids, torch.full((len(ids),), -1.0).double(), references.of_ids(logprobs, ids), teacher / temperature,
        top.indices, top.values, temperature=temperature,
    )  # fmt: skip


@pytest.mark.parametrize("temperature", [1.0, T])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_value_gradient_and_metrics(objective: Any, temperature: float):
    """Logprobs that were captured at one temperature are exactly those of another, where their sum does not count."""
    student, teacher, ids = doubles(1), doubles(2), torch.tensor([3, 0, 8, 2, 2, 5])
    live = student.clone().requires_grad_()
    batch = batch_at(temperature, teacher, ids)
    out = objective.loss(live / temperature, batch)
    out.loss.sum().backward()
    plain = student.clone().requires_grad_()
    expected = reference(objective, plain, teacher, ids)
    torch.testing.assert_close(out.loss, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(live.grad, torch.autograd.grad(expected.sum(), plain)[0], rtol=1e-5, atol=1e-7)
    own = torch.log(references.of_ids(references.probabilities(student / temperature), ids))
    torch.testing.assert_close(out.metrics["kl"], own - batch.teacher_logprobs)  # at the sampling temperature
    assert "entropy" not in out.metrics and "exact_kl" not in out.metrics  # they would be of another distribution
    if isinstance(objective, ClassicKD):
        torch.testing.assert_close(out.metrics["nll"], references.cross_entropy(student, ids))
        torch.testing.assert_close(out.metrics["forward_kl"], reference(objective.soft, student, teacher, ids))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_learner_and_scorer_each_divide_once(objective: Any):
    model, judge = make_model(0), make_model(1)
    generator = np.random.default_rng(3)
    episodes = [random_episode(generator, VOCAB, turns=1 + k % 2) for k in range(3)]
    views = [TeacherView(e.token_ids.astype(np.int64), *[np.flatnonzero(e.sampled)] * 2) for e in episodes]
    scorer = TransformersScorer("teacher", CausalLM(judge), temperature=T)
    items = [TrainingItem(e, s) for e, s in zip(episodes, scorer._score(views, objective.need), strict=True)]
    plain_teacher = make_teacher(1)

    def loss(logits: Tensor, item: TrainingItem) -> Tensor:
        return reference(objective, logits, teacher_logits_of(plain_teacher, item.episode), sampled_ids(item.episode))

    expected = plain_gradients(model, items, loss)
    model.zero_grad(set_to_none=True)
    learner = Learner(CausalLM(model), temperature=T, token_budget=24, head_elements=4 * VOCAB)
    metrics = learner.forward_backward(items, objective)
    assert_same(gradients(model), expected, tolerance=1e-4)
    assert all(np.isfinite(values).all() for m in metrics for values in m.values.values())


def test_at_the_same_temperature_it_is_as_without_one():
    student, teacher, ids = doubles(1), doubles(2), torch.arange(6)
    for with_it, without in (
        (JSD(0.3, loss_temperature=T), JSD(0.3)),
        (TopKForwardKL(3, T), TopKForwardKL(3)),
        (JSD(1, "student_topk", 3, loss_temperature=T), JSD(1, "student_topk", 3)),
    ):
        ours, theirs = (o.loss(student / T, batch_at(T, teacher, ids)) for o in (with_it, without))
        assert torch.equal(ours.loss, theirs.loss) and ours.metrics.keys() == theirs.metrics.keys()


def test_classic_distillation_between_its_ends():
    student, teacher, ids = doubles(1), doubles(2), torch.arange(6)
    batch = batch_at(1.0, teacher, ids)
    hard, soft = SFT().loss(student, batch).loss, JSD(0).loss(student, batch).loss
    for alpha in (0, 0.25, 1):
        torch.testing.assert_close(ClassicKD(alpha).loss(student, batch).loss, (1 - alpha) * hard + alpha * soft)


def test_classic_distillation_by_hand():
    """s = [.2, .8], t = [.8, .2], gold 0, tau 2: both become [1/3, 2/3] and [2/3, 1/3], whose KL is log(2) / 3."""
    s, t = (torch.tensor([p], dtype=torch.float64).log() for p in ([0.2, 0.8], [0.8, 0.2]))
    batch = TokenBatch(torch.tensor([0]), torch.tensor([-1.0]).double(), teacher_logits=t)
    loss = ClassicKD(0.5, JSD(0, loss_temperature=2.0)).loss(s, batch).loss
    assert loss.item() == pytest.approx(0.5 * -math.log(0.2) + 0.5 * 4 * math.log(2) / 3)


def test_a_blend_is_mixed_before_its_temperature_is_changed():
    states, heads = torch.randn(4, 3), [torch.nn.Linear(3, 5), torch.nn.Linear(3, 5)]
    with torch.no_grad():
        signal = blended({str(i): Signal(hidden=states, head=h) for i, h in enumerate(heads)}, (0.5, 0.5), JSD().need)
        assert signal.head is not None and signal.hidden is not None
        mixture = sum(0.5 * head(states).softmax(-1) for head in heads)
        student = torch.randn(4, 5)
        batch = TokenBatch(torch.arange(4), torch.full((4,), -1.0), teacher_logits=signal.head(signal.hidden))
        expected = references.jsd(student / TAU, torch.as_tensor(mixture).log() / TAU, 0.5)
        loss = JSD(0.5, loss_temperature=TAU).loss(student, batch).loss
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: JSD(support="teacher_topk", top_k=3, loss_temperature=2), "tail=renormalise with teacher_topk"),
        (lambda: JSD(support="sampled", loss_temperature=2), "known at the sampling one"),
        (lambda: JSD(loss_temperature=0), "loss_temperature=0: expected a positive number"),
        (lambda: TopKForwardKL(3, math.inf), "loss_temperature=inf"),
        (lambda: ClassicKD(1.5), "alpha=1.5"),
        (lambda: ClassicKD(0.5, JSD(1)), "support=full or support=teacher_topk"),
        (lambda: ClassicKD(0.5, JSD(0, "student_topk", 3)), "support=student_topk"),
    ],
)
def test_what_cannot_be(make: Any, named: str):
    with pytest.raises(ConfigError, match=named):
        make()
