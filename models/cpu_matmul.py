"""Faster float32 matrix products on the CPUs where torch's default library is slow.

torch multiplies float32 matrices with MKL, which on AMD processors runs at half of what oneDNN reaches
(measured in benchmarks/LOG.md). torch's one switch to oneDNN asks for "bf16" internally; a processor
without AMX still computes in full float32 then, one with AMX does not. So we ask, measure the error,
and keep the switch only where the result is as exact as before.
"""

from __future__ import annotations

import torch


def use_fast_exact_matmul() -> bool:
    """Route float32 CPU matmuls through oneDNN if they stay float32-exact. Returns whether they are."""
    if not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 512, generator=generator) for _ in range(2))
    exact = a.double() @ b.double().T
    default_error = (a @ b.T - exact).abs().max()
    before = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # type: ignore[attr-defined]
    error = (a @ b.T - exact).abs().max()
    # Products in bf16 would be off by about 1e-1 here, in float32 by about 5e-5.
    if error < 8 * default_error:
        return True
    torch.backends.mkldnn.matmul.fp32_precision = before  # type: ignore[attr-defined]
    return False
