"""Sparse Jacobians of the cell between its taps, compressed by colouring.

Rows of a Jacobian that share no column can be differentiated together (Curtis, Powell & Reid 1974; Griewank &
Walther, Evaluating Derivatives, ch. 8). A gate equation is element-wise between its affine maps: one, two or three
cotangents then give what S cotangents would, and every later product is a scaling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

MAX_COLOURS = 8


@dataclass(frozen=True)
class Run:
    """Columns ``column .. column + length - 1`` whose non-zero rows are ``row .. row + length - 1``, in order."""

    column: int
    row: int
    length: int


@dataclass(frozen=True)
class Pattern:
    """Where a Jacobian [V, U] may be non-zero, as one row per (colour, column).

    Args:
        row_of: [colours, U] the row of the only possible non-zero of that colour, -1 for none.
        rows: V.
    """

    row_of: Tensor
    rows: int

    @cached_property
    def present(self) -> Tensor:
        """[colours, U] bool."""
        return self.row_of >= 0

    @cached_property
    def gather_rows(self) -> Tensor:
        """``row_of`` with -1 replaced by 0, for use as an index."""
        return self.row_of.clamp(min=0)

    @cached_property
    def runs(self) -> list[list[Run]]:
        """For each colour, its columns as maximal runs of consecutive rows."""
        result = []
        for colour in self.row_of.tolist():
            runs: list[Run] = []
            for column, row in enumerate(colour):
                if row < 0:
                    continue
                last = runs[-1] if runs else None
                if last and column == last.column + last.length and row == last.row + last.length:
                    runs[-1] = Run(last.column, last.row, last.length + 1)
                else:
                    runs.append(Run(column, row, 1))
            result.append(runs)
        return result

    @cached_property
    def is_empty(self) -> bool:
        return not bool(self.present.any())

    @cached_property
    def is_diagonal(self) -> bool:
        """Whether it is square with entries on its whole diagonal alone."""
        return self.runs == [[Run(0, 0, self.rows)]] and self.row_of.shape[1] == self.rows

    @cached_property
    def by_row(self) -> tuple[Tensor, Tensor]:
        """The same entries by row: flat (colour, column) index [G, V], and whether there is one [G, V]."""
        columns = self.row_of.shape[1]
        entries: list[list[int]] = [[] for _ in range(self.rows)]
        for colour, row_of in enumerate(self.row_of.tolist()):
            for column, row in enumerate(row_of):
                if row >= 0:
                    entries[row].append(colour * columns + column)
        width = max(map(len, entries), default=0)
        index = torch.tensor([e + [0] * (width - len(e)) for e in entries], dtype=torch.long).view(self.rows, width)
        there = torch.tensor([[True] * len(e) + [False] * (width - len(e)) for e in entries]).view(self.rows, width)
        return index.T.to(self.row_of.device), there.T.to(self.row_of.device)

    def to(self, device: torch.device) -> Pattern:
        return Pattern(self.row_of.to(device), self.rows)


@dataclass
class SparseJacobian:
    """Values of a Jacobian [N, V, U] with a known pattern: ``values[c][n, u]`` at row ``pattern.row_of[c, u]``."""

    pattern: Pattern
    values: list[Tensor]  # colours of [N, U]

    def transposed_times(self, cotangents: Tensor, out: Tensor) -> None:
        """``out[n, u, :] = sum_v J[n, v, u] cotangents[n, v, :]``.

        Args:
            cotangents: [N, V, C].
            out: [N, U, C], overwritten.
        """
        covered = 0
        for colour, (values, runs) in enumerate(zip(self.values, self.pattern.runs, strict=True)):
            if colour == 0:
                covered = sum(run.length for run in runs)
                if covered < out.shape[1]:
                    out.zero_()
            for run in runs:
                columns = slice(run.column, run.column + run.length)
                source = cotangents[:, run.row : run.row + run.length]
                scale = values[:, columns, None]
                if colour == 0:
                    torch.mul(source, scale, out=out[:, columns])
                else:
                    out[:, columns].addcmul_(source, scale)

    def entries_by_row(self) -> Tensor:
        """Values [V, N, G] of the at most G entries of each row (zero where there are fewer)."""
        index, there = self.pattern.by_row
        flat = torch.cat(self.values, 1)  # [N, colours U]
        gathered = flat[:, index.flatten()].view(flat.shape[0], *index.shape)  # [N, G, V]
        return (gathered * there).permute(2, 0, 1)

    def columns_by_row(self, right: Tensor) -> Tensor:
        """Rows of ``right`` [U, M] that meet each entry of ``entries_by_row``: [V, G, M]."""
        index, _ = self.pattern.by_row
        return right[(index % self.pattern.row_of.shape[1]).T]

    def to_dense(self) -> Tensor:
        """[N, V, U]."""
        n, columns = self.values[0].shape
        dense = self.values[0].new_zeros(n, self.pattern.rows, columns)
        everywhere = torch.arange(columns, device=dense.device)
        for values, row_of, present in zip(self.values, self.pattern.gather_rows, self.pattern.present, strict=True):
            dense[:, row_of[present], everywhere[present]] += values[:, present]
        return dense


def times_sparse(left: Tensor, right: SparseJacobian) -> Tensor:
    """``left @ J`` for a dense ``left`` [N, A, V] and J [N, V, U]: [N, A, U]."""
    total = None
    for values, row_of, present in zip(right.values, right.pattern.gather_rows, right.pattern.present, strict=True):
        part = left[:, :, row_of] * (values * present)[:, None]
        total = part if total is None else total + part
    assert total is not None
    return total


def colour_rows(patterns: Sequence[Tensor]) -> Tensor | None:
    """Greedy colouring of the rows of Jacobians that share them.

    Args:
        patterns: bool [V, U_i], one for each source.

    Returns:
        colour of every row [V], or None if more than ``MAX_COLOURS`` are needed.
    """
    joint = torch.cat([p for p in patterns], 1).to(torch.float32)
    conflict = (joint @ joint.T) > 0
    colours: list[int] = []
    for row in range(joint.shape[0]):
        taken = {colours[other] for other in conflict[row, :row].nonzero().flatten().tolist()}
        colour = next(c for c in range(len(taken) + 1) if c not in taken)
        if colour >= MAX_COLOURS:
            return None
        colours.append(colour)
    return torch.tensor(colours)


def compress(pattern: Tensor, colours: Tensor) -> Pattern:
    """The pattern [V, U] of one source under a colouring [V] of its rows."""
    count = int(colours.max()) + 1 if colours.numel() else 0
    row_of = torch.full((count, pattern.shape[1]), -1, dtype=torch.long)
    rows, columns = pattern.nonzero(as_tuple=True)
    row_of[colours[rows], columns] = rows
    return Pattern(row_of, pattern.shape[0])
