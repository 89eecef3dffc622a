"""Cotangents of a tap's outputs over a window, kept or made where they are used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rtrl_moe_pl.linearization.sparse import SparseJacobian
from rtrl_moe_pl.linearization.workspace import Workspace


class Cotangents(Protocol):
    """What a tap's outputs receive: from every entry of the end state, [k, B, rows, S], and from the loss."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """k, B, rows."""
        ...

    def part(self, lane: int, lanes: int, row: int, rows: int) -> Tensor:
        """From the end state, [k, lanes, rows, S]; valid until the next part is asked for."""
        ...

    def from_loss(self) -> Tensor:
        """From the window's loss, [k, B, rows]."""
        ...


@dataclass
class StoredCotangents:
    """Kept in full."""

    values: Tensor  # [k, B, rows, S]
    loss: Tensor  # [k, B, rows]

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.loss.shape  # type: ignore[return-value]

    def part(self, lane: int, lanes: int, row: int, rows: int) -> Tensor:
        return self.values[:, lane : lane + lanes, row : row + rows]

    def from_loss(self) -> Tensor:
        return self.loss


@dataclass
class ScaledCotangents:
    """The states' cotangents times a sparse Jacobian, made for one tile at a time.

    A tile stays in cache, where in full they would pass through memory twice.
    """

    states: Tensor  # [k, B, S, S]
    loss: Tensor  # [k, B, S], of the states
    jacobian: SparseJacobian
    workspace: Workspace

    @property
    def shape(self) -> tuple[int, int, int]:
        steps, batch, _ = self.loss.shape
        return steps, batch, self.jacobian.pattern.columns

    def part(self, lane: int, lanes: int, row: int, rows: int) -> Tensor:
        steps, batch, width = self.loss.shape
        out = self.workspace.empty("cotangents of a tile", (steps, lanes, rows, width), self.states)
        here = slice(lane, lane + lanes)
        self.jacobian.unflatten(steps, batch).transposed_times(self.states[:, here], out, here, row)
        return out

    def from_loss(self) -> Tensor:
        return self.jacobian.times_left(self.loss.flatten(0, 1)).unflatten(0, self.loss.shape[:2])


@dataclass
class ProbeCotangents:
    """A cotangent of every state alone, without those of the end state: for checks of gradients."""

    loss: Tensor  # [k, B, S]
    jacobian: SparseJacobian | Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.from_loss().shape  # type: ignore[return-value]

    def part(self, lane: int, lanes: int, row: int, rows: int) -> Tensor:
        steps = self.loss.shape[0]
        return self.loss.new_zeros(steps, lanes, rows, 0)

    def from_loss(self) -> Tensor:
        flat = self.loss.flatten(0, 1)
        if isinstance(self.jacobian, SparseJacobian):
            out = self.jacobian.times_left(flat)
        else:
            out = torch.bmm(flat[:, None], self.jacobian)[:, 0]
        return out.unflatten(0, self.loss.shape[:2])
