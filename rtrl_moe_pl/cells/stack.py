"""Cells on top of each other, as one cell."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from rtrl_moe_pl.cells.base import Cell


class Stack(Cell):
    """Layer l reads what layer l - 1 has just computed; the state is the layers' states side by side, lowest first.

    What a layer hands upwards is its ``output(state)`` of width ``output_size``, or its whole state where it has no
    ``output_size``. A gradient algorithm sees one cell, so it is exact across layers.

    Args:
        cells: the layers, lowest first: any modules with ``state_size``, ``initial_state`` and ``forward``.

    Raises:
        TypeError: if one of them is not a cell.
        ValueError: without cells, or if a cell's ``input_size`` is not the width of what it reads.
    """

    def __init__(self, cells: Sequence[Cell | nn.Module]) -> None:
        if not cells:
            raise ValueError("Stack needs at least one cell, got none")
        for i, cell in enumerate(cells):
            if not all(hasattr(cell, name) for name in ("state_size", "initial_state", "forward")):
                raise TypeError(
                    f"cells[{i}] ({type(cell).__name__}) is not a cell: it needs state_size, initial_state and forward"
                )
        for i, (below, above) in enumerate(pairwise(cells)):
            given, needed = _output_size(below), getattr(above, "input_size", None)
            if needed is not None and needed != given:
                raise ValueError(
                    f"cells[{i + 1}] ({type(above).__name__}) has input_size {needed} but reads {given} from "
                    f"cells[{i}] ({type(below).__name__}): make its input_size {given}"
                )
        layers: list[Any] = list(cells)
        sizes: list[int] = [cell.state_size for cell in layers]
        super().__init__(getattr(cells[0], "input_size", None), sum(sizes))
        self.cells = nn.ModuleList(cells)
        self._sizes = sizes

    def _layers(self) -> Iterable[Any]:  # ModuleList promises nn.Modules, not cells
        return self.cells

    @property
    def output_size(self) -> int:
        return _output_size(self.cells[-1])

    def output(self, state: Tensor) -> Tensor:
        """What the top layer hands up, [B, output_size]."""
        return _output(self.cells[-1], state[..., -self._sizes[-1] :])

    def initial_state(self, batch_size: int) -> Tensor:
        return torch.cat([cell.initial_state(batch_size) for cell in self._layers()], -1)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        states = []
        for cell, state in zip(self._layers(), s.split(self._sizes, -1), strict=True):
            states.append(cell(x, state))
            x = _output(cell, states[-1])
        return torch.cat(states, -1)

    def auxiliary(self, x: Tensor, s: Tensor) -> Tensor | None:
        """What the layers' ``auxiliary`` add up to, [N]; None if no layer has any."""
        if not any(hasattr(cell, "auxiliary") for cell in self._layers()):
            return None
        found = []
        for cell, state in zip(self._layers(), s.split(self._sizes, -1), strict=True):
            found.append(cell.auxiliary(x, state) if hasattr(cell, "auxiliary") else None)
            x = _output(cell, cell(x, state))
        found = [penalty for penalty in found if penalty is not None]
        return torch.stack(found).sum(0) if found else None


def _output_size(cell: Any) -> int:
    return getattr(cell, "output_size", cell.state_size)


def _output(cell: Any, state: Tensor) -> Tensor:
    # output_size decides: an attribute called output may be a layer of the cell's own
    return cell.output(state) if hasattr(cell, "output_size") else state
