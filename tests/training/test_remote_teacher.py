"""A teacher behind the service trains a student exactly as the same teacher in this process does."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import anyio
import numpy as np
import pytest
import torch
from episodes import random_episode

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))  # the service that its own tests use

import tiny
from teacher_services import Running, llama, running, served

from models.causal_lm import CausalLM
from models.transformers_scorer import TransformersScorer
from models.types import Scorer, TeacherView
from training.distribution_losses import JSD, TopKForwardKL
from training.learner import Learner
from training.objectives import Objective, ReverseKL
from training.packing import TrainingItem

TEMPERATURE = 0.8
TEACHER = 5  # seed
SWAP = (3, 4)

OBJECTIVES: list[Objective] = [
    ReverseKL(discount=0.5),
    JSD(beta=0.5),
    JSD(beta=0.0, support="teacher_topk", top_k=5),
    JSD(beta=1.0, support="student_topk", top_k=5),
    JSD(beta=0.5, support="sampled"),
    JSD(beta=0.5, support="student_topk", top_k=5, tail="renormalise"),
    TopKForwardKL(5),
]


@cache
def teacher_lm() -> CausalLM:
    return llama(seed=TEACHER)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patch, running(served(teacher_lm())) as service:
        patch.setenv("PROTEGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield service


def items_of(scorer: Scorer, objective: Objective) -> list[TrainingItem]:
    generator = np.random.default_rng(3)
    episodes = [random_episode(generator, tiny.VOCAB, turns=1 + k % 3) for k in range(5)]
    views = []
    for k, episode in enumerate(episodes):
        own = np.flatnonzero(episode.sampled)
        views.append(TeacherView(episode.token_ids.astype(np.int64), own, own, SWAP if k == 2 else None))
    signals = anyio.run(scorer.score, views, objective.need)
    return [TrainingItem(episode, signal) for episode, signal in zip(episodes, signals, strict=True)]


def train(scorer: Scorer, objective: Objective) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of every token, and the student's whole gradient."""
    model = tiny.model(seed=1)
    learner = Learner(CausalLM(model), temperature=TEMPERATURE, token_budget=16, head_elements=7 * tiny.VOCAB)
    metrics = learner.forward_backward(items_of(scorer, objective), objective)
    losses = np.concatenate([found.values["loss"] for found in metrics])
    return torch.from_numpy(losses), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_loss_and_gradient_are_those_of_a_local_teacher(service: Running, objective: Objective):
    local = TransformersScorer("near", teacher_lm(), temperature=TEMPERATURE)
    loss, gradient = train(local, objective)
    for dtype, tolerance in (("float32", 2e-5), ("bfloat16", 0.03)):
        far_loss, far_gradient = train(service.scorer(TEMPERATURE, hidden_dtype=dtype), objective)
        assert (far_loss - loss).norm() <= tolerance * loss.norm()
        assert (far_gradient - gradient).norm() <= tolerance * gradient.norm()
    assert loss.norm() > 0.01 and gradient.norm() > 0


def test_bfloat16_states_are_not_more_exact_than_they_are(service: Running):
    """The tolerance above says something: rounded states do move the loss, by less than it and by more than float32."""
    loss, _ = train(TransformersScorer("near", teacher_lm(), temperature=TEMPERATURE), JSD(beta=0.5))
    moved = {}
    for dtype in ("float32", "bfloat16"):
        far, _ = train(service.scorer(TEMPERATURE, hidden_dtype=dtype), JSD(beta=0.5))
        moved[dtype] = ((far - loss).norm() / loss.norm()).item()
    assert moved["float32"] < 1e-5 < moved["bfloat16"] < 0.03


def test_two_teachers_in_one_batch_keep_their_heads_apart(service: Running):
    """The learner cuts its chunks where the head changes; a remote head is one object per teacher."""
    objective = JSD(beta=1.0)
    near, other = (TransformersScorer("t", lm, temperature=TEMPERATURE) for lm in (teacher_lm(), llama(seed=9)))
    far = service.scorer(TEMPERATURE, hidden_dtype="float32")
    results = []
    for first in (near, far):
        a, b = items_of(first, objective), items_of(other, objective)
        model = tiny.model(seed=1)
        mixed = [x for pair in zip(a, b, strict=True) for x in pair]
        Learner(CausalLM(model), temperature=TEMPERATURE, token_budget=64).forward_backward(mixed, objective)
        results.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(results[1], results[0], atol=1e-5 * results[0].abs().max().item(), rtol=0)
