"""Attention without padding: packed sequences for training and scoring, slots for generation.

transformers looks an attention function up by name. Ours takes a `layout` that says which tokens of
the one flat row belong together, and attends sequence by sequence: no `[T, T]` mask, no padded
keys, no repeated key-value heads. A call without a layout behaves as transformers' own `sdpa`,
but for what `sdpa` silently leaves out (soft caps, sinks): that is an error.
"""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from errors import ConfigError, ModelError

NAME = "protege"


def implementation(option: str) -> str:
    """transformers' name for what an option `attn_implementation` asks for. Raises `ConfigError` for a name that no
    model has; whether a model and this machine have it, loading tells."""
    if option == "auto":
        return NAME
    known = sorted({"eager", *(name for name in AttentionInterface().valid_keys() if "|" not in name and name != NAME)})
    if option not in known and "/" not in option:  # kernels of the hub have a repository's name
        raise ConfigError(f"attn_implementation={option}: expected auto, {', '.join(known)}, or a kernel's hub id")
    return option


class Layout(Protocol):
    """Which tokens of a flat row `[1, N]` attend to which keys."""

    def attend(
        self,
        layer: int,
        query: Float[Tensor, "1 H N D"],
        key: Float[Tensor, "1 K N D"],
        value: Float[Tensor, "1 K N D"],
        scale: float | None,
        window: int | None,
    ) -> Float[Tensor, "1 N H D"]: ...


@dataclass(frozen=True)
class Packed:
    """Whole sequences laid end to end; each attends to itself alone, causally."""

    lengths: tuple[int, ...]

    def attend(self, layer, query, key, value, scale, window):
        if sum(self.lengths) != query.shape[2]:
            raise RuntimeError(f"sequences of {sum(self.lengths)} tokens in all, in a row of {query.shape[2]}")
        if self._alike:
            return self._side_by_side(query, key, value, scale, window)
        pieces = []
        for q, k, v in zip(
            *(x.split(self.lengths, dim=2) for x in (query, key, value)),  # [1, heads, length, D]
            strict=True,
        ):
            pieces.append(_causal(q, k, v, scale, window))
        return torch.cat(pieces, dim=2).transpose(1, 2)

    @cached_property
    def _alike(self) -> bool:
        """Whether the sequences may as well be padded to one length: at most twice the scores, in one call."""
        return len(self.lengths) > 1 and len(self.lengths) * max(self.lengths) ** 2 <= 2 * sum(
            n * n for n in self.lengths
        )

    def _indices(self, device: torch.device) -> tuple[Int[Tensor, " B*L"], Int[Tensor, " N"]]:
        """Row of each padded position (padding: row 0), and padded position of each row. Sent to the device once, not
        for every layer."""
        if device not in self._sent:
            padded, real = self._indices_on_the_host
            self._sent[device] = padded.to(device), real.to(device)
        return self._sent[device]

    @cached_property
    def _sent(self) -> dict[torch.device, tuple[Tensor, Tensor]]:
        return {}

    @cached_property
    def _indices_on_the_host(self) -> tuple[Int[Tensor, " B*L"], Int[Tensor, " N"]]:
        longest = max(self.lengths)
        lengths = torch.tensor(self.lengths)
        columns = torch.arange(longest)
        real = columns < lengths[:, None]  # [B, L]
        padded = (lengths.cumsum(0) - lengths)[:, None] + columns
        return padded.masked_fill(~real, 0).flatten(), real.flatten().nonzero()[:, 0]

    def _side_by_side(self, query, key, value, scale, window):
        """One causal call on `[B, heads, L, D]`. Padding stands at the end, where no real token sees it."""
        padded, real = self._indices(query.device)
        q, k, v = (
            x[0].transpose(0, 1).index_select(0, padded).unflatten(0, (len(self.lengths), -1)).transpose(1, 2)
            for x in (query, key, value)
        )
        out = _causal(q, k, v, scale, window)  # [B, H, L, D]
        return out.transpose(1, 2).flatten(0, 1).index_select(0, real)[None]


SMALL = 1 << 16  # scores per head


