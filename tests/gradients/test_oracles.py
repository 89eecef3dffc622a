"""Numbers that were worked out elsewhere, and finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rtrl_moe_pl.cells import GRU, LSTM, Stack
from rtrl_moe_pl.gradients import BPTT, RTRL, TBPTT, sequence_gradient
from tests.gradients.problem import make_problem, weighted_squares


class LinearRecurrentUnit(nn.Module):
    """x' = lambda x + gamma B u over complex numbers, written in real arithmetic: the state is [Re x, Im x]."""

    state_size = 2

    def __init__(self) -> None:
        super().__init__()
        self.lam = nn.Parameter(torch.tensor([0.5, 0.0], dtype=torch.float64))
        self.gamma = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor([2.0, 2.0], dtype=torch.float64))

    def initial_state(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, 2, dtype=torch.float64)

    def forward(self, u: Tensor, s: Tensor) -> Tensor:
        real, imaginary = s.unbind(-1)
        turned = torch.stack(
            [self.lam[0] * real - self.lam[1] * imaginary, self.lam[0] * imaginary + self.lam[1] * real], -1
        )
        return turned + self.gamma * u * self.b


class RealPart(nn.Module):
    """Re(C x) with C = 2 + i."""

    def forward(self, s: Tensor) -> Tensor:
        return s @ torch.tensor([[2.0], [-1.0]], dtype=torch.float64)


def _half_squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (outputs - targets).square().sum()


@pytest.mark.parametrize("algorithm", [BPTT(), RTRL(window=1), RTRL(window=2), RTRL(window=3)], ids=repr)
@pytest.mark.parametrize("lanes", [1, 3])
def test_linear_recurrent_unit(algorithm: BPTT | RTRL, lanes: int) -> None:
    """lambda .5, gamma 1, B = 2 + 2i, C = 2 + i, u = 1, 2, 3, y = 1 (Zucchet et al. 2023, their test)."""
    inputs = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)[None, :, None].expand(lanes, -1, -1)
    result = sequence_gradient(
        algorithm, LinearRecurrentUnit(), RealPart(), inputs, torch.ones_like(inputs), _half_squares
    )
    assert result.loss == lanes * 36.625
    torch.testing.assert_close(result.grads["cell.lam"], lanes * torch.tensor([53.0, -159.0], dtype=torch.float64))
    torch.testing.assert_close(result.grads["cell.gamma"], lanes * torch.tensor(85.75, dtype=torch.float64))
    torch.testing.assert_close(result.grads["cell.b"], lanes * torch.tensor([85.75, -42.875], dtype=torch.float64))


def test_linear_recurrent_unit_truncated() -> None:
    """Control: with windows of one step the decay is credited with the last state alone, 4 x 2 + 7.5 x 5."""
    inputs = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)[None, :, None]
    result = sequence_gradient(
        TBPTT(window=1), LinearRecurrentUnit(), RealPart(), inputs, torch.ones_like(inputs), _half_squares
    )
    torch.testing.assert_close(result.grads["cell.lam"], torch.tensor([45.5, -136.5], dtype=torch.float64))


class Affine(nn.Module):
    """s' = W s + V x + b, with identity activation."""

    state_size = 2

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.eye(2, dtype=torch.float64))
        self.v = nn.Parameter(torch.eye(2, dtype=torch.float64))
        self.b = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def initial_state(self, batch_size: int) -> Tensor:
        return torch.ones(batch_size, 2, dtype=torch.float64)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return nn.functional.linear(s, self.w) + nn.functional.linear(x, self.v, self.b)


def test_hand_case_of_the_influence_update() -> None:
    """W = I, a = 1, x = 2, identity activation: an influence of ones becomes 1 + [I, I, 2I, 2I, I]."""
    cell, algorithm = Affine(), RTRL(window=1)
    memory = algorithm.init(cell, 1)
    ones = {f"cell.{name}": torch.ones(1, 2, *p.shape, dtype=torch.float64) for name, p in cell.named_parameters()}
    memory.load_state_dict(
        {"state": torch.ones(1, 2, dtype=torch.float64), "fresh": False, "sensitivity": ones, "tail": {}},
    )
    inputs = torch.full((1, 1, 2), 2.0, dtype=torch.float64)
    algorithm.step(cell, nn.Identity(), inputs, torch.zeros_like(inputs), _half_squares, memory)
    dense = memory.sensitivity.to_dense()
    eye = torch.eye(2, dtype=torch.float64)
    # [S, 2 (row of the weight), columns a_1, a_2, x_1, x_2, 1]
    joined = torch.cat([dense["cell.w"][0], dense["cell.v"][0], dense["cell.b"][0][..., None]], -1)
    expected = torch.stack([1 + factor * eye for factor in (1.0, 1.0, 2.0, 2.0, 1.0)], -1)
    assert torch.equal(joined, expected)


def test_finite_differences() -> None:
    """Central differences of the loss itself, along random directions of every parameter."""
    torch.manual_seed(0)
    cell = Stack([GRU(3, 4, learned_initial_state=True), LSTM(4, 3)]).double()
    starts = torch.zeros(2, 8, dtype=torch.bool)
    starts[1, 4] = True
    problem = make_problem(cell, batch=2, steps=8, starts=starts)
    result = problem.solve(RTRL(window=3))
    truncated = problem.solve(TBPTT(window=3))
    missed = 0
    for name, p in problem.names.items():
        direction, size = torch.randn_like(p), 1e-5
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                p += sign * size * direction
                losses.append(problem.solve(BPTT()).loss)
                p -= sign * size * direction
        slope = (losses[0] - losses[1]) / (2 * size)
        assert abs(float((result.grads[name] * direction).sum()) - slope) <= 1e-6 * max(1.0, abs(slope)), name
        missed += abs(float((truncated.grads[name] * direction).sum()) - slope) > 1e-3 * max(1.0, abs(slope))
    assert missed >= 3
    assert weighted_squares(result.outputs, problem.targets).item() == pytest.approx(result.loss, rel=1e-12)
