"""Loading: every route to a model gives the weights in the files, and every bad one a usable error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from errors import ConfigError, ModelError
from models import loading
from models import sources as model_sources
from models.adapters import add_lora, check_base
from models.loading import load_config, load_model, load_tokenizer
from models.sources import ModelSource, check_source, source_fingerprint

CPU = torch.device("cpu")
VOCAB = 259
IDS = torch.arange(3, 40)[None]  # (1, 37)

CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    ),
    "qwen2": Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    ),
    "gpt2": GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=VOCAB - 1,
        eos_token_id=VOCAB - 1,
    ),
}


def byte_vocabulary() -> list[str]:
    return [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "<|im_start|>", "<|im_end|>"]


def make_folder(folder: Path, config=CONFIGS["llama"], seed: int = 0, tokenizer: bool = True) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(folder)
    if tokenizer:
        backend = Tokenizer(models.BPE({token: i for i, token in enumerate(byte_vocabulary())}, [("t", "h")]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>").save_pretrained(folder)
    return model


def load(name: object, checkpoint: object = None, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    source = ModelSource(str(name), None if checkpoint is None else str(checkpoint))
    return load_model(source, dtype=dtype, device=CPU, attn_implementation=None)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(IDS).logits


def tied_head(model) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def refusal(source: ModelSource, act=check_source) -> str:
    with pytest.raises(ModelError) as caught:
        act(source)
    return str(caught.value)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def write_weights(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# ---- what is loaded


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_folder_gives_its_weights_and_saves_as_a_plain_model(kind: str, tmp_path: Path):
    original = make_folder(tmp_path / "m", CONFIGS[kind])
    model = load(tmp_path / "m")
    assert torch.equal(logits(model), logits(original))
    assert not model.training and all(p.requires_grad for p in model.parameters())
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(original))


def test_loading_casts_to_the_dtype_and_takes_the_attention_asked_for(tmp_path: Path):
    make_folder(tmp_path)
    model = load_model(ModelSource(str(tmp_path)), dtype=torch.bfloat16, device=CPU, attn_implementation="eager")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"


def test_a_full_checkpoint_replaces_the_weights_and_keeps_the_tokenizer_of_the_name(tmp_path: Path):
    make_folder(tmp_path / "base")
    trained = make_folder(tmp_path / "step-3", seed=1, tokenizer=False)
    source = ModelSource(str(tmp_path / "base"), str(tmp_path / "step-3"))
    assert torch.equal(logits(load(*vars(source).values())), logits(trained))
    assert load_tokenizer(source).encode("hi") == load_tokenizer(ModelSource(source.name)).encode("hi")


def test_the_configuration_is_that_of_the_checkpoint(tmp_path: Path):
    make_folder(tmp_path / "base")
    shallow = LlamaConfig(**{**CONFIGS["llama"].to_dict(), "num_hidden_layers": 1})
    make_folder(tmp_path / "cut", shallow, tokenizer=False)
    assert load_config(ModelSource(str(tmp_path / "base"), str(tmp_path / "cut"))).num_hidden_layers == 1


def test_loading_prints_nothing_and_leaves_the_random_state_alone(tmp_path: Path, capfd):
    make_folder(tmp_path)
    capfd.readouterr()
    before = torch.get_rng_state()
    load(tmp_path)
    load_tokenizer(ModelSource(str(tmp_path)))
    loading.estimate_memory(CONFIGS["llama"], dtype=torch.float32, lora_rank=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert capfd.readouterr() == ("", "")


def test_a_tokenizer_round_trips_text(tmp_path: Path):
    make_folder(tmp_path)
    tokenizer = load_tokenizer(ModelSource(str(tmp_path)))
    assert tokenizer.decode(tokenizer.encode("2+2 = 4, né?")) == "2+2 = 4, né?"


# ---- LoRA


def trained_adapter(base: Path, folder: Path, rank: int = 4) -> torch.Tensor:
    """Saves an adapter that changes the model; returns the logits it gives."""
    model = add_lora(load(base), rank, seed=5)
    torch.manual_seed(9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5)
    model.save_pretrained(str(folder))
    return logits(model)


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_adapter_loads_merged_continued_and_with_plain_transformers(kind: str, tmp_path: Path):
    base, folder = tmp_path / "base", tmp_path / "adapter"
    original = make_folder(base, CONFIGS[kind])
    expected = trained_adapter(base, folder)
    assert (expected - logits(original)).abs().max() > 1e-2
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), expected)
    continued = add_lora(load(base), 4, adapter=str(folder))
    assert torch.equal(logits(continued), expected)
    assert all(p.requires_grad == ("lora_" in n) for n, p in continued.named_parameters())
    merged = load(base, folder)
    assert torch.allclose(logits(merged), expected, atol=1e-4)
    assert all(p.requires_grad for p in merged.parameters())
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(merged))


def test_a_new_adapter_starts_at_the_base_and_depends_on_its_seed_alone(tmp_path: Path):
    original = make_folder(tmp_path)

    def draw(seed: int, ambient: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(ambient)
        before = torch.get_rng_state()
        model = add_lora(load(tmp_path), 4, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(logits(model), logits(original))
        return {n: p.clone() for n, p in model.named_parameters() if "lora_A" in n}

    first, again, other = draw(0, 1), draw(0, 2), draw(1, 1)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not any(torch.equal(first[n], other[n]) for n in first)


def test_lora_covers_every_linear_layer_but_the_head_in_float32_without_dropout(tmp_path: Path):
    make_folder(tmp_path)
    model = add_lora(load(tmp_path, dtype=torch.bfloat16), 4, alpha=8)
    adapted = {n.split(".lora_A")[0].split(".")[-1] for n, _ in model.named_parameters() if "lora_A" in n}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert not any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in model.modules())
    assert vars(model.peft_config["default"])["lora_alpha"] == 8


def test_dropout_saved_with_an_adapter_is_not_taken_over(tmp_path: Path):
    make_folder(tmp_path / "base")
    trained_adapter(tmp_path / "base", tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_dropout": 0.5}))
    model = add_lora(load(tmp_path / "base"), 4, adapter=str(tmp_path / "a")).train()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, model(IDS).logits)


def test_adapters_that_do_not_fit_are_refused(tmp_path: Path):
    make_folder(tmp_path / "base")
    trained_adapter(tmp_path / "base", tmp_path / "a")
    adapter = str(tmp_path / "a")
    with pytest.raises(ModelError, match=r"rank 4 .* asked for rank 8; set lora_rank=4"):
        add_lora(load(tmp_path / "base"), 8, adapter=adapter)
    with pytest.raises(ModelError, match="alpha 3"):
        add_lora(load(tmp_path / "base"), 4, alpha=3, adapter=adapter)
    with pytest.raises(ConfigError, match="lora_rank=0"):
        add_lora(load(tmp_path / "base"), 0)
    base = CONFIGS["llama"].to_dict()
    make_folder(tmp_path / "shallow", LlamaConfig(**{**base, "num_hidden_layers": 1}))
    with pytest.raises(ModelError, match=r"made for another model .* has no place for .*layers\.1"):
        load(tmp_path / "shallow", adapter)
    make_folder(tmp_path / "wide", LlamaConfig(**{**base, "intermediate_size": 48}))
    with pytest.raises(ModelError, match="cannot load the adapter"):
        load(tmp_path / "wide", adapter)
    weights = load_file(tmp_path / "a" / "adapter_model.safetensors")
    weights.pop("base_model.model.model.layers.0.mlp.up_proj.lora_B.weight")
    save_file(weights, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"lacks .*layers\.0\.mlp\.up_proj\.lora_B"):
        load(tmp_path / "base", adapter)


def based_on(base: object, adapter: Path, copy: Path) -> str:
    """A copy of an adapter that says it was made for `base`."""
    shutil.copytree(adapter, copy)
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    return str(copy)


def test_an_adapter_of_other_weights_is_refused_though_its_shapes_fit(tmp_path: Path):
    for name, seed in (("base", 0), ("other", 1)):
        make_folder(tmp_path / name, seed=seed)
    trained_adapter(tmp_path / "base", tmp_path / "a")
    check_base(ModelSource(str(tmp_path / "base"), str(tmp_path / "a")))
    with pytest.raises(ModelError, match=f"made for {tmp_path}/base, whose weights are not those of {tmp_path}/other"):
        check_base(ModelSource(str(tmp_path / "other"), str(tmp_path / "a")))
    mended = based_on(tmp_path / "other", tmp_path / "a", tmp_path / "mended")
    check_base(ModelSource(str(tmp_path / "other"), mended))


def test_one_trained_matrix_makes_another_base_and_another_path_or_format_none(tmp_path: Path, caplog):
    make_folder(tmp_path / "base")
    trained_adapter(tmp_path / "base", tmp_path / "a")
    adapter = str(tmp_path / "a")
    copy = Path(shutil.copytree(tmp_path / "base", tmp_path / "copy"))
    (copy / "generation_config.json").write_text("{}")
    load(tmp_path / "base").save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    shutil.copy(tmp_path / "base" / "tokenizer.json", tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    load(tmp_path / "base", dtype=torch.bfloat16).save_pretrained(tmp_path / "elsewhere" / "base")
    shutil.copy(tmp_path / "base" / "tokenizer.json", tmp_path / "elsewhere" / "base")
    for same in (copy, tmp_path / "sharded", tmp_path / "elsewhere" / "base"):
        check_base(ModelSource(str(same), adapter))
    assert not caplog.records
    tensors = weights_of(copy)
    tensors["model.layers.1.mlp.up_proj.weight"] += 1e-3
    write_weights(copy, tensors)
    with pytest.raises(ModelError, match="whose weights are not those of"):
        check_base(ModelSource(str(copy), adapter))


@pytest.mark.parametrize(
    ("own", "warns"),
    [
        ("hub/base", False),
        ("/gone/base", False),
        ("base", False),
        ("", False),
        ("hub/another", True),
        ("other", True),
    ],
)
def test_a_base_that_is_not_here_is_known_by_its_name(own: str, warns: bool, tmp_path: Path, caplog):
    make_folder(tmp_path / "base")
    trained_adapter(tmp_path / "base", tmp_path / "a")
    adapter = based_on(own, tmp_path / "a", tmp_path / "b")
    check_base(ModelSource(str(tmp_path / "base"), adapter))
    assert [f"was made for {own}" in record.message for record in caplog.records] == [True] * warns


# ---- what is refused


def test_missing_weights_are_an_error_not_noise(tmp_path: Path):
    make_folder(tmp_path)
    tensors = weights_of(tmp_path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    write_weights(tmp_path, tensors)
    with pytest.raises(ModelError, match=r"lack 1 of .* model.layers.1.mlp.up_proj.weight"):
        load(tmp_path)


def test_weights_of_another_shape_are_named(tmp_path: Path):
    make_folder(tmp_path)
    tensors = weights_of(tmp_path)
    tensors["model.norm.weight"] = torch.ones(31)
    write_weights(tmp_path, tensors)
    with pytest.raises(ModelError, match=r"model.norm.weight: \[31\] in the file, expected \[32\]"):
        load(tmp_path)


def test_weights_that_are_not_used_are_logged(tmp_path: Path, caplog):
    make_folder(tmp_path)
    write_weights(tmp_path, weights_of(tmp_path) | {"model.layers.7.extra": torch.ones(2)})
    load(tmp_path)
    assert "1 weights in the files are not used, such as model.layers.7.extra" in caplog.text


@pytest.mark.parametrize("damage", [b"not safetensors at all", None])
def test_damaged_weights_are_refused_with_the_folder_and_the_cause(damage: bytes | None, tmp_path: Path):
    make_folder(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(damage if damage is not None else file.read_bytes()[:-1000])
    message = refusal(ModelSource(str(tmp_path)), lambda source: load(source.name))
    assert message.startswith(f"cannot load the weights of {tmp_path}: ") and "\n" not in message


def test_a_configuration_that_is_no_causal_language_model_is_refused(tmp_path: Path):
    make_folder(tmp_path)
    path = tmp_path / "config.json"
    for model_type, complaint in (("nosuchtype", "nosuchtype"), ("t5", "not a causal language model")):
        path.write_text(json.dumps({"model_type": model_type}))
        assert complaint in refusal(ModelSource(str(tmp_path)), load_config)
    path.write_text("{broken")
    assert "cannot load the configuration" in refusal(ModelSource(str(tmp_path)), load_config)


def test_a_folder_without_a_tokenizer_is_refused_with_what_was_looked_for(tmp_path: Path):
    make_folder(tmp_path, tokenizer=False)
    source = ModelSource(str(tmp_path))
    message = refusal(source)
    assert f"{tmp_path} has no tokenizer: looked for tokenizer.json" in message
    # transformers would make a tokenizer of three special tokens out of this, without a word
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    assert "has no tokenizer" in refusal(source, load_tokenizer)


def test_a_damaged_tokenizer_is_refused(tmp_path: Path):
    make_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Other"}}')
    assert f"cannot load the tokenizer of {tmp_path}" in refusal(ModelSource(str(tmp_path)), load_tokenizer)


@pytest.mark.parametrize("name", ["/no/where", "./nowhere", "~/no_such_model", "a/b/c", "model.gguf"])
def test_a_name_that_looks_like_a_path_is_never_taken_for_a_hub_id(name: str, monkeypatch):
    monkeypatch.setattr(model_sources, "HfApi", lambda: pytest.fail("asked the hub"))
    assert f"{name}: no such" in refusal(ModelSource(name))


def test_folders_that_are_no_model_say_what_they_are(tmp_path: Path):
    make_folder(tmp_path / "base")
    trained_adapter(tmp_path / "base", tmp_path / "run" / "step-2")
    base, run = str(tmp_path / "base"), str(tmp_path / "run")
    adapter = f"{run}/step-2"
    assert "contains step-2: name one of those" in refusal(ModelSource(base, run))
    assert f"is a PEFT adapter, not a model; give its base ({base})" in refusal(ModelSource(adapter))
    assert "no config.json" in refusal(ModelSource(str(tmp_path)))
    assert "no such checkpoint folder" in refusal(ModelSource(base, f"{run}/step-9"))
    assert "expected a model folder" in refusal(ModelSource(f"{base}/config.json"))
    (tmp_path / "base" / "model.safetensors").unlink()
    assert "has no weights" in refusal(ModelSource(base))
    (tmp_path / "fake.gguf").write_bytes(b"PK\3\4")
    assert "is not a GGUF file" in refusal(ModelSource(str(tmp_path / "fake.gguf")))


def test_a_checkpoint_of_another_family_is_refused(tmp_path: Path):
    make_folder(tmp_path / "llama")
    make_folder(tmp_path / "gpt2", CONFIGS["gpt2"])
    with pytest.raises(ModelError, match=r"has model_type gpt2, but .* has llama"):
        load(tmp_path / "llama", tmp_path / "gpt2")


def test_an_unreachable_hub_costs_one_request_and_points_to_a_local_folder(monkeypatch):
    asked = []

    class Hub:
        def model_info(self, name: str, timeout: float) -> None:
            asked.append(name)
            raise ConnectionError("Name or service not known")

    monkeypatch.setattr(model_sources, "HfApi", Hub)
    message = refusal(ModelSource("protege-tests/no-such-model"), load_tokenizer)
    assert "Name or service not known" in message and "give a local folder" in message
    assert asked == ["protege-tests/no-such-model"]


def test_an_unknown_attention_implementation_is_refused(tmp_path: Path):
    make_folder(tmp_path)
    with pytest.raises(ModelError, match="nosuchattention"):
        load_model(ModelSource(str(tmp_path)), dtype=torch.float32, device=CPU, attn_implementation="nosuchattention")


# ---- fingerprints and memory


def test_one_folder_has_one_fingerprint_by_any_route(tmp_path: Path, monkeypatch):
    make_folder(tmp_path / "m")
    (tmp_path / "link").symlink_to(tmp_path / "m")
    shutil.copytree(tmp_path / "m", tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    routes = [str(tmp_path / "m"), f"{tmp_path}/m/", "m", "./m", "link", "copy/../m", "copy"]
    assert len({source_fingerprint(ModelSource(route)) for route in routes}) == 1


@pytest.mark.parametrize("whole_file_bytes", [64 << 20, 0])
def test_different_checkpoints_have_different_fingerprints(whole_file_bytes: int, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(model_sources, "_WHOLE_FILE_BYTES", whole_file_bytes)
    monkeypatch.setattr(model_sources, "_STRIDE_BYTES", 8192)
    for seed in (0, 1):
        make_folder(tmp_path / f"m{seed}", seed=seed)
    trained_adapter(tmp_path / "m0", tmp_path / "a")
    m0, m1, adapter = str(tmp_path / "m0"), str(tmp_path / "m1"), str(tmp_path / "a")
    sources = [
        ModelSource(m0),
        ModelSource(m1),
        ModelSource(m0, m1),
        ModelSource(m1, m0),
        ModelSource(m0, adapter),
    ]
    assert len({source_fingerprint(source) for source in sources}) == len(sources)
    before = source_fingerprint(ModelSource(m0))
    make_folder(tmp_path / "m0", seed=2)
    assert source_fingerprint(ModelSource(m0)) != before


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("rank", [0, 4])
def test_memory_is_estimated_from_shapes_as_it_turns_out(kind: str, rank: int, tmp_path: Path):
    make_folder(tmp_path, CONFIGS[kind])
    model = load(tmp_path, dtype=torch.bfloat16)
    if rank:
        model = add_lora(model, rank)
    nbytes = {p: p.numel() * p.element_size() for p in model.parameters()}
    trained = sum(size for p, size in nbytes.items() if p.requires_grad)
    estimate = loading.estimate_memory(CONFIGS[kind], dtype=torch.bfloat16, lora_rank=rank)
    assert estimate == {
        "parameters": sum(nbytes.values()),
        "gradients": trained,
        "optimizer": 2 * trained,
        "total": sum(nbytes.values()) + 3 * trained,
    }


def test_a_teacher_needs_its_weights_only():
    estimate = loading.estimate_memory(CONFIGS["gpt2"], dtype=torch.float32, trained=False)
    assert estimate["total"] == estimate["parameters"] > 0


# ---- GGUF


def write_gguf(model: PreTrainedModel, path: Path, repeat_head: bool) -> None:
    """A float32 Llama file as llama.cpp's converter writes it; `repeat_head` stores the tied head twice."""
    gguf = pytest.importorskip("gguf", reason="writing a GGUF file needs the gguf package")
    config, heads = model.config, model.config.num_attention_heads
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(byte_vocabulary())
    writer.add_token_types([gguf.TokenType.NORMAL] * (VOCAB - 2) + [gguf.TokenType.CONTROL] * 2)
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(VOCAB - 2)
    writer.add_eos_token_id(VOCAB - 1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and not repeat_head:
            continue
        array = tensor.float().numpy()
        for projection, count in (("q_proj", heads), ("k_proj", config.num_key_value_heads)):
            if projection in key:  # llama.cpp interleaves the two rotary halves
                halves = array.reshape(count, 2, array.shape[0] // count // 2, array.shape[1])
                array = halves.swapaxes(1, 2).reshape(array.shape)
        stem, suffix = key.rsplit(".", 1)
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("repeat_head", [False, True])
def test_a_gguf_file_loads_tied_quiet_and_saves_as_a_plain_model(repeat_head: bool, tmp_path: Path, capfd):
    tied = LlamaConfig(**{**CONFIGS["llama"].to_dict(), "tie_word_embeddings": True})
    original = make_folder(tmp_path / "m", tied)
    write_gguf(original, tmp_path / "model.gguf", repeat_head)
    source = ModelSource(str(tmp_path / "model.gguf"))
    capfd.readouterr()
    model = load(source.name)
    tokenizer = load_tokenizer(source)
    assert capfd.readouterr() == ("", "")
    assert torch.allclose(logits(model), logits(original), atol=1e-6)
    assert load_config(source).num_hidden_layers == tied.num_hidden_layers
    assert tied_head(model)
    assert tokenizer.decode(tokenizer.encode("2+2 = 4")) == "2+2 = 4"
    model.save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(saved), logits(model))
    assert saved.config.tie_word_embeddings and not hasattr(saved.config, "quantization_config")
    assert "lm_head.weight" not in weights_of(tmp_path / "saved")


def test_a_gguf_head_of_its_own_stays_untied(tmp_path: Path):
    original = make_folder(tmp_path / "m")
    write_gguf(original, tmp_path / "model.gguf", repeat_head=True)
    model = load(tmp_path / "model.gguf")
    assert torch.allclose(logits(model), logits(original), atol=1e-6)
    assert not tied_head(model)
