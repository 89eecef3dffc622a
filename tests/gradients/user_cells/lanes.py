"""Randomness, and lanes that see each other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.gradients.user_cells.base import UserCell, parameter


class Dropped(UserCell):
    """Dropout of the recurrent sum, whose matrix has no rule; the initial state is learned, at first zero."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.weight, self.initial, self.dropout = parameter(4, 4), nn.Parameter(torch.zeros(4)), nn.Dropout(rate)

    def initial_state(self, batch_size: int) -> Tensor:
        return self.initial.expand(batch_size, -1)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return torch.tanh(self.input(x) + self.dropout(torch.einsum("ij,bj->bi", self.weight, self.dropout(s))))


class LaneMean(UserCell):
    """The batch's mean is taken off the state."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        new = self.scale * self.input(x) + s
        return new - 0.5 * new.mean(0)


class InputMean(UserCell):
    """The batch's mean is taken off the input: lanes' states stay independent."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return torch.tanh(self.input(x - x.mean(0)) + self.layer(s))


class NormalisedBatch(UserCell):
    """Batch normalisation of the state."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return torch.tanh(self.input(x) + self.layer(s))
