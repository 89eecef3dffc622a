"""Cotangents of a tap's outputs over a window, kept or made where they are used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from rtrl_moe_pl.linearization.sparse import SparseJacobian
from rtrl_moe_pl.linearization.workspace import Workspace


class Cotangents(Protocol):
    """An array [k, B, rows, S + 1] that is asked for in parts."""

    @property
    def shape(self) -> tuple[int, int, int, int]: ...

    def part(self, lane: int, lanes: int, row: int, rows: int) -> Tensor:
        """[k, lanes, rows, S + 1], valid until the next part is asked for."""
        ...


@dataclass
class StoredCotangents:
    """Kept in full."""

    values: Tensor  # [k, B, rows, S + 1]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.values.shape  # type: ignore[return-value]

    def part(self, lane: int, lanes: int, row: int, rows: int) -> Tensor:
        return self.values[:, lane : lane + lanes, row : row + rows]


@dataclass
class ScaledCotangents:
    """The states' cotangents times a sparse Jacobian, made for one tile at a time.

    A tile stays in cache, where in full they would pass through memory twice.
    """

    states: Tensor  # [k, B, S, S + 1]
    jacobian: SparseJacobian
    workspace: Workspace

    @property
    def shape(self) -> tuple[int, int, int, int]:
        steps, batch, _, width = self.states.shape
        return steps, batch, self.jacobian.pattern.columns, width

    def part(self, lane: int, lanes: int, row: int, rows: int) -> Tensor:
        steps, batch, _, width = self.states.shape
        out = self.workspace.empty("cotangents of a tile", (steps, lanes, rows, width), self.states)
        here = slice(lane, lane + lanes)
        self.jacobian.unflatten(steps, batch).transposed_times(self.states[:, here], out, here, row)
        return out