def _causal(query, key, value, scale, window):
    """The last `n` of `m` positions attend to the positions up to their own (`window` at most)."""
    n, m = query.shape[2], key.shape[2]
    plain = n == m and (window is None or window >= m)
    # why: large scores are not to be rounded to bfloat16, as a product that is written out rounds them
    small = query.device.type == "cpu" and query.dtype != torch.bfloat16 and n * m <= SMALL
    if plain and not small:
        return _fused(query, key, value, scale, None)
    rows = torch.arange(m - n, m, device=query.device)[:, None]
    columns = torch.arange(m, device=query.device)
    mask = columns <= rows
    if window is not None:
        mask &= columns > rows - window
    if small:
        return _small(query, key, value, scale, mask)
    return _fused(query, key, value, scale, mask)


def _fused(query, key, value, scale, mask):
    """torch's own kernels; without a mask causal."""
    shared = query.device.type == "cpu" or (mask is None and query.dtype == torch.bfloat16 and query.shape[-1] <= 256)
    if not shared:
        # why: on CUDA only the flash kernel knows of shared heads; else torch writes out all scores, in float32
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=shared
    )


def _small(query, key, value, scale, mask):
    """Attention written out. torch's flash kernel for CPUs takes 2 to 9 times as long on short sequences
    (benchmarks/LOG.md); heads that share keys share one product here, too."""
    heads, groups, n = query.shape[1], query.shape[1] // key.shape[1], query.shape[2]
    shared = query.unflatten(1, (-1, groups)).flatten(2, 3)  # [B, K, groups * n, D]
    scores = torch.matmul(shared, key.transpose(-1, -2)) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.unflatten(2, (groups, n)).masked_fill(~mask, float("-inf"))  # [B, K, groups, n, m]
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights.flatten(2, 3), value).unflatten(2, (groups, n)).reshape(len(query), heads, n, -1)


