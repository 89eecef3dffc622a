"""Steps of a routed cell, differentiated with respect to the slots that they read and write, and no others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rtrl_moe_pl.cells.routed import RoutedCell, Routing, put_slots, take_slots


@dataclass(frozen=True)
class RoutedInputs:
    """Inputs of N steps and what these chose."""

    x: Tensor  # [N, ..]
    routing: Routing  # of [N, ..]

    def __getitem__(self, rows: Tensor | slice) -> RoutedInputs:
        return RoutedInputs(self.x[rows], Routing(*(index[rows] for index in self.routing)))


class RoutedUpdate(nn.Module):
    """What a routed cell computes, from the slots it reads and writes [N, (R + W) d] to those it writes [N, W d]."""

    def __init__(self, cell: RoutedCell) -> None:
        super().__init__()
        self.cell = cell

    def gather(self, inputs: RoutedInputs, states: Tensor) -> Tensor:
        """Of states [N, S] what ``forward`` is given."""
        slots = states.unflatten(-1, (self.cell.num_slots, self.cell.slot_size))
        return take_slots(slots, torch.cat([inputs.routing.read, inputs.routing.written], 1)).flatten(1)

    def scatter(self, inputs: RoutedInputs, states: Tensor, written: Tensor) -> Tensor:
        """The states [N, S] with what ``forward`` returned in place."""
        slots = states.unflatten(-1, (self.cell.num_slots, self.cell.slot_size))
        return put_slots(slots, inputs.routing.written, written.unflatten(-1, (-1, self.cell.slot_size))).flatten(1)

    def forward(self, inputs: RoutedInputs, slots: Tensor) -> Tensor:
        slots = slots.unflatten(-1, (-1, self.cell.slot_size))
        read, old = slots.split([inputs.routing.read.shape[1], inputs.routing.written.shape[1]], 1)
        return self.cell.update(inputs.x, read, old, inputs.routing).flatten(1)
