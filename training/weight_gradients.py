"""Weight gradients that are added where they live.

autograd makes every weight's gradient anew in each backward pass and then adds it to `.grad`: three times the
memory traffic of the gradient itself, once per pack. Within `accumulated_in_place()` linear and embedding
layers add theirs straight into `.grad`, so that small packs, which need little memory, cost hardly more than large ones
(benchmarks/LOG.md). The numbers are autograd's, but for the order of float additions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@contextmanager
def accumulated_in_place(model: nn.Module) -> Iterator[None]:
    """Holds for forward and backward alike: activation checkpointing runs the forward again within the backward.

    Layers under autocast, and whatever is not a plain linear or embedding layer, stay with autograd.
    """
    changed = []
    for module in model.modules():
        forward = _FORWARDS.get(type(module))
        if forward is not None and "forward" not in vars(module):  # else somebody else has changed it
            module.forward = MethodType(forward, module)
            changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _linear(self: nn.Linear, x: Tensor) -> Tensor:
    if _is_ours(x, self.weight):
        return _Linear.apply(x, self.weight, self.bias)  # type: ignore[return-value]
    return nn.Linear.forward(self, x)


def _embedding(self: nn.Embedding, ids: Tensor) -> Tensor:
    plain = self.max_norm is None and not self.scale_grad_by_freq and not self.sparse
    if plain and _is_ours(self.weight, self.weight):
        return _Embedding.apply(ids, self.weight, self.padding_idx)  # type: ignore[return-value]
    return nn.Embedding.forward(self, ids)


_FORWARDS = {nn.Linear: _linear, nn.Embedding: _embedding}


def _is_ours(x: Tensor, weight: Tensor) -> bool:
    return (
        weight.is_leaf
        and weight.requires_grad
        and torch.is_grad_enabled()
        and x.dtype == weight.dtype
        and not torch.is_autocast_enabled(weight.device.type)
        and weight._backward_hooks is None
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight = (
            weight  # itself: as a saved tensor, checkpointing would hand back an alias, whose `.grad` nobody reads
        )
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:  # type: ignore[override]
        (x,), weight = ctx.saved_tensors, ctx.weight
        flat = grad.flatten(0, -2)  # [T, out]
        rows = x.flatten(0, -2)  # [T, in]
        if weight.grad is None:
            weight.grad = flat.T @ rows
        else:
            weight.grad.addmm_(flat.T, rows)
        into_x = grad @ weight if ctx.needs_input_grad[0] else None
        into_bias = flat.sum(0) if ctx.needs_input_grad[2] else None
        return into_x, None, into_bias


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding_idx: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight, ctx.padding_idx = weight, padding_idx
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:  # type: ignore[override]
        (ids,), weight = ctx.saved_tensors, ctx.weight
        rows = grad.flatten(0, -2)  # [T, h]
        if ctx.padding_idx is not None:  # torch's embedding gives this row no gradient
            rows = rows.masked_fill((ids.flatten() == ctx.padding_idx)[:, None], 0.0)
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        weight.grad.index_add_(0, ids.flatten(), rows)
        return None, None, None
