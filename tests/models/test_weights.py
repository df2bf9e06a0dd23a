"""What a learner hands to engines that keep a copy: a folder that computes the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from models.adapters import add_lora, add_twin, attach_adapter
from models.causal_lm import CausalLM
from models.weights import LMWeights

IDS = [5, 9, 2, 44, 17, 3]


def with_lora(model: torch.nn.Module) -> CausalLM:
    lm = CausalLM.verified(model)  # type: ignore[arg-type]
    lm.model = add_lora(lm.model, 4)  # type: ignore[assignment]
    for name, weight in lm.model.named_parameters():
        if "lora_B" in name:  # zero in a new adapter, which then changes nothing
            torch.nn.init.normal_(weight, std=0.2)
    return lm


def loaded(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_its_logprobs_are_those_of_a_plain_forward(temperature: float):
    model = tiny.model("qwen3")
    found = LMWeights(CausalLM.verified(model)).logprobs(IDS, temperature)
    expected = tiny.plain_logprobs(model, IDS[:1], IDS[1:], temperature)
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_is_the_model(tmp_path: Path, tied: bool):
    model = tiny.model("llama", tie_word_embeddings=tied)
    LMWeights(CausalLM.verified(model)).save(tmp_path)
    torch.testing.assert_close(tiny.plain_logits(loaded(tmp_path), IDS), tiny.plain_logits(model, IDS))


def test_an_adapter_is_merged_in_and_the_base_keeps_its_bits(tmp_path: Path):
    lm = with_lora(tiny.model("llama"))
    before = {name: weight.clone() for name, weight in lm.model.named_parameters()}
    weights = LMWeights(lm)
    assert weights.has_adapter
    weights.save(tmp_path / "merged")
    expected = torch.tensor(weights.logprobs(IDS, 1.0))
    merged = tiny.plain_logprobs(loaded(tmp_path / "merged"), IDS[:1], IDS[1:])
    torch.testing.assert_close(merged, expected, atol=1e-4, rtol=0)
    plain = torch.tensor(LMWeights(lm.with_adapter(None)).logprobs(IDS, 1.0))
    assert (plain - expected).abs().max() > 0.1, "the adapter must matter"
    assert all(torch.equal(weight, before[name]) for name, weight in lm.model.named_parameters())


def test_the_adapter_alone_on_the_base(tmp_path: Path):
    lm = with_lora(tiny.model("llama"))
    LMWeights(lm).save_adapter(tmp_path)
    again = PeftModel.from_pretrained(tiny.model("llama"), tmp_path).eval()
    expected = torch.tensor(LMWeights(lm).logprobs(IDS, 1.0))
    torch.testing.assert_close(tiny.plain_logprobs(again, IDS[:1], IDS[1:]), expected, atol=1e-4, rtol=0)


def test_teachers_on_the_same_base_are_left_out(tmp_path: Path):
    lm, alone = with_lora(tiny.model("llama")), with_lora(tiny.model("llama"))
    lm.model.load_state_dict(alone.model.state_dict())
    add_twin(lm.model, "ema")  # type: ignore[arg-type]
    everywhere = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False)
    get_peft_model(tiny.model("llama"), everywhere).save_pretrained(tmp_path / "teacher", save_embedding_layers=False)
    attach_adapter(lm.model, str(tmp_path / "teacher"), "teacher0")
    for name, expected in (("one", alone), ("shared", lm)):
        LMWeights(expected).save_adapter(tmp_path / name)
        LMWeights(expected).save(tmp_path / f"{name}-merged")
    for kind in ("adapter_model", "model"):
        folders = [tmp_path / (name if kind == "adapter_model" else f"{name}-merged") for name in ("one", "shared")]
        one, shared = (load_file(folder / f"{kind}.safetensors") for folder in folders)
        assert one.keys() == shared.keys() and all(torch.equal(one[name], shared[name]) for name in one)
    assert [path.name for path in (tmp_path / "shared").iterdir() if path.is_dir()] == []


def test_an_engine_in_bfloat16_gets_half_the_bytes(tmp_path: Path):
    model = tiny.model("llama")
    LMWeights(CausalLM(model)).save(tmp_path / "full")
    LMWeights(CausalLM(model, compute_dtype=torch.bfloat16)).save(tmp_path / "half")
    full, half = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("full", "half"))
    assert half < 0.6 * full
    assert all(weight.dtype == torch.float32 for weight in model.parameters())


@pytest.mark.parametrize("kind", ["tied", "untied", "adapter", "bfloat16", "experts", "a teacher's adapter"])
def test_tensors_are_what_a_folder_would_hold(tmp_path: Path, kind: str):
    """Names, types, shapes and bits: what an engine reads does not depend on the way that it took."""
    model = tiny.model("llama", tie_word_embeddings=kind == "tied")
    if kind == "experts":
        sizes = {"vocab_size": tiny.VOCAB, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1}
        model = MixtralForCausalLM(MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).eval()
    lm = with_lora(model) if "adapter" in kind else CausalLM(model)
    if kind == "bfloat16":
        lm.compute_dtype = torch.bfloat16
    if kind == "a teacher's adapter":
        lm = lm.with_adapter(None)
    weights = LMWeights(lm)
    weights.save(tmp_path)
    saved, sent = load_file(tmp_path / "model.safetensors"), weights.tensors()
    assert sent.keys() == saved.keys()
    for name, tensor in sent.items():
        assert tensor.dtype == saved[name].dtype == lm.compute_dtype
        assert torch.equal(tensor, saved[name]), name
    assert ("lm_head.weight" in sent) == (kind != "tied")
    if kind == "experts":
        assert any("experts.0" in name for name in sent), "fused in memory, and not on a disk"


def test_a_teacher_on_the_students_base_is_written_with_its_own_adapter(tmp_path: Path):
    """And not with the one that the student trains."""
    lm = with_lora(tiny.model("llama"))
    base = lm.with_adapter(None)
    LMWeights(base).save(tmp_path)
    expected = torch.tensor(LMWeights(base).logprobs(IDS, 1.0))
    found = tiny.plain_logprobs(loaded(tmp_path), IDS[:1], IDS[1:])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (expected - torch.tensor(LMWeights(lm).logprobs(IDS, 1.0))).abs().max() > 0.1
