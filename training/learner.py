"""The student's weights and optimizer: gradients through a fused, chunked head at trained positions only.

The trunk runs once per pack. Its hidden states at trained positions are cut from the graph; the head, the
log-softmax and the objective run over them in chunks, forward and backward, so that at no time more than one
chunk of logits exists; then the collected gradient goes back through the trunk.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from peft import PeftModel
from torch import Tensor

from errors import CheckpointError, ProtegeError
from models.blending import exchanged_columns
from models.causal_lm import CausalLM
from models.device_thread import stop_if_cancelled
from models.types import Head, Signal, SignalKind, SignalSpec, TeacherTopK
from models.weights import LMWeights
from training.objectives import RATIO_METRICS, UNSCORED, Advantages, Objective, TokenBatch, token_logprobs
from training.packing import PackedBatch, TrainingItem, pack, token_weights
from training.weight_average import WeightAverage
from training.weight_gradients import accumulated_in_place

HEAD_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 25}  # logits of one chunk: 32 or 128 MiB in float32


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW. `weight_decay` leaves biases and norms alone; `max_grad_norm=0` does not clip."""

    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class ItemMetrics:
    """What the objective measured on one episode, per trained token."""

    tokens: int
    values: dict[str, np.ndarray]  # float64 [tokens] each


