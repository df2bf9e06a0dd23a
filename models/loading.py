"""From a name to a tokenizer, a configuration or a model, or to an error the user can act on.

Stricter than transformers where its silence costs a run: weights that are missing from the files, which it
fills with noise and a warning, are an error here, and so is an empty tokenizer.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import transformers
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from errors import ModelError
from models.adapters import attach_adapter, lora_config
from models.sources import (
    VOCABULARY_FILES,
    ModelSource,
    check_source,
    explained,
    is_adapter,
    read_config,
    some,
    where_from,
)

_log = logging.getLogger(__name__)


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The tokenizer of `source.name`, with its chat template if it has one. Raises ModelError."""
    check_source(source, weights=False)  # of a teacher on a server there may be the tokenizer alone
    where, gguf = where_from(source.name)
    with explained("tokenizer", source.name):
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False, **gguf)
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ModelError(
            f"{source.name} has no tokenizer: its vocabulary is empty. Looked for "
            f"{', '.join(VOCABULARY_FILES)}; save the tokenizer there with save_pretrained"
        )
    return tokenizer


def load_config(source: ModelSource) -> PreTrainedConfig:
    """The configuration of the model that `load_model` would load. Raises ModelError."""
    check_source(source)
    if source.checkpoint is not None and not is_adapter(source.checkpoint):
        return read_config(source.checkpoint)
    return read_config(source.name)


def load_model(
    source: ModelSource, *, dtype: torch.dtype, device: torch.device, attn_implementation: str | None
) -> PreTrainedModel:
    """The model in eval mode on `device`, every weight read from the files, all of them trainable.

    A full checkpoint is loaded in place of `source.name`'s weights; an adapter is merged into them. To
    go on training an adapter, load the bare name and give the folder to `add_lora`. Raises ModelError.
    """
    check_source(source)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of this thread, which is going to compute: kernels in Triton run on that one
    if source.checkpoint is None:
        return _load_weights(source.name, dtype, device, attn_implementation)
    if not is_adapter(source.checkpoint):
        _check_same_family(source.name, source.checkpoint)
        return _load_weights(source.checkpoint, dtype, device, attn_implementation)
    model = _load_weights(source.name, dtype, device, attn_implementation)
    merged: Any = attach_adapter(model, source.checkpoint)
    with explained("adapter", source.checkpoint):
        model = merged.merge_and_unload()
    model.requires_grad_(True)  # PEFT froze the base; full fine-tuning may start from the merged weights
    return model


def estimate_memory(
    config: PreTrainedConfig, *, dtype: torch.dtype, lora_rank: int = 0, trained: bool = True
) -> dict[str, float]:
    """Bytes of weights, gradients and AdamW's two moments, from shapes alone; activations not included.

    `trained=False` is a teacher. Gradients and moments take the dtype of the weights they belong to.
    """
    name = config.name_or_path or config.model_type
    with explained("architecture", name), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        if trained and lora_rank > 0:
            model = get_peft_model(model, lora_config(model, lora_rank, None), low_cpu_mem_usage=True)
    weights = float(sum(p.numel() * p.element_size() for p in model.parameters()))
    gradients = float(sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad))
    if not trained:
        gradients = 0.0
    parts = {"parameters": weights, "gradients": gradients, "optimizer": 2 * gradients}
    return parts | {"total": sum(parts.values())}


# ---- weights


def _check_same_family(name: str, checkpoint: str) -> None:
    """The tokenizer comes from `name`, so a checkpoint of another model would train on nonsense."""
    base, over = read_config(name).get_text_config(), read_config(checkpoint).get_text_config()
    for key in ("model_type", "vocab_size"):
        if getattr(base, key) != getattr(over, key):
            raise ModelError(
                f"checkpoint {checkpoint} has {key} {getattr(over, key)}, but {name} has "
                f"{getattr(base, key)}; give the model that the checkpoint was trained from"
            )


def _load_weights(
    name: str, dtype: torch.dtype, device: torch.device, attn_implementation: str | None
) -> PreTrainedModel:
    config = read_config(name)  # refuses what is no causal language model before any weight is read
    where, gguf = where_from(name)
    options: dict[str, Any] = dict(gguf)
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if gguf and hasattr(transformers, "GgufConfig"):  # older releases always dequantise
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    elif device.type != "cpu":
        options["device_map"] = {"": device}  # straight to the device, without a copy in host memory
    with explained("weights", name):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            where,
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name; transformers' error names nothing
            **options,
        )
        model, info = loaded
        model = model.to(device)
    _check_loaded(name, info)
    if gguf:
        _forget_quantisation(model)
        _retie(model)
    return model.eval()


def _check_loaded(name: str, info: dict) -> None:
    if info["mismatched_keys"]:
        key, found, expected = min(info["mismatched_keys"])
        raise ModelError(
            f"{name}: {len(info['mismatched_keys'])} weights have another shape than config.json says, such "
            f"as {key}: {list(found)} in the file, expected {list(expected)}"
        )
    if info["missing_keys"]:
        raise ModelError(
            f"{name}: the files lack {len(info['missing_keys'])} of the model's weights, such as "
            f"{some(info['missing_keys'])}; the folder is incomplete, or its config.json is another model's"
        )
    if info["unexpected_keys"]:
        unused = info["unexpected_keys"]
        _log.warning("%s: %d weights in the files are not used, such as %s", name, len(unused), some(unused))


def _forget_quantisation(model: PreTrainedModel) -> None:
    """A dequantised model must not say it is quantised: save_pretrained would refuse, or write it down."""
    for mark in ("hf_quantizer", "quantization_method"):
        model.__dict__.pop(mark, None)
    model.__dict__["is_quantized"] = False
    model.config.__dict__.pop("quantization_config", None)


def _retie(model: PreTrainedModel) -> None:
    """GGUF files may repeat a tied embedding as the head; one matrix trained as two is another model."""
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    if head is None or head.weight is embedding.weight or not torch.equal(head.weight, embedding.weight):
        return
    model.config.get_text_config().tie_word_embeddings = True
    model.config.tie_word_embeddings = True
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    model.tie_weights()
