from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from rtrl_moe_pl.cells import GRU, LSTM, LeakyIntegrator, SimpleRNN, Stack, VanillaRNN
from tests.cells.cell_case import CellCase, copy_to_torch, random_run


class TestStack(CellCase):
    def make(self, learned_initial_state: bool = False) -> Stack:
        options: Any = {"learned_initial_state": learned_initial_state}
        return Stack([LSTM(self.input_size, 2, **options), GRU(2, 3, **options), SimpleRNN(3, 4, **options)])


class TestStackOfStacks(CellCase):
    def make(self, learned_initial_state: bool = False) -> Stack:
        options: Any = {"learned_initial_state": learned_initial_state}
        below = Stack([VanillaRNN(self.input_size, 4, **options), LSTM(4, 2, **options)])
        return Stack([below, LeakyIntegrator(2, 3, **options)])


class Foreign(nn.Module):
    """A user's own cell: only what the interface asks for, and a layer that happens to be called ``output``."""

    def __init__(self, state_size: int) -> None:
        super().__init__()
        self.state_size = state_size
        self.output = nn.Linear(state_size, state_size)

    def initial_state(self, batch_size: int) -> Tensor:
        return torch.ones(batch_size, self.state_size)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return self.output(s) + x.sum(-1, keepdim=True)


def test_equals_a_multilayer_torch_lstm() -> None:
    module = nn.LSTM(3, 4, num_layers=2, batch_first=True).double()
    cells = [LSTM(3, 4).double(), LSTM(4, 4).double()]
    for layer, cell in enumerate(cells):
        one = nn.LSTMCell(cell.input.in_features, 4).double()
        copy_to_torch(cell, one)
        for name, parameter in one.named_parameters():
            getattr(module, f"{name}_l{layer}").data.copy_(parameter)
    stack = Stack(cells)
    inputs, state = random_run(stack)
    h0, c0, h1, c1 = state.chunk(4, -1)
    expected, _ = module(inputs, (torch.stack([h0, h1]), torch.stack([c0, c1])))
    late = state  # control: the upper layer reads what the lower one had one step earlier
    for t, x in enumerate(inputs.unbind(1)):
        late = torch.cat([cells[0](x, late[:, :8]), cells[1](late[:, :4], late[:, 8:])], -1)
        state = stack(x, state)
        assert_close(stack.output(state), expected[:, t], rtol=1e-12, atol=1e-12)
        assert (late[:, 8:12] - expected[:, t]).abs().max() > 1e-3


def test_initial_states_side_by_side() -> None:
    stack = Stack([VanillaRNN(3, 2), Foreign(4)])
    assert torch.equal(stack.initial_state(2), torch.tensor([[0.0, 0, 1, 1, 1, 1]]).expand(2, 6))


def test_a_foreign_cell_hands_up_its_whole_state() -> None:
    below, above = Foreign(4), VanillaRNN(4, 2)
    stack = Stack([below, above])
    assert stack.input_size is None
    x, s = torch.randn(3, 5), torch.randn(3, 6)
    first = below(x, s[:, :4])
    assert torch.equal(stack(x, s), torch.cat([first, above(first, s[:, 4:])], -1))
    assert Stack([above, below]).output_size == 4


def test_sizes_that_do_not_fit() -> None:
    message = r"^cells\[1\] \(GRU\) has input_size 5 but reads 4 from cells\[0\] \(LSTM\): make its input_size 4$"
    with pytest.raises(ValueError, match=message):
        Stack([LSTM(3, 4), GRU(5, 4)])
    with pytest.raises(ValueError, match=r"^Stack needs at least one cell, got none$"):
        Stack([])
    with pytest.raises(TypeError, match=r"^cells\[1\] \(Linear\) is not a cell: it needs state_size"):
        Stack([LSTM(3, 4), nn.Linear(4, 4)])
