"""LoRA adapters: new ones that train, saved ones that are gone on from, and frozen ones beside them on one base."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import safe_open
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from errors import ConfigError, ModelError
from models.sources import ModelSource, check_checkpoint, explained, is_adapter, read_config, some, where_from

_log = logging.getLogger(__name__)

DEFAULT_LORA_ALPHA = 32.0  # constant in the rank, so that one learning rate serves all ranks (Tinker's choice)


def add_lora(
    model: PreTrainedModel, rank: int, alpha: float | None = None, adapter: str | None = None, seed: int = 0
) -> PeftModel:
    """Wraps `model` (in place) with float32 LoRA on every linear layer but the head, without dropout.

    A new adapter depends on `seed` only and leaves the global generator alone; `adapter` goes on from a
    saved one, whose rank (and alpha, where given) must agree. Raises ModelError, ConfigError.
    """
    if rank < 1:
        raise ConfigError(f"lora_rank={rank}: expected at least 1 (0 means full fine-tuning, without LoRA)")
    if adapter is not None:
        check_checkpoint(adapter)
        saved = read_adapter_config(adapter)
        if saved.r != rank or (alpha is not None and saved.lora_alpha != alpha):
            wanted = f"rank {rank}" if alpha is None else f"rank {rank} and alpha {alpha}"
            raise ModelError(
                f"{adapter} has rank {saved.r} and alpha {saved.lora_alpha}, asked for {wanted}; "
                f"set lora_rank={saved.r} or start a new adapter"
            )
        return attach_adapter(model, adapter, trainable=True)
    with torch.random.fork_rng(devices=[]), explained("LoRA layers", model.name_or_path or "the model"):
        torch.manual_seed(seed)  # PEFT draws on the CPU, whatever device the model is on
        return get_peft_model(model, lora_config(model, rank, alpha))  # type: ignore[return-value]


def attach_adapter(
    model: PreTrainedModel | PeftModel, folder: str, name: str = "default", *, trainable: bool = False
) -> PeftModel:
    """The model with a saved LoRA adapter on it (in place) under `name`; one that it has already stays active.

    Raises ModelError if the adapter was made for another model, or adapts the head and should be trained."""
    config, path = read_adapter_config(folder), str(Path(folder).expanduser())
    with torch.random.fork_rng(devices=[]), explained("adapter", folder):
        saved = load_peft_weights(path, device="cpu")
        if isinstance(model, PeftModel):
            wrapped = model
            add_frozen_adapter(model, config, saved, name)
        else:
            wrapped = PeftModel.from_pretrained(
                model, path, adapter_name=name, is_trainable=trainable, config=config, torch_device="cpu"
            )  # not where PEFT would have it: on the first GPU, whichever the model is on
        expected = get_peft_model_state_dict(wrapped, adapter_name=name, save_embedding_layers=False)
    # PEFT only warns about missing keys and says nothing of surplus ones.
    missing = expected.keys() - saved.keys()
    surplus = {key for key in saved.keys() - expected.keys() if "lora_" in key}
    if missing or surplus:
        raise ModelError(
            f"adapter {folder} was made for another model than {model.name_or_path}: "
            + (f"it lacks {some(missing)}" if missing else f"the model has no place for {some(surplus)}")
        )
    base: Any = wrapped.get_base_model()
    head = base.get_output_embeddings()
    if trainable and isinstance(head, BaseTunerLayer | ModulesToSaveWrapper):
        raise ModelError(f"adapter {folder} adapts the output head, which is not supported; merge it first")
    return wrapped


def add_frozen_adapter(model: PeftModel, config: LoraConfig, weights: Mapping[str, Tensor], name: str) -> None:
    """One more adapter beside those that `model` has; what is active and what is trained stays as it is."""
    trained = {parameter_name for parameter_name, p in model.named_parameters() if p.requires_grad}
    config.inference_mode = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # PEFT draws weights that are overwritten at once
        model.add_adapter(name, config)
    set_peft_model_state_dict(model, dict(weights), adapter_name=name)
    for parameter_name, parameter in model.named_parameters():  # releases of PEFT differ in what they freeze here
        parameter.requires_grad_(parameter_name in trained)


def add_twin(model: PeftModel, name: str) -> None:
    """A frozen copy of the active adapter beside it."""
    active = str(model.active_adapter)
    weights = get_peft_model_state_dict(model, adapter_name=active, save_embedding_layers=False)
    config: Any = copy.deepcopy(model.peft_config[active])
    add_frozen_adapter(model, config, {key: tensor.clone() for key, tensor in weights.items()}, name)


def adapter_bytes(source: ModelSource) -> int | None:
    """Size in float32 of a checkpoint that can be switched on and off on its base; None for any other.

    That is a LoRA adapter of layers within the trunk, in safetensors. One that adapts the head, brings trained
    embeddings, or is of another kind, is merged into a copy of its base instead.
    """
    if source.checkpoint is None or not is_adapter(source.checkpoint):
        return None
    config = read_adapter_config(source.checkpoint)
    file = Path(source.checkpoint).expanduser() / "adapter_model.safetensors"
    if config.bias != "none" or not file.is_file():
        return None
    base: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(read_config(source.name))]
    inside = f"base_model.model.{base.base_model_prefix}."
    with explained("adapter", source.checkpoint), safe_open(file, framework="pt") as tensors:
        shapes = {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118 (no mapping)
    plain = all(key.startswith(inside) and key.endswith(("lora_A.weight", "lora_B.weight")) for key in shapes)
    return 4 * sum(math.prod(shape) for shape in shapes.values()) if plain else None


# ---- the base that an adapter was made for


def check_base(source: ModelSource) -> None:
    """Compares an adapter's own base, as its configuration names it, with the model that it is to lie on.

    Raises ModelError if both are folders here and their weights differ, for only shapes would tell later. Where that
    cannot be seen, another name is a warning: a hub id may well be a folder."""
    if source.checkpoint is None or not is_adapter(source.checkpoint):
        return
    own, given = read_adapter_config(source.checkpoint).base_model_name_or_path, where_from(source.name)[0]
    if not own or own == given:
        return
    same = None
    if Path(own).is_absolute():  # a relative one began elsewhere
        same = _same_weights(Path(own), Path(given).expanduser())
    if same is False:
        raise ModelError(
            f"adapter {source.checkpoint} was made for {own}, whose weights are not those of {source.name}: give that "
            "model. If the adapter is meant for this one all the same, say so in its adapter_config.json, "
            "base_model_name_or_path"
        )
    if same is None and Path(own).name != Path(given).name:
        _log.warning(
            "adapter %s was made for %s; it was not checked that %s is the same", source.checkpoint, own, given
        )


def _same_weights(one: Path, other: Path) -> bool | None:
    """By the first row of every tensor; None if there is nothing to compare, as between number types."""
    compared = False
    with ExitStack() as stack:
        ours, theirs = (_tensors(folder, stack) for folder in (one, other))
        for name in ours.keys() & theirs.keys():
            a, b = (file[name].get_slice(name) for file in (ours, theirs))
            if a.get_shape() != b.get_shape():
                return False
            if a.get_dtype() == b.get_dtype() and a.get_shape():
                compared = True
                if not torch.equal(a[:1], b[:1]):
                    return False
    return True if compared else None


def _tensors(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """By the name of each tensor in a folder's safetensors, the open file that has it."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else []:
        with explained("weights", str(folder)):
            file = stack.enter_context(safe_open(path, framework="pt"))
            found |= dict.fromkeys(file.keys(), file)
    return found


def lora_config(model: PreTrainedModel, rank: int, alpha: float | None) -> LoraConfig:
    return LoraConfig(
        r=rank,
        lora_alpha=DEFAULT_LORA_ALPHA if alpha is None else alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        bias="none",
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2's layers
    )


def read_adapter_config(folder: str) -> LoraConfig:
    with explained("adapter configuration", folder):
        config = PeftConfig.from_pretrained(str(Path(folder).expanduser()))
    if not isinstance(config, LoraConfig):
        raise ModelError(f"{folder} is a {config.peft_type} adapter; only LoRA adapters are supported")
    config.lora_dropout = 0.0  # the sampler, the teacher and the learner must see one and the same policy
    return config
