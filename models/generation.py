"""Token-by-token decoding of a changing set of sequences, on one `CausalLM`.

Two steppers share one contract: `prefill` takes new sequences in, `decode` advances all active ones by
one token, both return final hidden states, one row per sequence. `SlotStepper` admits sequences at any
time (continuous batching) and reuses what it has already read; `PaddedStepper` works with any
architecture, but admits only into an empty batch. transformers' own continuous batching was tried:
exact, but half the speed of this on a CPU and slower than `generate` (benchmarks/LOG.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from errors import ModelError
from models.attention import Decode, Extend, SlotCache
from models.causal_lm import TOLERANCE, CausalLM, largest_kl
from models.device_thread import stop_if_cancelled

PREFILL_TOKENS = 4096  # of one forward, bounds its activations


class Stepper(Protocol):
    """Rows `0 … active-1` are the active sequences, in order of admission but for `release`."""

    active: int

    def room(self) -> int: ...

    def prefill(self, prompts: Sequence[list[int]]) -> Float[Tensor, "n h"]: ...

    def decode(self, token_ids: Sequence[int]) -> Float[Tensor, "active h"]: ...

    def release(self, row: int) -> None:
        """Ends a row; the last active row takes its place."""
        ...

    def forget(self) -> None:
        """Free the memory of all that was read so far. Only while nothing is active."""
        ...


def make_stepper(lm: CausalLM, slots: int) -> Stepper:
    if lm.packed:
        return SlotStepper(lm, slots)
    stepper = PaddedStepper(lm, slots)
    stepper.check()
    return stepper


@dataclass
class SlotStepper:
    """Continuous batching over a `SlotCache`. Identical prompts are read once; a prompt that goes on from
    what a finished slot holds (the next turn of an episode) is read from there on."""

    lm: CausalLM
    slots: int
    active: int = 0
    _held: list[list[int]] = field(default_factory=list)  # ids whose keys and values a slot holds

    def __post_init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self._cache = SlotCache(self.slots)
        self._held = [[] for _ in range(self.slots)]
        self.active = 0

    def room(self) -> int:
        return self.slots - self.active

    def prefill(self, prompts: Sequence[list[int]]) -> Float[Tensor, "n h"]:
        first = self.active
        leaders: dict[tuple[int, ...], int] = {}  # prompt -> the slot that reads it
        source: list[int] = []
        for i, prompt in enumerate(prompts):
            source.append(leaders.setdefault(tuple(prompt), first + i))
        self._cache.reserve(first + len(prompts), max(map(len, prompts)) + 1)
        starts = {slot: self._reuse(slot, list(prompt)) for prompt, slot in leaders.items()}
        last = self._read({slot: list(prompt) for prompt, slot in leaders.items()}, starts)
        for i, prompt in enumerate(prompts):
            slot = first + i
            if source[i] != slot:
                self._cache.copy(source[i], slot, len(prompt))
            self._held[slot] = list(prompt)
        self.active += len(prompts)
        return torch.stack([last[slot] for slot in source])

    def _reuse(self, slot: int, prompt: list[int]) -> int:
        """Bring the idle slot that holds most of the prompt's beginning to `slot`; returns how much."""

        def shared(held: list[int]) -> int:
            # All but the last token at most: its hidden state is what we need.
            return len(held) if 0 < len(held) < len(prompt) and prompt[: len(held)] == held else 0

        best = max(range(slot, self.slots), key=lambda s: shared(self._held[s]))
        if best != slot and shared(self._held[best]):
            self._cache.swap(slot, best, max(len(self._held[slot]), len(self._held[best])))
            self._held[slot], self._held[best] = self._held[best], self._held[slot]
        return shared(self._held[slot])

    def _read(self, prompts: dict[int, list[int]], starts: dict[int, int]) -> dict[int, Float[Tensor, " h"]]:
        last: dict[int, Tensor] = {}
        batch: list[int] = []
        tokens = 0
        for slot in prompts:
            size = len(prompts[slot]) - starts[slot]
            if batch and tokens + size > PREFILL_TOKENS:
                stop_if_cancelled()
                last.update(self._forward(batch, prompts, starts))
                batch, tokens = [], 0
            batch.append(slot)
            tokens += size
        last.update(self._forward(batch, prompts, starts))
        return last

    def _forward(self, batch: list[int], prompts: dict[int, list[int]], starts: dict[int, int]) -> dict[int, Tensor]:
        new = [prompts[slot][starts[slot] :] for slot in batch]
        lengths = tuple(map(len, new))
        device = self.lm.device
        ids = torch.tensor([token for tokens in new for token in tokens], device=device)
        positions = torch.cat(
            [torch.arange(starts[slot], len(prompts[slot])) for slot in batch]  # positions within each sequence
        ).to(device)
        layout = Extend(self._cache, tuple(batch), tuple(starts[slot] for slot in batch), lengths)
        hidden = self.lm.flat(ids, positions, layout)
        ends = torch.tensor(lengths).cumsum(0) - 1
        return dict(zip(batch, hidden[ends.to(device)], strict=True))

    def decode(self, token_ids: Sequence[int]) -> Float[Tensor, "active h"]:
        lengths = [len(self._held[slot]) for slot in range(self.active)]
        longest = max(lengths) + 1
        self._cache.reserve(self.active, longest)
        positions = torch.tensor(lengths, device=self.lm.device)
        ids = torch.tensor(token_ids, device=self.lm.device)
        for slot, token in enumerate(token_ids):
            self._held[slot].append(token)
        return self.lm.flat(ids, positions, Decode(self._cache, positions, longest))

    def release(self, row: int) -> None:
        last = self.active - 1
        if row != last:
            self._cache.swap(row, last, max(len(self._held[row]), len(self._held[last])))
            self._held[row], self._held[last] = self._held[last], self._held[row]
        self.active = last


