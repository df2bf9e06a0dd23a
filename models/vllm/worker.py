"""What runs inside vLLM's workers, as their extension (`worker_extension_cls`)."""

from __future__ import annotations

from typing import Any


class Repacking:
    """vLLM 0.32 on a CPU computes a head from a packed copy of its weight. Where the embedding is that weight too, a
    reload renews the embedding and forgets the copy."""

    model_runner: Any  # of vLLM's worker

    def repack_heads(self) -> int:
        """Make those copies anew. Returns how many there were; none on a GPU."""
        heads = [m for m in self.model_runner.model.modules() if hasattr(m, "tie_weights") and hasattr(m, "cpu_linear")]
        for head in heads:
            head.quant_method.process_weights_after_loading(head)
        return len(heads)


EXTENSION = f"{Repacking.__module__}.{Repacking.__qualname__}"
