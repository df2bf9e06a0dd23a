"""Gradients added in place are autograd's, for every layer, whatever stays with autograd beside them."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from training.weight_gradients import accumulated_in_place

T, H, V = 7, 5, 11


class Tied(nn.Module):
    """An embedding whose weight is the head's, too, a layer with a bias, and a frozen one."""

    def __init__(self, padding_idx: int | None = None, recompute: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, H, padding_idx=padding_idx)
        self.layer = nn.Linear(H, H)
        self.frozen = nn.Linear(H, H).requires_grad_(False)
        self.norm = nn.LayerNorm(H)
        self.head = nn.Linear(H, V, bias=False)
        self.head.weight = self.embedding.weight
        self.recompute = recompute

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        block = lambda x: self.norm(torch.tanh(self.frozen(self.layer(x))))  # noqa: E731
        x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return self.head(x)


def gradients(model: nn.Module, batches: list[torch.Tensor], in_place: bool) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)

    def run() -> None:
        for ids in batches:
            model(ids).square().sum().backward()

    if in_place:
        with accumulated_in_place(model):
            run()
    else:
        run()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("padding_idx", [None, 3])
def test_sums_over_passes_equal_autograds(padding_idx, recompute):
    torch.manual_seed(0)
    model = Tied(padding_idx, recompute).double()
    batches = [torch.randint(0, V, (1, n)) for n in (T, 3)] + [torch.full((2, 2), 3)]
    expected = gradients(model, batches, in_place=False)
    found = gradients(model, batches, in_place=True)
    assert found.keys() == expected.keys() and "frozen.weight" not in found
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12)


def test_layers_are_really_taken_from_autograd():
    layer = nn.Linear(H, H, bias=False)
    with accumulated_in_place(layer):
        out = layer(torch.randn(T, H))
    assert type(out.grad_fn).__name__ == "_LinearBackward"
    embedding = nn.Embedding(V, H)
    with accumulated_in_place(embedding):
        out = embedding(torch.arange(T))
    assert type(out.grad_fn).__name__ == "_EmbeddingBackward"


def test_the_gradient_is_added_to_what_is_there_without_a_new_tensor():
    layer = nn.Linear(H, H, bias=False)
    layer.weight.grad = before = torch.ones(H, H)
    x = torch.randn(T, H)
    with accumulated_in_place(layer):
        layer(x).sum().backward()
    assert layer.weight.grad is before
    torch.testing.assert_close(before, 1 + x.sum(0).expand(H, H))


def test_what_computes_in_another_dtype_stays_with_autograd():
    layer = nn.Linear(H, H, bias=False)
    with accumulated_in_place(layer), torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(torch.randn(T, H))
    assert type(out.grad_fn).__name__ != "_LinearBackward"
    out.float().sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32


def test_without_gradients_nothing_is_recorded():
    layer = nn.Linear(H, H)
    with accumulated_in_place(layer), torch.no_grad():
        assert layer(torch.randn(T, H)).grad_fn is None


def test_layers_are_as_they_were_afterwards():
    model = Tied()
    model.layer.forward = own = lambda x: x
    with accumulated_in_place(model):
        assert "forward" in vars(model.head)
    assert "forward" not in vars(model.head) and model.layer.forward is own
