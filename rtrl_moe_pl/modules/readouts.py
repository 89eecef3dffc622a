"""Readouts: from a state to outputs."""

from __future__ import annotations

from torch import Tensor, nn


class MLP(nn.Module):
    """One hidden ReLU layer: [.., input_size] -> [.., output_size].

    Args:
        input_size: the cell's state_size.
        hidden_size: hidden units.
        output_size: outputs.
    """

    def __init__(self, input_size: int, hidden_size: int, output_size: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(input_size, hidden_size)
        self.output = nn.Linear(hidden_size, output_size)

    def forward(self, state: Tensor) -> Tensor:
        return self.output(self.hidden(state).relu())
