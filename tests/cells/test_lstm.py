from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from rtrl_moe_pl.cells import LSTM, TorchCell
from tests.cells.cell_case import CellCase, copy_to_torch, random_run, run


class TestLSTM(CellCase):
    def make(self, learned_initial_state: bool = False) -> LSTM:
        return LSTM(self.input_size, 4, max_memory=10, learned_initial_state=learned_initial_state)


@given(st.integers(1, 6), st.integers(1, 7))
def test_equals_torch(input_size: int, hidden_size: int) -> None:
    cell, module = LSTM(input_size, hidden_size).double(), nn.LSTMCell(input_size, hidden_size).double()
    copy_to_torch(cell, module)
    inputs, state = random_run(cell)
    assert_close(run(cell, inputs, state), run(TorchCell(module), inputs, state), rtol=1e-12, atol=1e-12)


def test_hidden_and_memory_are_not_exchangeable() -> None:
    cell, module = LSTM(3, 5).double(), nn.LSTMCell(3, 5).double()
    copy_to_torch(cell, module)
    inputs, state = random_run(cell)
    x, swapped = inputs[:, 0], state.roll(5, -1)
    assert (cell(x, swapped) - TorchCell(module)(x, state)).abs().max() > 1e-2


def test_output_is_the_hidden_half() -> None:
    cell, module = LSTM(3, 5).double(), nn.LSTMCell(3, 5).double()
    copy_to_torch(cell, module)
    inputs, state = random_run(cell)
    h, c = module(inputs[:, 0], tuple(state.chunk(2, -1)))
    output = cell.output(cell(inputs[:, 0], state))
    assert_close(output, h, rtol=1e-12, atol=1e-12)
    assert (output - c).abs().max() > 1e-2


def test_chrono_bias_is_on_forget_and_input_gates() -> None:
    write, keep, new, out = LSTM(3, 64, max_memory=100).input.bias.chunk(4)
    memory = 1 / (1 - torch.sigmoid(keep.double()))  # steps
    assert memory.min() >= 2 - 1e-4
    assert memory.max() <= 100 + 1e-3
    assert memory.max() - memory.min() > 50
    assert torch.equal(write, -keep)
    assert torch.cat([new, out]).abs().max() < 1
    assert LSTM(3, 64).input.bias.abs().max() < 1
