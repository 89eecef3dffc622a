"""Cells of torch.nn as cells of this package."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rtrl_moe_pl.cells.base import Cell


class TorchCell(Cell):
    """A ``torch.nn.RNNCell``, ``GRUCell`` or ``LSTMCell`` behind the cell interface, with exactly its numbers.

    The state of an LSTMCell is flat, s = [h, c]. The module is kept, not copied, as ``cell``. PyTorch has no batching
    rule for an LSTMCell's step: it cannot be called under ``torch.func.vmap`` (batched cotangents of it can be taken).

    Args:
        cell: the module.
        learned_initial_state: see ``Cell``.

    Raises:
        TypeError: if the module is of another class.
    """

    def __init__(self, cell: nn.RNNCellBase, *, learned_initial_state: bool = False) -> None:
        if not isinstance(cell, nn.RNNCell | nn.GRUCell | nn.LSTMCell):
            raise TypeError(f"TorchCell wraps a torch.nn RNNCell, GRUCell or LSTMCell, got {type(cell).__name__}")
        is_lstm = isinstance(cell, nn.LSTMCell)
        state_size = 2 * cell.hidden_size if is_lstm else cell.hidden_size
        super().__init__(cell.input_size, state_size, learned_initial_state=learned_initial_state)
        self.cell = cell
        self._is_lstm = is_lstm

    @property
    def output_size(self) -> int:
        return self.cell.hidden_size

    def output(self, state: Tensor) -> Tensor:
        """The hidden state h [B, H]: for an LSTMCell the first half of the state."""
        return state[..., : self.cell.hidden_size]

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        if self._is_lstm:
            return torch.cat(self.cell(x, s.chunk(2, -1)), -1)
        return self.cell(x, s)
