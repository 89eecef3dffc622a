"""Readouts: from a state to outputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rtrl_moe_pl.cells.base import at_least


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


class SlotAttention(nn.Module):
    """Attends over a state's slots with a query made from the input: state [N, S d], input [N, D] -> [N, output_size].

    Args:
        input_size: D, the width of the data's inputs: the number of tokens.
        num_slots, slot_size: as the cell's.
        output_size: outputs.
    """

    takes_input = True

    def __init__(self, input_size: int, num_slots: int, slot_size: int, output_size: int) -> None:
        super().__init__()
        self.input_size = at_least(1, "input_size", input_size)
        self.num_slots, self.slot_size = at_least(1, "num_slots", num_slots), at_least(1, "slot_size", slot_size)
        self.address = nn.Parameter(torch.randn(num_slots, slot_size))
        self.query = nn.Linear(input_size, slot_size)
        self.source = nn.Linear(slot_size, 2 * slot_size)  # keys above values
        self.output = nn.Linear(slot_size, output_size)

    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        slots = state.unflatten(-1, (self.num_slots, self.slot_size))
        keys, values = self.source(slots + self.address).chunk(2, -1)  # [N, S, d] each
        scores = torch.einsum("nd,nsd->ns", self.query(x), keys) / self.slot_size**0.5
        return self.output(torch.einsum("ns,nsd->nd", torch.softmax(scores, -1), values))