class SlotCache:
    """Keys and values of up to `slots` sequences, per layer `[rows, K, capacity, D]`.

    Rows `[0, active)` are being decoded; the others may hold finished sequences kept for reuse.
    """

    GROWTH = 128  # tokens

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.rows = 0  # allocated so far, at most `slots`
        self.capacity = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def reserve(self, rows: int, tokens: int) -> None:
        """Make room for `rows` sequences of `tokens` tokens, keeping what is there."""
        if tokens <= self.capacity and rows <= self.rows:
            return
        if tokens > self.capacity:
            self.capacity = -(-max(tokens, self.capacity * 5 // 4) // self.GROWTH) * self.GROWTH
        self.rows = max(self.rows, rows)
        for layer, (key, value) in self._layers.items():  # one at a time: old and new are never both there whole
            self._layers[layer] = (self._grown(key), self._grown(value))

    def _grown(self, old: Tensor) -> Tensor:
        new = self._empty(old)
        new[: old.shape[0], :, : old.shape[2]] = old
        return new

    def layer(self, layer: int, like_key: Tensor, like_value: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's keys and values; allocated at the layer's first use."""
        if layer not in self._layers:
            self._layers[layer] = (self._empty(like_key), self._empty(like_value))
        return self._layers[layer]

    def _empty(self, like: Tensor) -> Tensor:
        return like.new_zeros((self.rows, like.shape[1], self.capacity, like.shape[3]))

    def copy(self, source: int, target: int, tokens: int) -> None:
        for kv in self._layers.values():
            for x in kv:
                x[target, :, :tokens] = x[source, :, :tokens]

    def swap(self, a: int, b: int, tokens: int) -> None:
        for kv in self._layers.values():
            for x in kv:
                held = x[a, :, :tokens].clone()
                x[a, :, :tokens] = x[b, :, :tokens]
                x[b, :, :tokens] = held


@dataclass(frozen=True)
class Extend:
    """New tokens of several slots laid end to end: slot `slots[i]` gets `lengths[i]` tokens after its
    first `starts[i]`."""

    cache: SlotCache
    slots: tuple[int, ...]
    starts: tuple[int, ...]
    lengths: tuple[int, ...]

    @cached_property
    def _fresh(self) -> Packed:
        return Packed(self.lengths)

    def attend(self, layer, query, key, value, scale, window):
        keys, values = self.cache.layer(layer, key, value)
        at = 0
        for slot, start, length in zip(self.slots, self.starts, self.lengths, strict=True):
            keys[slot, :, start : start + length] = key[0, :, at : at + length]
            values[slot, :, start : start + length] = value[0, :, at : at + length]
            at += length
        if not any(self.starts):
            return self._fresh.attend(layer, query, key, value, scale, window)
        pieces, at = [], 0
        for slot, start, length in zip(self.slots, self.starts, self.lengths, strict=True):
            stop = start + length
            pieces.append(
                _causal(
                    query[:, :, at : at + length],
                    keys[slot : slot + 1, :, :stop],
                    values[slot : slot + 1, :, :stop],
                    scale,
                    window,
                )
            )
            at += length
        return torch.cat(pieces, dim=2).transpose(1, 2)


@dataclass
class Decode:
    """One new token for each of the first `n` slots; slot i's goes to `positions[i]`."""

    cache: SlotCache
    positions: Int[Tensor, " n"]
    longest: int  # max(positions) + 1, known on the host
    _bias: dict[tuple[int | None, torch.dtype], Tensor] = field(default_factory=dict)

    def attend(self, layer, query, key, value, scale, window):
        keys, values = self.cache.layer(layer, key, value)
        n, groups = query.shape[2], query.shape[1] // key.shape[1]
        rows = torch.arange(n, device=query.device)
        keys[rows, :, self.positions] = key[0].transpose(0, 1)
        values[rows, :, self.positions] = value[0].transpose(0, 1)
        # Grouped heads share their keys in one matmul: repeating them would copy the cache at every step.
        q = query[0].transpose(0, 1).unflatten(1, (-1, groups))  # [n, K, groups, D]
        k, v = keys[:n, :, : self.longest], values[:n, :, : self.longest]
        if q.dtype == torch.bfloat16:  # as in `_causal`
            bias = self.bias(window, q.dtype).expand(-1, q.shape[1], groups, -1)
            return scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale).flatten(1, 2)[None]
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        scores = torch.matmul(q, k.transpose(-1, -2)) * scale
        weights = (scores + self.bias(window, scores.dtype)).softmax(-1, dtype=torch.float32).to(q.dtype)
        return torch.matmul(weights, v).flatten(1, 2)[None]  # of [n, K, groups, D]

    def bias(self, window: int | None, dtype: torch.dtype) -> Float[Tensor, "n 1 1 longest"]:
        if (window, dtype) not in self._bias:
            columns = torch.arange(self.longest, device=self.positions.device)
            rows = self.positions[:, None]
            hidden = columns > rows
            if window is not None:
                hidden |= columns <= rows - window
            bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            self._bias[window, dtype] = bias.masked_fill_(hidden, float("-inf"))[:, None, None]
        return self._bias[window, dtype]


@dataclass
class Windows:
    """The window sizes of the masks a model asked for, and those its layers told us."""

    asked: set[int] = field(default_factory=set)
    told: set[int] = field(default_factory=set)

    def check(self) -> None:
        """Raises `ModelError` if a layer is windowed (or chunked) by its mask alone, which we never build."""
        if self.asked - self.told:
            raise ModelError(f"packed attention is not told of the window of {sorted(self.asked - self.told)} tokens")


_windows: contextvars.ContextVar[Windows | None] = contextvars.ContextVar("protege_windows", default=None)


@contextmanager
def no_mask() -> Iterator[Windows]:
    """Within, the model builds no attention mask: a layout does its work."""
    windows = Windows()
    token = _windows.set(windows)
    try:
        yield windows
    finally:
        _windows.reset(token)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface. Raises `ModelError` for features that a layout cannot honour."""
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ModelError(f"attention without {name} is not this model; use attn_implementation=eager for it")
    if layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if kwargs.get("position_bias") is not None:
        raise ModelError("packed attention has no position_bias; use attn_implementation=sdpa for this model")
    windows = _windows.get()
    if windows is not None and sliding_window is not None:
        windows.told.add(sliding_window)
    # why: under autocast rotary embeddings make float32 of queries and keys, which the products take back. Taken back
    # here, the cache holds half as much, and is not converted again for every token
    query, key = query.to(value.dtype), key.to(value.dtype)
    return layout.attend(module.layer_idx, query, key, value, scaling, sliding_window).contiguous(), None  # type: ignore[arg-type]


def _mask(*args: Any, local_size: int | None = None, **kwargs: Any) -> Tensor | None:
    windows = _windows.get()
    if windows is None:
        return sdpa_mask(*args, local_size=local_size, **kwargs)
    if local_size is not None:
        windows.asked.add(local_size)
    return None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, _mask)
