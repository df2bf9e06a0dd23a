"""Trunk and head together are the model: for every architecture, packed or padded, at any length."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, CohereConfig, GraniteConfig, Llama4TextConfig, PhimoeConfig

from errors import ModelError
from models import attention
from models.causal_lm import CausalLM

BEYOND_WINDOW = [*tiny.prompts(4, shortest=1, longest=3 * tiny.WINDOW, seed=5), list(range(1, 30))]


def packed_logprobs(lm: CausalLM, sequences: list[list[int]]) -> Tensor:
    with torch.no_grad():
        return lm.logits(lm.hidden([torch.tensor(ids) for ids in sequences])).log_softmax(-1)


def plain(model: Any, sequences: list[list[int]]) -> Tensor:
    return torch.cat([tiny.plain_logits(model, ids).log_softmax(-1) for ids in sequences])


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_every_architecture_equals_its_plain_forward(architecture: str):
    expected = plain(tiny.model(architecture, attn="eager"), BEYOND_WINDOW)
    model = tiny.model(architecture)
    lm = CausalLM.verified(model)
    assert lm.packed == (architecture in tiny.PACKED)
    torch.testing.assert_close(packed_logprobs(lm, BEYOND_WINDOW), expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(plain(model, BEYOND_WINDOW), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_together_is_the_same_as_separately(architecture: str):
    lm = CausalLM.verified(tiny.model(architecture))
    separately = torch.cat([packed_logprobs(lm, [ids]) for ids in BEYOND_WINDOW])
    torch.testing.assert_close(packed_logprobs(lm, BEYOND_WINDOW), separately, atol=1e-3, rtol=0)


def test_the_window_matters_in_these_tests():
    """Else the tests above would pass for a model whose window is ignored."""
    windowed, full = tiny.model("mistral"), tiny.model("mistral")
    full.config.sliding_window = None
    lm = CausalLM(full)
    assert (packed_logprobs(lm, BEYOND_WINDOW) - plain(windowed, BEYOND_WINDOW)).abs().max() > 0.1


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2"])
def test_gradients_are_those_of_the_plain_forward(architecture: str):
    sequences = [list(range(1, 12)), list(range(20, 27))]
    model = tiny.model(architecture)
    lm = CausalLM.verified(model)

    def gradients(logprobs: Tensor) -> list[Tensor]:
        chosen = logprobs[torch.arange(len(logprobs)), torch.arange(len(logprobs)) % tiny.VOCAB]
        return list(torch.autograd.grad(chosen.sum(), list(model.parameters())))

    logits = [model(input_ids=torch.tensor([ids]), use_cache=False).logits[0] for ids in sequences]
    expected = gradients(torch.cat(logits).log_softmax(-1))
    got = gradients(lm.logits(lm.hidden([torch.tensor(ids) for ids in sequences])).log_softmax(-1))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def from_config(config: Any, attn: str = attention.NAME) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, attn_implementation=attn).eval()


@pytest.mark.parametrize(
    "config",
    [
        GraniteConfig(**tiny.TRANSFORMER, logits_scaling=0.1, attention_multiplier=0.5),
        CohereConfig(**tiny.TRANSFORMER, logit_scale=5.0),
    ],
    ids=["granite", "cohere"],
)
def test_heads_that_scale(config: Any):
    model = from_config(config)
    lm = CausalLM.verified(model)
    assert lm.head_scale != 1.0
    torch.testing.assert_close(packed_logprobs(lm, BEYOND_WINDOW), plain(model, BEYOND_WINDOW), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "config",
    [
        PhimoeConfig(**tiny.TRANSFORMER, num_local_experts=2, num_experts_per_tok=1, sliding_window=20),
        Llama4TextConfig(
            **tiny.TRANSFORMER,
            intermediate_size_mlp=48,
            num_local_experts=2,
            attention_chunk_size=20,
            no_rope_layers=[1, 1],
        ),
    ],
    ids=["phimoe", "llama4"],
)
def test_a_window_that_only_the_mask_knows_means_padding(config: Any):
    """Both are longer than the probes, so that no comparison of numbers could tell."""
    model = from_config(config)
    lm = CausalLM.verified(model)
    assert not lm.packed
    torch.testing.assert_close(packed_logprobs(lm, BEYOND_WINDOW), plain(model, BEYOND_WINDOW), atol=1e-3, rtol=0)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_a_head_that_is_not_plain_is_refused(architecture: str, monkeypatch: pytest.MonkeyPatch):
    model = tiny.model(architecture)
    forward = model.forward

    def biased(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = out.logits + torch.linspace(0, 1, tiny.VOCAB)
        return out

    monkeypatch.setattr(model, "forward", biased)
    with pytest.raises(ModelError, match="head is not a plain linear layer"):
        CausalLM.verified(model)


def test_a_model_whose_numbers_are_not_numbers_is_refused():
    model = tiny.model()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(ModelError, match="nan"):
        CausalLM.verified(model)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt2", "gemma2"])
def test_bfloat16_compute(architecture: str):
    model = tiny.model(architecture, scale=2.0)
    exact = plain(tiny.model(architecture, scale=2.0, attn="eager"), BEYOND_WINDOW)
    lm = CausalLM.verified(model, compute_dtype=torch.bfloat16)
    assert lm.packed == (architecture in tiny.PACKED)
    got = packed_logprobs(lm, BEYOND_WINDOW)
    assert got.dtype == torch.float32
    assert 1e-6 < (got - exact).abs().max() < 0.1, "computed in bfloat16, and close"


def test_bfloat16_weights():
    model = tiny.model(scale=2.0).to(torch.bfloat16)
    lm = CausalLM.verified(model, compute_dtype=torch.bfloat16)
    assert lm.packed
    assert (packed_logprobs(lm, BEYOND_WINDOW) - plain(model, BEYOND_WINDOW)).abs().max() < 0.1


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_an_adapter_can_be_switched_off(architecture: str):
    base = plain(tiny.model(architecture, attn="eager"), BEYOND_WINDOW)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    lm = CausalLM.verified(get_peft_model(tiny.model(architecture), config))  # type: ignore[arg-type]
    assert lm.packed == (architecture in tiny.PACKED)
    adapted = plain(lm.model, BEYOND_WINDOW)
    without = lm.with_adapter(None)
    for _ in range(2):
        torch.testing.assert_close(packed_logprobs(without, BEYOND_WINDOW), base, atol=1e-4, rtol=0)
        torch.testing.assert_close(packed_logprobs(lm, BEYOND_WINDOW), adapted, atol=1e-4, rtol=0)
    assert (adapted - base).abs().max() > 0.1
