"""What user cells share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH = 3  # of an input
VOCABULARY = 5


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * 0.6)


class UserCell(nn.Module):
    """What most of them share: an input layer, and a state that starts at zero."""

    def __init__(self, state_size: int = 4) -> None:
        super().__init__()
        self.state_size = state_size
        self.input = nn.Linear(WIDTH, state_size)

    def initial_state(self, batch_size: int) -> Tensor:
        return next(self.parameters()).new_zeros(batch_size, self.state_size)
