"""Run a cell and a readout over sequences without gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rtrl_moe_pl.cells.base import require_inputs
from rtrl_moe_pl.gradients.windows import read_out, starting_steps, unroll

WINDOW = 256  # steps whose states are kept at a time: memory does not grow with the length


@torch.no_grad()
def evaluate(cell: nn.Module, readout: nn.Module, inputs: Tensor, starts: Tensor | None = None) -> Tensor:
    """Outputs [B, T, O] for inputs [B, T, ..], begun at the initial state, and anew where ``starts`` [B, T] is true."""
    return go_on(cell, readout, inputs, starts, None)[0]


@torch.no_grad()
def go_on(
    cell: nn.Module, readout: nn.Module, inputs: Tensor, starts: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, O], begun at a state [B, S] (None: the initial one), and the state after the last step."""
    require_inputs(cell, inputs)
    initial: Tensor = cell.initial_state(inputs.shape[0])  # type: ignore[operator]
    state = initial if state is None else state
    outputs = []
    for begin in range(0, inputs.shape[1], WINDOW):
        window = inputs[:, begin : begin + WINDOW]
        window_starts = None if starts is None else starts[:, begin : begin + WINDOW]
        starting = starting_steps(window_starts, window.shape[1])
        _, states = unroll(cell, window.unbind(1), state, initial, window_starts, starting)
        outputs.append(read_out(readout, torch.stack(states), window))
        state = states[-1]
    return torch.cat(outputs, 1), state
