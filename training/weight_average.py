"""A teacher that is the student's own moving average, and follows it step by step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from errors import CheckpointError
from models.adapters import add_twin
from models.causal_lm import CausalLM

ADAPTER = "ema"
FILE = Path("trainer_state", "average.safetensors")


class WeightAverage:
    """`average = decay * average + (1 - decay) * weights`, for every trained weight, by name."""

    def __init__(self, weights: Mapping[str, Tensor], average: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self._average = dict(average)
        self._weights = [weights[name] for name in self._average]

    @torch.no_grad()
    def update(self) -> None:
        for average, weight in zip(self._average.values(), self._weights, strict=True):
            average.lerp_(weight, 1 - self.decay)

    def save(self, folder: Path) -> None:
        save_file({name: tensor.contiguous() for name, tensor in self._average.items()}, folder / FILE)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """What `save` wrote. Raises `CheckpointError`."""
        try:
            saved = load_file(folder / FILE)
            if saved.keys() != self._average.keys():
                raise ValueError(f"it has {len(saved)} weights, expected {len(self._average)}")
            for name, tensor in self._average.items():
                tensor.copy_(saved[name])
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"{folder}: the student's average cannot be read: {error}") from error


def average_of(student: CausalLM, decay: float) -> tuple[CausalLM, WeightAverage]:
    """A model to read with, equal to the student as it is now, and what makes it follow the student.

    With LoRA it is a second adapter on the student's base: factor by factor the average of the student's. With full
    fine-tuning it is a copy of all weights, in their precision."""
    trained = {name: p for name, p in student.model.named_parameters() if p.requires_grad}
    if not isinstance(student.model, PeftModel):
        lm = student.frozen_copy()
        own = dict(lm.model.named_parameters())
        return lm, WeightAverage(trained, {name: own[name] for name in trained}, decay)
    add_twin(student.model, ADAPTER)
    own = dict(student.model.named_parameters())
    active = student.model.active_adapter
    twins = {name: own[name.replace(f".{active}.", f".{ADAPTER}.")] for name in trained}
    return student.with_adapter(ADAPTER), WeightAverage(trained, twins, decay)
