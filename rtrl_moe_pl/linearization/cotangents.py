"""Cotangents of a tap's outputs over a window, kept or made where they are used."""

from __future__ import annotations

from torch import Tensor

from rtrl_moe_pl.linearization.sparse import SparseJacobian
from rtrl_moe_pl.linearization.workspace import Workspace


class Cotangents:
    """What a tap's outputs receive from the window's loss; subclasses add what they receive from the end state.

    Args:
        loss: from the loss, [k, B, rows].
    """

    def __init__(self, loss: Tensor) -> None:
        self.loss = loss

    @property
    def shape(self) -> tuple[int, int, int]:
        """k, B, rows."""
        return self.loss.shape  # type: ignore[return-value]

    def part(self, lane: int, lanes: int, row: int, rows: int) -> Tensor:
        """From every entry of the end state, [k, lanes, rows, S]; valid until the next part is asked for."""
        return self.loss.new_zeros(self.loss.shape[0], lanes, rows, 0)


class StoredCotangents(Cotangents):
    """Kept in full: ``values`` [k, B, rows, S]."""

    def __init__(self, values: Tensor, loss: Tensor) -> None:
        super().__init__(loss)
        self.values = values

    def part(self, lane: int, lanes: int, row: int, rows: int) -> Tensor:
        return self.values[:, lane : lane + lanes, row : row + rows]


class ScaledCotangents(Cotangents):
    """Those of the states [k, B, S, S] times a sparse Jacobian, made for one tile at a time.

    A tile stays in cache, where in full they would pass through memory twice.
    """

    def __init__(self, states: Tensor, loss: Tensor, jacobian: SparseJacobian, workspace: Workspace) -> None:
        super().__init__(loss)
        self.states, self.jacobian, self.workspace = states, jacobian, workspace

    def part(self, lane: int, lanes: int, row: int, rows: int) -> Tensor:
        steps, batch, _, width = self.states.shape
        out = self.workspace.steps("cotangents of a tile", (steps, lanes, rows, width), self.states)
        here = slice(lane, lane + lanes)
        self.jacobian.unflatten(steps, batch).transposed_times(self.states[:, here], out, here, row)
        return out
