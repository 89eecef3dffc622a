from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from rtrl_moe_pl.cells import SimpleRNN
from tests.cells.cell_case import CellCase, random_run


class TestSimpleRNN(CellCase):
    def make(self, learned_initial_state: bool = False) -> SimpleRNN:
        return SimpleRNN(self.input_size, 5, learned_initial_state=learned_initial_state)


def test_equals_its_formula() -> None:
    cell = SimpleRNN(3, 5).double()
    inputs, s = random_run(cell)
    x = inputs[:, 0]
    w_h, w_g = cell.recurrent.weight[:5], cell.recurrent.weight[5:]
    c, a = torch.relu(s @ w_h.T + x @ cell.input.weight.T), torch.sigmoid(s @ w_g.T)
    mixed = (1 - a) * s + a * c
    centred = mixed - mixed.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert_close(cell(x, s), expected, rtol=1e-12, atol=1e-12)
    swapped = (1 - a) * c + a * s  # the gate the other way round must not pass
    assert (cell(x, s) - nn.functional.layer_norm(swapped, (5,))).abs().max() > 0.1


@torch.no_grad()
def largest_norm(cell: SimpleRNN, steps: int) -> Tensor:
    state, largest = cell.initial_state(8), torch.zeros(())
    for _ in range(steps):
        state = cell(10 * torch.randn(8, cell.input.in_features), state)
        largest = torch.maximum(largest, state.norm(dim=-1).max())
    return largest


def large_cell() -> SimpleRNN:
    cell = SimpleRNN(3, 16)
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.mul_(5)
    return cell


def test_state_is_bounded_over_10000_steps() -> None:
    largest = largest_norm(large_cell(), 10_000)
    assert largest <= 4 * (1 + 1e-5)  # sqrt(16), up to rounding
    assert largest > 3.9


def test_state_is_not_bounded_without_the_norm() -> None:
    cell = large_cell()
    cell.norm = nn.Identity()  # type: ignore[assignment]
    assert not largest_norm(cell, 200) <= 100


def test_one_unit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^hidden_size must be at least 2, got 1$"):
        SimpleRNN(3, 1)
