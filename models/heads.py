"""A language-model head as plain data, so that it can stay, or be sent, without its model."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from errors import ModelError
from models.causal_lm import CausalLM, largest_kl

_HASHED_BYTES = 16 << 20  # at a time, copied from the device
_EXACT = 1e-6  # nats, between a head taken out of its model and the model's own logits


@dataclass(frozen=True, eq=False)
class LinearHead:
    """A linear layer, then a factor, then a soft cap: what `CausalLM.logits` computes. Never equal to another."""

    weight: Float[Tensor, "v h"]
    bias: Float[Tensor, " v"] | None
    scale: float
    softcap: float | None

    def logits(self, hidden: Float[Tensor, "n h"]) -> Float[Tensor, "n v"]:
        """float32, on the weights' device."""
        logits = F.linear(hidden.to(self.weight.device, self.weight.dtype), self.weight, self.bias).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def to(self, device: torch.device) -> LinearHead:
        bias = None if self.bias is None else self.bias.to(device)
        return LinearHead(self.weight.to(device), bias, self.scale, self.softcap)

    def digest(self) -> str:
        """sha256 of the values, computed where they lie, a piece at a time."""
        digest = hashlib.sha256(repr((*self.weight.shape, self.scale, self.softcap)).encode())
        for tensor in (self.weight,) if self.bias is None else (self.weight, self.bias):
            digest.update(str(tensor.dtype).encode())
            step = max(1, _HASHED_BYTES // (tensor[0].numel() * tensor.element_size()))
            for start in range(0, len(tensor), step):
                digest.update(raw(tensor[start : start + step]).data)
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class AtTemperature:
    """A `Head`: one object for every signal of a teacher, by which the learner knows them as one."""

    head: LinearHead
    temperature: float

    def __call__(self, hidden: Float[Tensor, "n h"]) -> Float[Tensor, "n v"]:
        return self.head.logits(hidden) / self.temperature


@torch.no_grad()
def take_head(lm: CausalLM) -> LinearHead:
    """The head of a model, sharing its memory. Raises `ModelError` where it is more than a linear layer."""
    layer = lm.model.get_output_embeddings()
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    if not isinstance(weight, Tensor) or weight.dtype not in (torch.float32, torch.bfloat16):
        raise ModelError(f"{type(layer).__name__}: the head is not a linear layer in float32 or bfloat16")
    head = LinearHead(weight.detach(), None if bias is None else bias.detach(), lm.head_scale, lm.head_softcap)
    probe = torch.randn(8, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    gap = largest_kl(head.logits(probe).log_softmax(-1), lm.logits(probe).log_softmax(-1))
    if not gap <= _EXACT:
        raise ModelError(f"{type(layer).__name__}: the head does more than a linear layer (KL {gap:.3g})")
    return head


def raw(tensor: Tensor) -> np.ndarray:
    """The tensor's values in host memory, bfloat16 as uint16."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else tensor.numpy()


def from_raw(array: np.ndarray) -> Tensor:
    """The reverse; shares the array's memory, which must be writable."""
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
