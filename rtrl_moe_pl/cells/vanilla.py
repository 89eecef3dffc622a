"""The plain recurrent network of Elman."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from rtrl_moe_pl.cells.base import Cell, at_least


class VanillaRNN(Cell):
    """s' = f(W_x x + b + W_h s), with f = tanh or ReLU; state_size = hidden_size.

    Args:
        input_size: D.
        hidden_size: H.
        nonlinearity: f. With ``"relu"`` the state is unbounded.
        recurrent_init: how W_h begins: ``"uniform"`` in +-1/sqrt(H), ``"orthogonal"``, or ``"identity"``, which
            with ReLU keeps what it has counted (Le, Jaitly & Hinton 2015).
        learned_initial_state: see ``Cell``.

    Cost: H (D + H + 1) multiply-adds a row.
    References: Elman 1990, Cognitive Science 14(2):179-211; Le, Jaitly & Hinton 2015, arXiv:1504.00941.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        nonlinearity: Literal["tanh", "relu"] = "tanh",
        recurrent_init: Literal["uniform", "orthogonal", "identity"] = "uniform",
        learned_initial_state: bool = False,
    ) -> None:
        at_least(1, "hidden_size", hidden_size)
        super().__init__(input_size, hidden_size, learned_initial_state=learned_initial_state)
        functions = {"tanh": torch.tanh, "relu": torch.relu}
        if nonlinearity not in functions:
            raise ValueError(f"nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
        self._activation = functions[nonlinearity]
        self.input = nn.Linear(input_size, hidden_size)
        self.recurrent = nn.Linear(hidden_size, hidden_size, bias=False)
        if recurrent_init == "orthogonal":
            nn.init.orthogonal_(self.recurrent.weight)
        elif recurrent_init == "identity":
            nn.init.eye_(self.recurrent.weight)
        elif recurrent_init != "uniform":  # which is what nn.Linear does
            raise ValueError(f"recurrent_init must be 'uniform', 'orthogonal' or 'identity', got {recurrent_init!r}")

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return self._activation(self.input(x) + self.recurrent(s))
