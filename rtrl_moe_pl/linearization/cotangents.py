"""Cotangents of a tap's outputs over a window, kept or made where they are used."""

from __future__ import annotations

import torch
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

    def as_steps(self, copies: int) -> Cotangents:
        """Of a layer that acted on several vectors a row, [k, B, copies rows]: they count as more steps."""
        _, batch, rows = self.shape
        values = self.part(0, batch, 0, rows).clone()
        return StoredCotangents(_as_steps(values, copies), _as_steps(self.loss, copies))


def _as_steps(value: Tensor, copies: int) -> Tensor:
    """[k, B, copies rows, ..] as [copies k, B, rows, ..]."""
    return value.unflatten(2, (copies, value.shape[2] // copies)).movedim(2, 0).flatten(0, 1)


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


class ProductCotangents(Cotangents):
    """Those of the slots written [k, B, W d, S] times a Jacobian [k B, W d, U], made where they are used.

    In full they would be the largest of all that a window needs. The state comes first in memory.
    """

    def __init__(self, written: Tensor, loss: Tensor, jacobian: Tensor, workspace: Workspace, copies: int = 1) -> None:
        super().__init__(loss)
        self.written, self.jacobian, self.workspace, self.copies = written, jacobian, workspace, copies

    def as_steps(self, copies: int) -> Cotangents:
        loss = _as_steps(self.loss, copies)
        return ProductCotangents(self.written, loss, self.jacobian, self.workspace, copies)

    def part(self, lane: int, lanes: int, row: int, rows: int) -> Tensor:
        steps, batch, _, size = self.written.shape
        here, there = slice(lane, lane + lanes), slice(row, row + rows)
        jacobian = self.jacobian.unflatten(0, (steps, batch)).unflatten(3, (self.copies, -1))[:, here, :, :, there]
        left = self.written[:, here].flatten(0, 1).transpose(1, 2)  # [k lanes, S, W d]
        out = self.workspace.empty("cotangents of a tap", (self.copies, steps * lanes, size, rows), left)
        for copy in range(self.copies):
            torch.bmm(left, jacobian[:, :, :, copy].flatten(0, 1), out=out[copy])
        return out.unflatten(1, (steps, lanes)).flatten(0, 1).transpose(2, 3)
