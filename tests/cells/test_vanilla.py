from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from rtrl_moe_pl.cells import VanillaRNN
from tests.cells.cell_case import CellCase, copy_to_torch, random_run, run


class TestVanillaRNN(CellCase):
    def make(self, learned_initial_state: bool = False) -> VanillaRNN:
        return VanillaRNN(self.input_size, 5, learned_initial_state=learned_initial_state)


class TestReLU(CellCase):
    def make(self, learned_initial_state: bool = False) -> VanillaRNN:
        cell = VanillaRNN(self.input_size, 5, nonlinearity="relu", learned_initial_state=learned_initial_state)
        nn.init.uniform_(cell.recurrent.weight, 0.1, 0.3)  # every unit stays open in some lane
        nn.init.uniform_(cell.input.bias, 1, 2)
        return cell


@given(st.integers(1, 6), st.integers(1, 7), st.sampled_from(["tanh", "relu"]))
def test_equals_torch(input_size: int, hidden_size: int, nonlinearity: str) -> None:
    cell = VanillaRNN(input_size, hidden_size, nonlinearity=nonlinearity).double()  # type: ignore[arg-type]
    module = nn.RNNCell(input_size, hidden_size, nonlinearity=nonlinearity).double()
    copy_to_torch(cell, module)
    inputs, state = random_run(cell)
    assert_close(run(cell, inputs, state), run(module, inputs, state), rtol=1e-12, atol=1e-12)


def test_tanh_and_relu_differ() -> None:
    cell = VanillaRNN(3, 5).double()
    module = nn.RNNCell(3, 5, nonlinearity="relu").double()
    copy_to_torch(cell, module)
    inputs, state = random_run(cell)
    assert (run(cell, inputs, state) - run(module, inputs, state)).abs().max() > 0.1


def test_recurrent_inits() -> None:
    assert torch.equal(VanillaRNN(3, 5, recurrent_init="identity").recurrent.weight, torch.eye(5))
    weight = VanillaRNN(3, 5, recurrent_init="orthogonal").recurrent.weight
    assert_close(weight @ weight.T, torch.eye(5), rtol=0, atol=1e-6)
    weight = VanillaRNN(3, 5).recurrent.weight
    assert weight.abs().max() <= 5**-0.5
    assert (weight @ weight.T - torch.eye(5)).abs().max() > 0.1


def test_unknown_options() -> None:
    with pytest.raises(ValueError, match=r"^nonlinearity must be 'tanh' or 'relu', got 'gelu'$"):
        VanillaRNN(3, 5, nonlinearity="gelu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^recurrent_init must be .*, got 'zeros'$"):
        VanillaRNN(3, 5, recurrent_init="zeros")  # type: ignore[arg-type]
