"""The gated recurrent unit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rtrl_moe_pl.cells.base import Cell, at_least
from rtrl_moe_pl.cells.chrono import chrono_bias


class GRU(Cell):
    """The GRU with the reset gate applied after the product, as in ``torch.nn.GRUCell``; state_size = hidden_size.

        r = sigmoid(W_r x + b_r + U_r s + d_r)        z = sigmoid(W_z x + b_z + U_z s + d_z)
        n = tanh(W_n x + b_n + r * (U_n s + d_n))     s' = (1 - z) n + z s

    ``input`` holds W and b, ``recurrent`` U and d, each with the rows r, z, n in this order.

    Args:
        input_size: D.
        hidden_size: H.
        max_memory: T, in steps, at least 2: begin with memories of 2..T steps spread over the units (``chrono_bias``).
        learned_initial_state: see ``Cell``.

    Cost: 3 H (D + H + 2) multiply-adds a row.
    References: Cho et al. 2014, arXiv:1406.1078.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        max_memory: int | None = None,
        learned_initial_state: bool = False,
    ) -> None:
        at_least(1, "hidden_size", hidden_size)
        super().__init__(input_size, hidden_size, learned_initial_state=learned_initial_state)
        self.input = nn.Linear(input_size, 3 * hidden_size)
        self.recurrent = nn.Linear(hidden_size, 3 * hidden_size)
        self._sizes = (2 * hidden_size, hidden_size)
        if max_memory is not None:
            keep = slice(hidden_size, 2 * hidden_size)  # z is the share of the old state that is kept
            with torch.no_grad():
                self.input.bias[keep] = chrono_bias(hidden_size, max_memory)
                self.recurrent.bias[keep] = 0

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        x_gates, x_new = self.input(x).split(self._sizes, -1)
        s_gates, s_new = self.recurrent(s).split(self._sizes, -1)
        reset, keep = torch.sigmoid(x_gates + s_gates).chunk(2, -1)
        return torch.lerp(torch.tanh(torch.addcmul(x_new, reset, s_new)), s, keep)
