from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from rtrl_moe_pl.cells import GRU
from tests.cells.cell_case import CellCase, copy_to_torch, random_run, run


class TestGRU(CellCase):
    def make(self, learned_initial_state: bool = False) -> GRU:
        return GRU(self.input_size, 5, max_memory=10, learned_initial_state=learned_initial_state)


@given(st.integers(1, 6), st.integers(1, 7))
def test_equals_torch(input_size: int, hidden_size: int) -> None:
    cell, module = GRU(input_size, hidden_size).double(), nn.GRUCell(input_size, hidden_size).double()
    copy_to_torch(cell, module)
    inputs, state = random_run(cell)
    assert_close(run(cell, inputs, state), run(module, inputs, state), rtol=1e-12, atol=1e-12)


def test_reset_before_the_product_differs() -> None:
    cell = GRU(3, 5).double()
    inputs, s = random_run(cell)
    x = inputs[:, 0]
    reset, keep = torch.sigmoid((cell.input(x) + cell.recurrent(s))[:, :10]).chunk(2, -1)
    new = torch.tanh(cell.input(x)[:, 10:] + cell.recurrent(reset * s)[:, 10:])
    assert ((1 - keep) * new + keep * s - cell(x, s)).abs().max() > 1e-3


def test_chrono_bias_is_on_the_keep_gate_alone() -> None:
    cell = GRU(3, 64, max_memory=100)
    bias = (cell.input.bias + cell.recurrent.bias)[64:128]
    memory = 1 / (1 - torch.sigmoid(bias.double()))  # steps
    assert memory.min() >= 2 - 1e-4
    assert memory.max() <= 100 + 1e-3
    assert memory.max() - memory.min() > 50
    for layer in (cell.input, cell.recurrent):
        assert layer.bias[:64].abs().max() < 1
        assert layer.bias[128:].abs().max() < 1
    plain = GRU(3, 64)
    assert (plain.input.bias + plain.recurrent.bias)[64:128].max() < 1.5
