"""The long short-term memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rtrl_moe_pl.cells.base import Cell, at_least
from rtrl_moe_pl.cells.chrono import chrono_bias


class LSTM(Cell):
    """The LSTM of ``torch.nn.LSTMCell`` with the flat state s = [h, c]; state_size = 2 hidden_size.

        i, f, o = sigmoid(W_. x + b_. + U_. h)    g = tanh(W_g x + b_g + U_g h)
        c' = f c + i g                            h' = o tanh(c')

    ``input`` holds W and b, ``recurrent`` U, each with the rows i, f, g, o in this order.

    Args:
        input_size: D.
        hidden_size: H.
        max_memory: T, in steps, at least 2: begin with memories of 2..T steps spread over the units: the bias of f
            is drawn by ``chrono_bias``, that of i is its negative.
        learned_initial_state: see ``Cell``.

    Cost: 4 H (D + H + 1) multiply-adds a row.
    References: Hochreiter & Schmidhuber 1997, Neural Computation 9(8):1735-1780; Gers, Schmidhuber & Cummins 2000,
        Neural Computation 12(10):2451-2471.
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
        super().__init__(input_size, 2 * hidden_size, learned_initial_state=learned_initial_state)
        self.hidden_size = hidden_size
        self.input = nn.Linear(input_size, 4 * hidden_size)
        self.recurrent = nn.Linear(hidden_size, 4 * hidden_size, bias=False)
        if max_memory is not None:
            forget = chrono_bias(hidden_size, max_memory)
            with torch.no_grad():
                self.input.bias[: 2 * hidden_size] = torch.cat([-forget, forget])

    @property
    def output_size(self) -> int:
        return self.hidden_size

    def output(self, state: Tensor) -> Tensor:
        """h, the first half of the state, [B, H]."""
        return state[..., : self.hidden_size]

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        h, c = s.chunk(2, -1)
        write, keep, new, out = (self.input(x) + self.recurrent(h)).chunk(4, -1)
        c = torch.sigmoid(keep) * c + torch.sigmoid(write) * torch.tanh(new)
        return torch.cat([torch.sigmoid(out) * torch.tanh(c), c], -1)