@dataclass
class PaddedStepper:
    """Left-padded static batches on the model's own cache: for architectures that keep their own state."""

    lm: CausalLM
    slots: int
    active: int = 0
    _rows: list[int] = field(default_factory=list)  # active row -> row of the batch
    _cache: Any = None
    _mask: Tensor | None = None  # [B, length so far]

    def forget(self) -> None:
        self.active, self._rows, self._cache, self._mask = 0, [], None, None

    def room(self) -> int:
        return 0 if self.active else self.slots

    def prefill(self, prompts: Sequence[list[int]]) -> Float[Tensor, "n h"]:
        self.forget()
        longest = max(map(len, prompts))
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        self._mask = mask.to(self.lm.device)
        self.active, self._rows = len(prompts), list(range(len(prompts)))
        return self._forward(ids)

    def decode(self, token_ids: Sequence[int]) -> Float[Tensor, "active h"]:
        assert self._mask is not None
        ids = torch.zeros(len(self._mask), 1, dtype=torch.long)  # rows that have ended read token 0, unseen
        ids[self._rows, 0] = torch.tensor(token_ids)
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), 1)], dim=1)
        return self._forward(ids)

    def _forward(self, ids: Tensor) -> Tensor:
        assert self._mask is not None
        positions = (self._mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        inputs = {"input_ids": ids.to(self.lm.device), "attention_mask": self._mask, "use_cache": True}
        if self._cache is not None:
            inputs[self._cache_key] = self._cache
        if self.lm.model.config.model_type not in _NO_POSITIONS:
            inputs["position_ids"] = positions
        elif self._cache is not None:
            inputs["attention_mask"] = None  # it would be laid over the new token alone
        training = self.lm.model.training
        self.lm.model.eval()  # in training mode activation checkpointing would throw the cache away
        try:
            with self.lm.precision():
                out = self.lm.trunk(**inputs)
        finally:
            self.lm.model.train(training)
        self._cache_key = "past_key_values" if getattr(out, "past_key_values", None) is not None else "cache_params"
        self._cache = out[self._cache_key]
        return out.last_hidden_state[self._rows, -1]

    @torch.no_grad()
    def check(self) -> None:
        """Raises `ModelError` unless left padding and the model's own cache give what whole sequences give."""
        if self.slots < 2:
            return  # never padded
        sequences = [[1, 2, 3, 4, 5], [5, 4, 3]]
        rows = [self.prefill([ids[:-1] for ids in sequences]), self.decode([ids[-1] for ids in sequences])]
        self.forget()
        whole = self.lm.hidden([torch.tensor(ids) for ids in sequences])[[3, 6, 4, 7]]
        ours, theirs = (self.lm.logits(hidden).log_softmax(-1) for hidden in (torch.cat(rows), whole))
        if not (difference := largest_kl(ours, theirs)) <= TOLERANCE[self.lm.compute_dtype]:
            raise ModelError(
                f"{self.lm.model.config.name_or_path or type(self.lm.model).__name__}: generating in left-padded "
                f"batches changes its logprobs by {difference:.3g}; this architecture needs slots=1"
            )

    def release(self, row: int) -> None:
        self._rows[row] = self._rows[-1]
        self._rows.pop()
        self.active -= 1


_NO_POSITIONS = {"mamba", "mamba2", "falcon_mamba", "xlstm", "rwkv"}