class Learner:
    def __init__(
        self,
        lm: CausalLM,
        *,
        optimizer: OptimizerConfig | None = None,
        temperature: float = 1.0,
        token_budget: int = 4096,
        reduction: str = "token_mean",
        head_elements: int | None = None,
        average: WeightAverage | None = None,
        known_ids: int | None = None,
    ) -> None:
        self.lm = lm
        self.known_ids = known_ids  # ids from this one on are a teacher's alone, whatever the width of the embedding
        self.average = average  # of the weights, if it is a teacher
        self.config = optimizer or OptimizerConfig()
        self.temperature = temperature
        self.token_budget = token_budget
        self.reduction = reduction
        self.head_elements = head_elements or HEAD_ELEMENTS.get(lm.device.type, 1 << 23)
        self.parameters = [p for p in lm.model.parameters() if p.requires_grad]
        self._optimizer = self._make_optimizer()

    def _make_optimizer(self) -> torch.optim.AdamW:
        c = self.config
        groups = [
            {"params": [p for p in self.parameters if p.ndim >= 2], "weight_decay": c.weight_decay},
            {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=0.0, betas=(c.beta1, c.beta2), eps=c.eps, fused=True
        )

    def forward_backward(
        self, items: Sequence[TrainingItem], objective: Objective, factors: Sequence[float] | None = None
    ) -> list[ItemMetrics]:
        """Add the gradient of the objective over `items`, which make up one optimizer step. `factors`: one per item, on
        its tokens' losses."""
        try:
            with accumulated_in_place(self.lm.model):
                return self._run(items, objective, train=True, factors=factors)
        except torch.OutOfMemoryError as error:
            raise ProtegeError(
                f"out of memory with {self.token_budget} tokens at a time: lower micro_batch_tokens, set "
                "activation_checkpointing=True, or use LoRA. The run goes on from its last checkpoint"
            ) from error

    @torch.no_grad()
    def measure(self, items: Sequence[TrainingItem], objective: Objective) -> list[ItemMetrics]:
        """The objective's metrics without a gradient."""
        return self._run(items, objective, train=False)

    def step(self, learning_rate: float) -> dict[str, float]:
        """One AdamW step at `learning_rate`; clears the gradient. Raises `ProtegeError` on a non-finite gradient."""
        limit = self.config.max_grad_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit).item()
        if norm != norm or norm == float("inf"):
            self._optimizer.zero_grad(set_to_none=True)
            raise ProtegeError(
                f"the gradient's norm is {norm}: nothing was updated. Lower learning_rate, or use dtype=float32"
            )
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return {"grad_norm": norm, "learning_rate": learning_rate}

    def update_average(self) -> None:
        """Once a batch, not once an optimizer step: until its last update a batch is judged by one teacher, whose
        head may still be asked for."""
        if self.average is not None:
            self.average.update()

    def save(self, path: Path) -> None:
        """Optimizer state, and the average if there is one, beside the weights, which `save_pretrained` writes."""
        extra: dict[str, Any] = {}
        if isinstance(self.lm.model, PeftModel):
            extra["save_embedding_layers"] = False  # else PEFT asks the hub whether the vocabulary has changed
            extra["selected_adapters"] = [self.lm.model.active_adapter]  # teachers may have theirs on the same base
        self.lm.model.save_pretrained(path, **extra)
        (path / "trainer_state").mkdir(exist_ok=True)
        if self.average is not None:
            self.average.save(path)
        torch.save(self._optimizer.state_dict(), path / "trainer_state" / "optimizer.pt")

    def load_optimizer(self, path: Path) -> None:
        """The state that `save` wrote, the average's too; settings stay this run's. Raises `CheckpointError`."""
        if self.average is not None:
            self.average.load(path)
        settings = [{key: g[key] for key in ("betas", "eps", "weight_decay")} for g in self._optimizer.param_groups]
        try:
            state = torch.load(path / "trainer_state" / "optimizer.pt", weights_only=True, map_location="cpu")
            self._optimizer.load_state_dict(state)
            for group, own in zip(self._optimizer.param_groups, settings, strict=True):
                group.update(own)  # torch takes the saved ones, and a changed option would do nothing
        except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{path}: the optimizer's state cannot be read: {error}") from error

    def weights(self) -> LMWeights:
        """For engines that sample from a copy."""
        return LMWeights(self.lm)

    def _run(
        self,
        items: Sequence[TrainingItem],
        objective: Objective,
        train: bool,
        factors: Sequence[float] | None = None,
    ) -> list[ItemMetrics]:
        results: dict[int, ItemMetrics] = {}
        for batch in pack(items, token_weights(items, self.reduction, factors), self.token_budget):
            stop_if_cancelled()
            metrics = self._run_pack(batch, objective, train)
            results.update(zip(map(id, batch.items), _per_item(batch, metrics), strict=True))
        return [results[id(item)] for item in items]

    def _run_pack(self, batch: PackedBatch, objective: Objective, train: bool) -> dict[str, Float[Tensor, " n"]]:
        """Metrics per trained token; with `train`, also the gradient."""
        hidden = self.lm.hidden(batch.sequences)  # [T, h]
        rows = batch.rows.to(hidden.device)
        cut = hidden.detach()[rows].requires_grad_(train)  # [n, h]
        spans = _spans(batch, hidden.device) if objective.need is SignalKind.SAMPLED else None
        ahead = None
        if objective.looks_ahead or spans is not None:
            ahead = self._advantages(cut, batch, objective, spans)
        pieces: dict[str, list[Tensor]] = {}
        for span in self._chunks(batch, objective.need):
            logits = self._logits(cut[span])
            size = logits.shape[1] if self.known_ids is None else min(logits.shape[1], self.known_ids)
            tokens = self._token_batch(batch, span, objective.need, size, logits.device)
            if ahead is not None:
                tokens = replace(tokens, advantages=ahead.values[span], spans=None if spans is None else spans[span])
            if tokens.teacher_logits is not None:
                logits = logits[:, : tokens.teacher_logits.shape[1]]  # ids that only the student has
            out = objective.loss(logits, tokens)
            if train:
                (out.loss * batch.weights[span].to(out.loss.device)).sum().backward()
            for name, values in {**out.metrics, "loss": out.loss.detach()}.items():
                pieces.setdefault(name, []).append(values)
            del logits, tokens, out  # before the next chunk's logits are made
        if train and hidden.requires_grad:
            hidden.backward(torch.zeros_like(hidden).index_put_((rows,), cut.grad.to(hidden.dtype)))  # type: ignore[union-attr]
        joined = {name: torch.cat(values) for name, values in pieces.items()}
        return joined if ahead is None else joined | ahead.metrics

    def _logits(self, hidden: Float[Tensor, "n h"]) -> Float[Tensor, "n v"]:
        logits = self.lm.logits(hidden)
        return logits if self.temperature == 1.0 else logits / self.temperature

    @torch.no_grad()
    def _advantages(
        self, cut: Tensor, batch: PackedBatch, objective: Objective, spans: Int[Tensor, " n"] | None
    ) -> Advantages:
        """A first pass over the head, for objectives whose advantage looks at other tokens."""
        logprobs = []
        for span in self._chunks(batch, SignalKind.SAMPLED):
            logits = self._logits(cut[span])
            logprobs.append(token_logprobs(logits, batch.ids[span].to(logits.device)))
        whole = self._token_batch(batch, slice(0, len(batch.ids)), SignalKind.SAMPLED, 0, cut.device)
        return objective.advantages(torch.cat(logprobs), replace(whole, spans=spans), batch.counts)

    def _chunks(self, batch: PackedBatch, need: SignalSpec) -> Iterator[slice]:
        """Slices of the trained tokens; no slice of kind FULL spans two teachers' heads."""
        # why: rounded up. glibc gives tensors of 32 MiB and more pages of their own, and takes them back when they are
        # freed. Chunks a little smaller lie in its heap, which they broke up: it grew by several times the logits.
        size = -(-self.head_elements // self.lm.vocab_size)
        start = 0
        for stop in _run_ends(batch, need):
            for at in range(start, stop, size):
                yield slice(at, min(at + size, stop))
            start = stop

    def _token_batch(
        self, batch: PackedBatch, span: slice, need: SignalSpec, vocab_size: int, device: torch.device
    ) -> TokenBatch:
        tokens = TokenBatch(
            batch.ids[span].to(device), batch.sampler_logprobs[span].to(device), temperature=self.temperature
        )
        if need is SignalKind.SAMPLED:
            return replace(tokens, teacher_logprobs=_teacher_logprobs(batch)[span].to(device))
        if need is SignalKind.FULL:
            return replace(tokens, teacher_logits=_teacher_logits(batch, span, vocab_size))
        if isinstance(need, TeacherTopK):
            ids, logprobs = _teacher_topk(batch, span, need.k, vocab_size)
            return replace(
                tokens,
                teacher_logprobs=_teacher_logprobs(batch)[span].to(device),
                topk_ids=ids.to(device),
                topk_logprobs=logprobs.to(device),
            )
        return tokens


def _signal(item: TrainingItem) -> Signal:
    if item.signal is None:
        raise ValueError(f"episode {item.episode.row_id} has no teacher signal")
    return item.signal


def _teacher_logprobs(batch: PackedBatch) -> Float[Tensor, " n"]:
    """Of each token, or its even share of its span's; NaN in no span."""
    values = []
    for item, count in zip(batch.items, batch.counts, strict=True):
        logprobs, spans = _signal(item).logprobs, _signal(item).spans
        if logprobs is None or len(logprobs if spans is None else spans) != count:
            raise ValueError(f"episode {item.episode.row_id}: the signal has not one logprob per sampled token")
        if spans is not None:
            sizes = torch.bincount(spans[spans >= 0], minlength=len(logprobs))
            logprobs = (logprobs / sizes)[spans.clamp(min=0)].masked_fill(spans < 0, math.nan)
        values.append(logprobs)
    return torch.cat(values)


def _spans(batch: PackedBatch, device: torch.device) -> Int[Tensor, " n"] | None:
    """Of all episodes together; None if none of them has any."""
    found = [_signal(item).spans for item in batch.items]
    if all(spans is None for spans in found):
        return None
    joined, start = [], 0
    for spans, count in zip(found, batch.counts, strict=True):
        own = torch.arange(count) if spans is None else spans
        joined.append(torch.where(own < 0, own, own + start))
        start += count
    return torch.cat(joined).to(device)


def _teacher_topk(
    batch: PackedBatch, span: slice, k: int, vocab_size: int
) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
    """The k likeliest of each token, fewer where no teacher gave so many. What the student does not have is no token:
    its mass stays in the teacher's logprobs of the others, which are of the whole distribution."""
    ids, logprobs = [], []
    for item in batch.items:
        signal = _signal(item)
        if signal.topk_ids is None or signal.topk_logprobs is None:
            raise ValueError(f"episode {item.episode.row_id}: the signal has no top k")
        missing = max(0, k - signal.topk_ids.shape[1])  # a teacher of a smaller vocabulary, or one that kept fewer
        ids.append(F.pad(signal.topk_ids[:, :k], (0, missing)))
        logprobs.append(F.pad(signal.topk_logprobs[:, :k], (0, missing), value=-math.inf))
    chosen, values = torch.cat(ids)[span], torch.cat(logprobs)[span]
    absent = ~torch.isfinite(values) | (chosen >= vocab_size)
    return chosen.masked_fill(absent, 0), values.masked_fill(absent, -math.inf)


@torch.no_grad()
def _teacher_logits(batch: PackedBatch, span: slice, vocab_size: int) -> Float[Tensor, "n v"]:
    """The teacher's logits for a slice that one head covers, over the ids that both models have."""
    start, hidden, head, swap = 0, [], None, None
    for item, count in zip(batch.items, batch.counts, strict=True):
        low, high = max(span.start, start) - start, min(span.stop, start + count) - start
        if low < high:
            signal = _signal(item)
            if signal.hidden is None or len(signal.hidden) != count:
                raise ValueError(f"episode {item.episode.row_id}: the signal has not one state per sampled token")
            hidden.append(signal.hidden[low:high])
            head, swap = signal.head, signal.swap
        start += count
    assert head is not None
    return exchanged_columns(head(torch.cat(hidden))[:, :vocab_size], swap)


def _run_ends(batch: PackedBatch, need: SignalSpec) -> list[int]:
    """Ends of the runs of trained tokens that share a teacher's head."""
    ends: list[int] = []
    previous: tuple[Head | None, tuple[int, int] | None] | None = None
    total = 0
    for item, count in zip(batch.items, batch.counts, strict=True):
        key = (_signal(item).head, _signal(item).swap) if need is SignalKind.FULL else (None, None)
        if previous is not None and key != previous:
            ends.append(total)
        previous = key
        total += count
    return [*ends, total]


def _per_item(batch: PackedBatch, metrics: dict[str, Float[Tensor, " n"]]) -> list[ItemMetrics]:
    split = {name: values.double().cpu().split(batch.counts) for name, values in metrics.items()}
    found = []
    for k, (item, count) in enumerate(zip(batch.items, batch.counts, strict=True)):
        known = np.isfinite(item.episode.sampler_logprobs).any()  # not of given answers
        by_spans = item.signal is not None and item.signal.spans is not None  # others of its pack may be
        left_out = (frozenset() if known else RATIO_METRICS) | (frozenset() if by_spans else {UNSCORED})
        names = [name for name in split if name not in left_out]
        found.append(ItemMetrics(count, {name: split[name][k].numpy() for name in names}))
    return found
