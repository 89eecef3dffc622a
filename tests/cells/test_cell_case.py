"""Negative controls: the inherited checks refuse cells that break what they check."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from rtrl_moe_pl.cells import VanillaRNN
from tests.cells.cell_case import assert_gradients, assert_pure, assert_rows_alone


class CoupledRows(VanillaRNN):
    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        new = super().forward(x, s)
        return new - 1e-6 * new.mean(0)


class WritesItsState(VanillaRNN):
    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return s.copy_(super().forward(x, s))


class Noisy(VanillaRNN):
    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        new = super().forward(x, s)
        return new + 1e-6 * torch.randn_like(new)


class CutsItsState(VanillaRNN):
    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return super().forward(x, s.detach())


def test_coupled_rows_are_found() -> None:
    with pytest.raises(AssertionError):
        assert_rows_alone(CoupledRows(3, 5).double())


@pytest.mark.parametrize("broken", [WritesItsState, Noisy])
def test_impure_cells_are_found(broken: type[VanillaRNN]) -> None:
    with pytest.raises(AssertionError):
        assert_pure(broken(3, 5).double())


def test_a_cut_gradient_is_found() -> None:
    with pytest.raises(GradcheckError):
        assert_gradients(CutsItsState(3, 5).double())
