"""Weights that lie elsewhere than what comes from the data, as on a GPU.

The other device is torch's `meta`: nothing is computed there, but operations that mix it with tensors of the host are
refused as CUDA refuses them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from episodes import random_episode, sampled_item
from test_learner import VOCAB, make_model
from test_span_objective import make_items
from torch import Tensor
from transformers import masking_utils

from models.causal_lm import CausalLM
from models.generation import SlotStepper
from models.transformers_sampler import draw
from models.types import Signal
from training.distribution_losses import JSD, ClassicKD, TopKForwardKL
from training.learner import Learner
from training.objectives import SFT, Objective, ReverseKL
from training.packing import TrainingItem, pack, token_weights

META = torch.device("meta")
HIDDEN, K = 6, 3


@pytest.fixture
def lm(monkeypatch: pytest.MonkeyPatch) -> CausalLM:
    # transformers reads positions back to see packed sequences, for a mask that is not built
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda positions: None)
    return CausalLM(make_model(dtype=torch.float32).to(META))


def head(hidden: Tensor) -> Tensor:
    return hidden.to(META) @ torch.ones(HIDDEN, VOCAB, device=META)


def items(kind: str) -> list[TrainingItem]:
    """Signals as scorers give them, on the host."""
    if kind == "spans":
        return make_items(make_model())
    generator, made = np.random.default_rng(0), []
    for turns in (1, 2, 3):
        item = sampled_item(episode := random_episode(generator, VOCAB, turns=turns), -torch.ones(episode.num_sampled))
        n = episode.num_sampled
        assert item.signal is not None
        signals = {
            "none": None,
            "sampled": item.signal,
            "topk": replace(item.signal, topk_ids=torch.arange(K).expand(n, K), topk_logprobs=-2 * torch.ones(n, K)),
            "full": Signal(hidden=torch.ones(n, HIDDEN), head=head, swap=(1, 2)),
        }
        made.append(replace(item, signal=signals[kind]))
    return made


CASES: Sequence[tuple[str, Objective]] = [
    ("none", SFT()),
    ("sampled", ReverseKL(advantage_clip=1.0)),
    ("sampled", JSD(support="sampled")),
    ("spans", ReverseKL()),
    ("topk", TopKForwardKL(K)),
    ("topk", JSD(beta=0.5, support="teacher_topk", top_k=K)),
    ("full", JSD()),
    ("full", JSD(support="student_topk", top_k=K)),
    ("full", ClassicKD()),
]


@pytest.mark.parametrize(
    ("kind", "objective"), CASES, ids=[f"{kind}-{type(objective).__name__}" for kind, objective in CASES]
)
def test_the_learner_brings_what_it_compares_to_one_device(lm: CausalLM, kind: str, objective: Objective):
    given = items(kind)
    learner = Learner(lm, token_budget=40, head_elements=4 * VOCAB)
    for batch in pack(given, token_weights(given, "token_mean"), learner.token_budget):
        metrics = learner._run_pack(batch, objective, train=True)
        assert {values.shape for values in metrics.values()} == {batch.ids.shape}
    assert all(p.grad is not None and p.grad.device == META for p in learner.parameters)


@torch.no_grad()
def test_generation_goes_on_where_the_weights_are(lm: CausalLM):
    stepper = SlotStepper(lm, slots=3)
    hidden = stepper.prefill([[1, 2, 3], [4, 5]])
    stepper.decode([6, 7])
    stepper.release(0)
    assert stepper.prefill([[1, 2, 3, 6, 8], [9]]).device == META == hidden.device  # the first goes on from a slot
    logits = lm.logits(stepper.decode([1, 2, 3]))
    ids, logprobs = draw(logits, torch.ones(3, device=META), torch.rand(3).to(META))
    assert ids.device == logprobs.device == META and ids.shape == logprobs.shape == (3,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_keys_are_kept_in_the_type_that_is_computed_in(dtype: torch.dtype):
    """Float32 weights under autocast: rotary embeddings give queries and keys in float32."""
    stepper: Any = SlotStepper(CausalLM(make_model(dtype=torch.float32), compute_dtype=dtype), slots=1)
    stepper.prefill([[1, 2, 3]])
    stepper.decode([4])
    assert {x.dtype for layer in stepper._cache._layers.values() for x in layer} == {dtype}
