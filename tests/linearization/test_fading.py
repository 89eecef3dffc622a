"""Cells that contract fast: small numbers are flushed in time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rtrl_moe_pl.gradients import RTRL, parameter_paths
from tests.gradients.problem import assert_exact, make_problem, total_error, weighted_squares
from tests.gradients.user_cells.base import UserCell


class Fading(UserCell):
    """Forgets by a factor of 1e-4 a step: products of Jacobians soon fall below the smallest normal number."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.layer = nn.Linear(size, size)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return torch.tanh(self.input(x) + 1e-4 * self.layer(s))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("window", [1, 8, 40])
def test_a_contracting_cell_stays_right_and_normal(dtype: torch.dtype, window: int) -> None:
    torch.manual_seed(0)
    problem = make_problem(Fading(6).double(), steps=200)
    truth = assert_exact(problem, RTRL(window=window))
    modules = nn.ModuleList([problem.cell, problem.readout]).to(dtype)
    algorithm = RTRL(window=window)
    memory = algorithm.init(modules[0], 2)
    targets = tuple(t.to(dtype) for t in problem.targets)
    result = algorithm.run(modules[0], modules[1], problem.inputs.to(dtype), targets, weighted_squares, memory)
    grads = {name: g.double() for name, g in result.grads.items()}
    assert total_error(grads, truth) <= (1e-5 if dtype == torch.float32 else 1e-9)
    tiny = torch.finfo(dtype).tiny
    for p in memory.sensitivity.to_dense().values():
        assert not bool(((p != 0) & (p.abs() < tiny)).any())
    assert set(parameter_paths(memory).values()) == {"taps"}
