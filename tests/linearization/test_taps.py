"""What the recorder recognises, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from rtrl_moe_pl.linearization.taps import TapRecorder

ROWS, WIDTH = 6, 3
W = nn.Parameter(torch.randn(4, WIDTH))  # [out, in]
V = nn.Parameter(torch.randn(WIDTH, 4))  # [in, out]
B = nn.Parameter(torch.randn(4))
ONE = nn.Parameter(torch.randn(1))
NAMES = {id(W): "w", id(V): "v", id(B): "b", id(ONE): "one"}


def record(function: Callable[[Tensor], Tensor], x: Tensor | None = None) -> tuple[TapRecorder, Tensor, Tensor]:
    x = torch.randn(ROWS, WIDTH) if x is None else x
    recorder = TapRecorder(NAMES, x.shape[0], cut=True)
    return recorder, recorder.run(function, x), function(x)


SEEN: dict[str, tuple[Callable[[Tensor], Tensor], tuple[str | None, str | None, bool]]] = {
    "linear": (lambda x: F.linear(x, W, B), ("w", "b", False)),
    "linear without bias": (lambda x: F.linear(x, W), ("w", None, False)),
    "linear by keywords": (lambda x: F.linear(input=x, weight=W, bias=B), ("w", "b", False)),
    "operator": (lambda x: x @ V, ("v", None, True)),
    "matmul": (lambda x: torch.matmul(x, V), ("v", None, True)),
    "mm": (lambda x: torch.mm(x, V), ("v", None, True)),
    "method": (lambda x: x.matmul(V), ("v", None, True)),
    "addmm": (lambda x: torch.addmm(B, x, V), ("v", "b", True)),
    "several vectors": (lambda x: F.linear(x[:, None].expand(-1, 2, -1), W, B), ("w", "b", False)),
}


@pytest.mark.parametrize("name", sorted(SEEN))
def test_affine_maps(name: str) -> None:
    function, (weight, bias, transposed) = SEEN[name]
    recorder, output, expected = record(function)
    assert torch.equal(output, expected)
    (tap,) = recorder.taps
    assert (tap.weight, tap.bias, tap.transposed) == (weight, bias, transposed)
    assert tap.output.requires_grad
    assert tap.output.is_leaf
    assert tap.output.shape == expected.shape
    found = torch.autograd.grad(output.sum(), [tap.output, W, V, B], allow_unused=True)  # cut: all hangs on the tap
    assert found[1:] == (None, None, None)
    assert_close(found[0], torch.ones_like(tap.output))


IGNORED: dict[str, Callable[[Tensor], Tensor]] = {
    "parameter on the left": lambda x: (W @ x.T).T,
    "transposed weight": lambda x: F.linear(x, V.T),
    "einsum": lambda x: torch.einsum("bi,oi->bo", x, W),
    "changed weight": lambda x: F.linear(x, 2 * W, B),
    "changed bias": lambda x: F.linear(x, W, 2 * B),
    "broadcast bias": lambda x: F.linear(x, W, ONE),
    "detached weight": lambda x: F.linear(x, W.detach()),
    "scaled addmm": lambda x: torch.addmm(B, x, V, beta=0.5),
    "product of weights": lambda x: x @ (V @ W) @ V.detach(),
}


@pytest.mark.parametrize("name", sorted(IGNORED))
def test_other_uses_are_left_in_the_graph(name: str) -> None:
    recorder, output, expected = record(IGNORED[name])
    assert recorder.taps == []
    assert torch.equal(output, expected)


def test_layers_without_autograd_are_no_taps() -> None:
    def stopped(x: Tensor) -> Tensor:
        with torch.no_grad():
            seen = F.linear(x, W, B)
        return torch.tanh(seen) + F.linear(x, W).detach()

    recorder, output, _ = record(stopped)
    assert [tap.bias for tap in recorder.taps] == [None]
    assert not output.requires_grad


def test_lookup() -> None:
    ids = torch.tensor([0, 2, 2, 1])
    table = nn.Parameter(torch.randn(3, 5))
    recorder = TapRecorder({id(table): "table"}, 4, cut=True)
    assert torch.equal(recorder.run(lambda i: F.embedding(i, table), ids), table[ids])
    (tap,) = recorder.taps
    assert tap.is_lookup
    assert tap.input is ids
    special: list[dict[str, Any]] = [{"padding_idx": 1}, {"scale_grad_by_freq": True}]
    for settings in special:
        recorder = TapRecorder({id(table): "table"}, 4, cut=True)
        recorder.run(lambda i, settings=settings: F.embedding(i, table, **settings), ids)
        assert recorder.taps == []


def test_layer_norm_is_split_into_gain_and_bias() -> None:
    norm = nn.LayerNorm(WIDTH)
    nn.init.normal_(norm.weight)
    x = torch.randn(ROWS, 2, WIDTH)
    recorder = TapRecorder({id(p): n for n, p in norm.named_parameters()}, ROWS, cut=True)
    assert_close(recorder.run(norm, x), norm(x))
    assert [(tap.weight, tap.bias, tap.input) for tap in recorder.taps] == [
        (None, "weight", None),
        (None, "bias", None),
    ]
    assert all(tap.output.shape == (ROWS, 1, WIDTH) for tap in recorder.taps)


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.GRUCell])
def test_fused_cells_are_opened(kind: type[nn.RNNCell] | type[nn.GRUCell]) -> None:
    cell = kind(WIDTH, 4).double()
    names = {id(p): n for n, p in cell.named_parameters()}
    x, h = torch.randn(ROWS, WIDTH, dtype=torch.float64), torch.randn(ROWS, 4, dtype=torch.float64)
    recorder = TapRecorder(names, ROWS, cut=True)
    assert_close(recorder.run(cell, x, h), cell(x, h))
    assert [(tap.weight, tap.bias) for tap in recorder.taps] == [("weight_ih", "bias_ih"), ("weight_hh", "bias_hh")]


def test_outputs_may_be_changed_in_place_and_inputs_not() -> None:
    def outputs(x: Tensor) -> Tensor:
        new = F.linear(x, W, B)
        new += x @ V
        return new.tanh_()

    recorder, output, expected = record(outputs)
    assert torch.equal(output, expected)
    assert all(tap.is_unchanged for tap in recorder.taps)
    assert torch.equal(recorder.taps[0].output, F.linear(recorder.taps[0].input, W, B))  # type: ignore[arg-type]

    def inputs(x: Tensor) -> Tensor:
        inner = 2 * x
        new = F.linear(inner, W, B)
        inner.mul_(3)
        return new + inner.sum(-1, keepdim=True)

    recorder, _, _ = record(inputs)
    assert [tap.is_unchanged for tap in recorder.taps] == [False]
