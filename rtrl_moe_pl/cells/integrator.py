"""A linear, diagonal cell that adds up what it reads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rtrl_moe_pl.cells.base import Cell, at_least


class LeakyIntegrator(Cell):
    """s' = decay s + W x, unit by unit; state_size = hidden_size.

    With decay 1 (a perfect integrator) a unit counts without end: a readout that sees only a difference of counts
    carries over to longer sequences. The state is linear in the inputs, so everything else is up to the readout, and
    it is unbounded: use decay < 1 for endless streams without starts.

    Args:
        input_size: D.
        hidden_size: H.
        decay: what is kept of a unit's state in one step, in (0, 1].
        learned_decay: learn one decay per unit, in (0, 1), as the sigmoid of ``decay_logit``; needs decay < 1.
        learned_initial_state: see ``Cell``.

    Raises:
        ValueError: if ``decay`` is outside its range.
    Cost: H (D + 1) multiply-adds a row.
    """

    decay_logit: nn.Parameter | None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        decay: float = 1.0,
        learned_decay: bool = False,
        learned_initial_state: bool = False,
    ) -> None:
        at_least(1, "hidden_size", hidden_size)
        super().__init__(input_size, hidden_size, learned_initial_state=learned_initial_state)
        if not 0 < decay <= 1:
            raise ValueError(f"decay must be above 0 and at most 1, got {decay}")
        if learned_decay and decay == 1:
            raise ValueError("a learned decay must begin below 1, got 1: set decay to 0.99, or learned_decay to false")
        self.decay = decay
        self.input = nn.Linear(input_size, hidden_size, bias=False)
        logit = nn.Parameter(torch.full((hidden_size,), float(decay)).logit()) if learned_decay else None
        self.register_parameter("decay_logit", logit)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        if self.decay_logit is None:
            return torch.add(self.input(x), s, alpha=self.decay)
        return torch.addcmul(self.input(x), torch.sigmoid(self.decay_logit), s)
