"""TRL's chunked divergence on saved tensors: what `benchmarks.jsd_memory` has run in an environment with trl 1.16.

    python -m benchmarks.jsd_trl_peer FOLDER BETA DEVICE

It calls the function that `DistillationTrainer` computes its loss with, forward and backward, and prints one line of
JSON.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch
import trl  # type: ignore[import-not-found]
from trl.trainer.distillation_trainer import _chunked_divergence_loss  # type: ignore[import-not-found]

from benchmarks.peak_memory import measured


def main(folder: str, beta: float, device: torch.device) -> None:
    hidden, head, teacher_hidden, teacher_head = (x.to(device) for x in torch.load(Path(folder) / "tensors.pt"))
    head.requires_grad_()
    one_step(hidden[:16], head, teacher_hidden[:16], teacher_head, beta)  # makes the gradient's tensor
    head.grad.zero_()
    gc.collect()
    with measured(device) as found:
        loss = one_step(hidden, head, teacher_hidden, teacher_head, beta)
    print(json.dumps({"trl": trl.__version__, **found, "loss": loss, "head gradient": head.grad.norm().item()}))


def one_step(hidden, head, teacher_hidden, teacher_head, beta: float) -> float:
    """Loss and gradients of a batch of one, nothing masked."""
    hidden = hidden[None].clone().requires_grad_()  # (1, n, h), as the trainer's backbone gives it
    mask = torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    loss, _, _ = _chunked_divergence_loss(hidden, teacher_hidden[None], head, teacher_head, mask, beta)
    loss.backward()
    return loss.item()


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), torch.device(sys.argv[3]))
