"""What a learner offers to engines that keep a copy of its weights: files, and numbers to check the copy against."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from models.causal_lm import CausalLM


class LMWeights:
    """`WeightSource` on a `CausalLM` that trains in this process."""

    def __init__(self, lm: CausalLM) -> None:
        self._lm = lm

    @property
    def has_adapter(self) -> bool:
        return hasattr(self._lm.model, "peft_config")

    @property
    def _bare(self) -> Any:
        """Without PEFT around it."""
        model: Any = self._lm.model
        return model.get_base_model() if self.has_adapter else model

    def save(self, folder: Path) -> None:
        self._save(folder, merged=True)

    def save_base(self, folder: Path) -> None:
        self._save(folder, merged=False)

    def save_adapter(self, folder: Path) -> None:
        model: Any = self._lm.model
        # Else PEFT asks the hub whether the vocabulary has changed, and saves the adapters of teachers on this base.
        model.save_pretrained(folder, save_embedding_layers=False, selected_adapters=[model.active_adapter])

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        model, state = self._bare, self._state(merged=True)
        # As `save_pretrained` does: experts that are fused in memory have names of their own on a disk.
        return revert_weight_conversion(model, remove_tied_weights_from_state_dict(state, model))

    @torch.no_grad()
    def logprobs(self, token_ids: Sequence[int], temperature: float) -> list[float]:
        ids = torch.tensor(list(token_ids))
        logits = self._lm.logits(self._lm.hidden([ids])[:-1]) / temperature  # [T-1, v]
        return logits.log_softmax(-1).gather(1, ids[1:, None].to(logits.device))[:, 0].tolist()

    @torch.no_grad()
    def _save(self, folder: Path, *, merged: bool) -> None:
        self._bare.save_pretrained(folder, state_dict=self._state(merged=merged))

    def _state(self, *, merged: bool) -> dict[str, Tensor]:
        with self._lm.reading_with_its_adapters():  # a teacher's may be others than the student's on the same base
            return self._state_of(self._bare, merged)

    def _state_of(self, model: Any, merged: bool) -> dict[str, Tensor]:
        """By the names of the model without its adapter, each tensor once however many names it has."""
        adapted = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
        state: dict[str, Tensor] = {}
        seen: set[tuple[int, torch.Size]] = set()
        for name, tensor in model.state_dict().items():
            if ".lora_" in name or (place := (tensor.data_ptr(), tensor.shape)) in seen:
                continue
            seen.add(place)
            module, base, leaf = name.rpartition(".base_layer.")
            if merged and base and leaf == "weight":
                layer = adapted[module]
                for adapter in set(layer.active_adapters) & set(layer.lora_A):  # a teacher's may have a layer to itself
                    tensor = tensor.float() + layer.get_delta_weight(adapter).float()  # type: ignore[operator]
            # What is computed with: an engine has no use for the digits that only the optimizer sees.
            state[f"{module}.{leaf}" if base else name] = tensor.detach().to(self._lm.compute_dtype)
        return state
