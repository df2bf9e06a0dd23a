"""The layouts against attention written out with a mask, and transformers' interface around them."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from errors import ModelError
from models import attention
from models.attention import Decode, Extend, Packed, SlotCache

HEADS, KV_HEADS, DIM = 4, 2, 8
WINDOWS = pytest.mark.parametrize("window", [None, 1, 3, 50])
SCALES = pytest.mark.parametrize("scale", [None, 0.7])


def random_qkv(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(1, h, tokens, DIM, generator=generator) for h in (HEADS, KV_HEADS, KV_HEADS))  # type: ignore[return-value]


def written_out(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None) -> Tensor:
    """One sequence, position by position: [1, N, H, D]."""
    n = q.shape[2]
    out = torch.zeros(1, n, HEADS, DIM, dtype=torch.float64)
    q, k, v = q.double(), k.double(), v.double()
    for h in range(HEADS):
        for i in range(n):
            first = 0 if window is None else max(0, i - window + 1)
            kv = h // (HEADS // KV_HEADS)
            scores = k[0, kv, first : i + 1] @ q[0, h, i] * (DIM**-0.5 if scale is None else scale)
            out[0, i, h] = scores.softmax(0) @ v[0, kv, first : i + 1]
    return out


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=0)


def joined(*parts: Tensor) -> Tensor:
    return torch.cat(parts, dim=2)


@WINDOWS
@SCALES
def test_packed_sequences_attend_to_themselves_alone(window: int | None, scale: float | None):
    sequences = [random_qkv(n, seed=n) for n in (5, 1, 7)]
    q, k, v = (joined(*parts) for parts in zip(*sequences, strict=True))
    got = Packed((5, 1, 7)).attend(0, q, k, v, scale, window)
    close(got, torch.cat([written_out(*s, scale, window) for s in sequences], dim=1))


def test_packed_lengths_must_cover_the_row():
    with pytest.raises(RuntimeError):
        Packed((2, 2)).attend(0, *random_qkv(5), None, None)


@WINDOWS
@SCALES
def test_read_in_two_parts_and_decoded_on_is_the_same_as_whole(window: int | None, scale: float | None):
    """Three sequences of unlike lengths in slots 0 to 2, with leftovers of others beyond their ends."""
    lengths, firsts, steps = (9, 4, 6), (5, 1, 3), 2
    sequences = [random_qkv(n + steps, seed=n) for n in lengths]
    expected = [written_out(*s, scale, window) for s in sequences]
    cache = SlotCache(4)
    cache.reserve(4, 16)
    for part in cache.layer(0, *random_qkv(1)[1:]):
        part.fill_(100.0)

    def extend(starts: tuple[int, ...], stops: tuple[int, ...]) -> None:
        new = tuple(b - a for a, b in zip(starts, stops, strict=True))
        q, k, v = (
            joined(*(s[i][:, :, a:b] for s, a, b in zip(sequences, starts, stops, strict=True))) for i in range(3)
        )
        got = Extend(cache, (0, 1, 2), starts, new).attend(0, q, k, v, scale, window).split(new, dim=1)
        for piece, whole, a, b in zip(got, expected, starts, stops, strict=True):
            close(piece, whole[:, a:b])

    extend((0, 0, 0), firsts)
    extend(firsts, lengths)
    for step in range(steps):
        at = [n + step for n in lengths]
        q, k, v = (joined(*(s[i][:, :, p : p + 1] for s, p in zip(sequences, at, strict=True))) for i in range(3))
        got = Decode(cache, torch.tensor(at), max(at) + 1).attend(0, q, k, v, scale, window)
        close(got, torch.cat([whole[:, p : p + 1] for whole, p in zip(expected, at, strict=True)], dim=1))


def test_slots_keep_what_they_hold_when_they_grow_are_copied_or_swapped():
    cache = SlotCache(3)
    cache.reserve(3, 4)
    k, v = cache.layer(1, *random_qkv(1)[1:])
    k[0, :, :4], k[2, :, :2], v[0, :, :4] = 1.0, 2.0, 3.0
    cache.reserve(3, SlotCache.GROWTH + 1)
    assert cache.capacity == 2 * SlotCache.GROWTH
    cache.swap(0, 2, 4)
    cache.copy(2, 1, 4)
    k, v = cache.layer(1, k, v)
    assert k.shape == (3, KV_HEADS, 2 * SlotCache.GROWTH, DIM)
    assert (k[0, :, :2] == 2).all() and (k[0, :, 2:4] == 0).all()
    for slot in (1, 2):
        assert (k[slot, :, :4] == 1).all() and (v[slot, :, :4] == 3).all()


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias"])
def test_what_a_layout_cannot_honour_is_refused(name: str):
    q, k, v = random_qkv(3)
    extra: dict[str, Any] = {name: torch.ones(1)}
    with pytest.raises(ModelError, match=name):
        attention.attention(torch.nn.Identity(), q, k, v, None, layout=Packed((3,)), **extra)


@pytest.mark.parametrize("architecture", ["gemma2", "gpt_oss"])
def test_what_sdpa_leaves_out_is_an_error_without_a_layout_too(architecture: str):
    with pytest.raises(ModelError, match="eager"):
        tiny.plain_logits(tiny.model(architecture), [1, 2, 3])


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt2"])
def test_without_a_layout_a_model_is_as_it_always_was(architecture: str):
    """Padded batch, plain forward: as transformers' eager attention, whatever was done before."""
    ours, eager = tiny.model(architecture), tiny.model(architecture, attn="eager")
    with pytest.raises(ZeroDivisionError), attention.no_mask():
        raise ZeroDivisionError  # the mask comes back
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7], [0, 0, 0, 9, 8, 7, 6]])
    mask = (ids != 0).long()
    with torch.no_grad():
        a, b = (model(input_ids=ids, attention_mask=mask).logits[mask.bool()] for model in (ours, eager))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_a_window_that_only_the_mask_knew_is_noticed():
    with attention.no_mask() as windows:
        attention._mask(local_size=7)
        attention._mask(local_size=9)
        q, k, v = random_qkv(3)
        layer = torch.nn.Identity()
        layer.layer_idx = 0  # type: ignore[assignment]
        attention.attention(layer, q, k, v, None, layout=Packed((3,)), sliding_window=7)
    with pytest.raises(ModelError, match=r"\[9\]"):
        windows.check()


@pytest.mark.parametrize("common", [0.0, 300.0])
def test_in_bfloat16_large_scores_keep_their_differences(common: float):
    """As in Qwen2.5, whose keys share a large bias: it takes no part in the softmax, but rounds what does."""
    q, k, v = (x.bfloat16() for x in random_qkv(12))
    q[..., 0], k[..., 0] = 1.0, common
    exact = written_out(q, k, v, 1.0, None)
    packed = Packed((12,)).attend(0, q, k, v, 1.0, None)
    cache = SlotCache(1)
    cache.reserve(1, 12)
    Extend(cache, (0,), (0,), (11,)).attend(0, *(x[:, :, :11] for x in (q, k, v)), 1.0, None)
    decoded = Decode(cache, torch.tensor([11]), 12).attend(0, *(x[:, :, 11:] for x in (q, k, v)), 1.0, None)
    for ours, rows in ((packed, exact), (decoded, exact[:, 11:])):
        assert (ours.double() - rows).abs().max() < 0.02
