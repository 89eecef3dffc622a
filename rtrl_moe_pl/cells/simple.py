"""A gated residual cell whose state keeps its length."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rtrl_moe_pl.cells.base import Cell, at_least


class SimpleRNN(Cell):
    """c = ReLU(W_h s + W_x x), a = sigmoid(W_g s), s' = LN((1 - a) s + a c); state_size = hidden_size.

    LN is layer normalisation without gain and bias, so a state never exceeds ||s|| = sqrt(H), whatever the weights
    and the inputs. It also makes every unit depend on every other: the cell has no element-wise Jacobian.

    Args:
        input_size: D.
        hidden_size: H, at least 2 (one unit alone is normalised to zero).
        learned_initial_state: see ``Cell``.

    Cost: H (D + 2 H) multiply-adds a row.
    """

    def __init__(self, input_size: int, hidden_size: int, *, learned_initial_state: bool = False) -> None:
        at_least(2, "hidden_size", hidden_size)
        super().__init__(input_size, hidden_size, learned_initial_state=learned_initial_state)
        self.input = nn.Linear(input_size, hidden_size, bias=False)  # W_x
        self.recurrent = nn.Linear(hidden_size, 2 * hidden_size, bias=False)  # W_h above W_g
        self.norm = nn.LayerNorm(hidden_size, elementwise_affine=False)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        candidate, gate = self.recurrent(s).chunk(2, -1)
        candidate = torch.relu(candidate + self.input(x))
        return self.norm(torch.lerp(s, candidate, torch.sigmoid(gate)))
