"""Sparse Jacobians of the cell between its taps, compressed by colouring.

Rows of a Jacobian that share no column can be differentiated together (Curtis, Powell & Reid 1974; Griewank &
Walther, Evaluating Derivatives, ch. 8). A gate equation is element-wise between its affine maps: one, two or three
cotangents then give what S cotangents would, and every later product is a scaling.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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

    def clip(self, first: int, last: int) -> Run | None:
        """The part with columns in ``first .. last - 1``."""
        begin, end = max(self.column, first), min(self.column + self.length, last)
        return Run(begin, self.row + begin - self.column, end - begin) if begin < end else None


@dataclass(frozen=True)
class Pattern:
    """Where a Jacobian [V, U] may be non-zero, as one row per (colour, column).

    Args:
        row_of: [colours, U] the row of the only possible non-zero of that colour, -1 for none.
        colour_of: [V] the colour of every row.
    """

    row_of: Tensor
    colour_of: Tensor

    @property
    def rows(self) -> int:
        """V."""
        return len(self.colour_of)

    @cached_property
    def key(self) -> tuple[list[list[int]], list[int]]:
        """Equal for equal patterns."""
        return self.row_of.tolist(), self.colour_of.tolist()

    @cached_property
    def seeds(self) -> Tensor:
        """The cotangent of each colour: 1 for its rows, [colours, V]."""
        numbers = torch.arange(len(self.row_of), device=self.colour_of.device)
        return (self.colour_of == numbers[:, None]).float()

    @property
    def columns(self) -> int:
        """U."""
        return self.row_of.shape[1]

    @cached_property
    def present(self) -> Tensor:
        """[colours, U] bool."""
        return self.row_of >= 0

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
        return self.runs == [[Run(0, 0, self.rows)]] and self.columns == self.rows

    @cached_property
    def slots(self) -> tuple[list[tuple[int, int, Run]], int]:
        """The same entries by row: (slot, colour, run) with no row twice in a slot; and the number of slots."""
        free: list[list[bool]] = []
        placed = []
        for colour, runs in enumerate(self.runs):
            for run in runs:
                rows = slice(run.row, run.row + run.length)
                slot = next((i for i, rows_free in enumerate(free) if all(rows_free[rows])), len(free))
                if slot == len(free):
                    free.append([True] * self.rows)
                free[slot][rows] = [False] * run.length
                placed.append((slot, colour, run))
        return placed, len(free)

    def to_bool(self) -> Tensor:
        """The pattern itself, bool [V, U], on the CPU."""
        result = torch.zeros(self.rows, self.columns, dtype=torch.bool)
        for row_of in self.row_of.cpu():
            there = row_of >= 0
            result[row_of[there], there.nonzero().flatten()] = True
        return result

    def to(self, device: torch.device) -> Pattern:
        return Pattern(self.row_of.to(device), self.colour_of.to(device))


@dataclass
class SparseJacobian:
    """Values of a Jacobian [N, V, U] with a known pattern: ``values[c][n, u]`` at row ``pattern.row_of[c, u]``."""

    pattern: Pattern
    values: list[Tensor]  # colours of [N, U]

    def unflatten(self, steps: int, batch: int) -> SparseJacobian:
        """The same with values [k, B, U] for N = k B."""
        return SparseJacobian(self.pattern, [v.unflatten(0, (steps, batch)) for v in self.values])

    def transposed_times(self, cotangents: Tensor, out: Tensor, lanes: slice, first: int) -> None:
        """``out[k, b, u, :] = sum_v J[k, b, v, u] cotangents[k, b, v, :]`` for some lanes and columns.

        Args:
            cotangents: [k, lanes, V, C].
            out: [k, lanes, columns, C], overwritten; its first column is ``first``.
            lanes: those of ``values`` [k, B, U] that ``cotangents`` has.
        """
        last = first + out.shape[2]
        written = 0
        for colour, (values, runs) in enumerate(zip(self.values, self.pattern.runs, strict=True)):
            clipped = [clip for run in runs if (clip := run.clip(first, last))]
            if colour == 0:
                written = sum(run.length for run in clipped)
                if written < out.shape[2]:
                    out.zero_()
            for run in clipped:
                target = out[:, :, run.column - first : run.column - first + run.length]
                source = cotangents[:, :, run.row : run.row + run.length]
                scale = values[:, lanes, run.column : run.column + run.length, None]
                if colour == 0:
                    torch.mul(source, scale, out=target)
                else:
                    target.addcmul_(source, scale)

    def times_left(self, left: Tensor) -> Tensor:
        """``sum_v left[n, v] J[n, v, u]`` for ``left`` [N, V]: [N, U]."""
        if self.pattern.is_diagonal:
            return left * self.values[0]
        total = left.new_zeros(left.shape[0], self.pattern.columns)
        for values, runs in zip(self.values, self.pattern.runs, strict=True):
            for run in runs:
                columns = slice(run.column, run.column + run.length)
                total[:, columns] += left[:, run.row : run.row + run.length] * values[:, columns]
        return total

    def by_row(self, right: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of ``J @ right`` for ``right`` [U, M]: values [V, N, G] and rows of ``right`` [V, G, M].

        Each of the V rows has at most G entries: their product over G is J @ right, row by row.
        """
        placed, width = self.pattern.slots
        rows, count = self.pattern.rows, self.values[0].shape[0]
        values = right.new_zeros(rows, count, width)
        columns = right.new_zeros(rows, width, right.shape[1])
        for slot, colour, run in placed:
            here = slice(run.row, run.row + run.length)
            there = slice(run.column, run.column + run.length)
            values[here, :, slot] = self.values[colour][:, there].T
            columns[here, slot] = right[there]
        return values, columns

    def to_dense(self) -> Tensor:
        """[N, V, U]."""
        n, columns = self.values[0].shape
        dense = self.values[0].new_zeros(n, self.pattern.rows, columns)
        for values, run in self._runs():
            here = dense[:, run.row : run.row + run.length, run.column : run.column + run.length]
            here.diagonal(dim1=1, dim2=2).add_(values)
        return dense

    def add_left_product(self, left: Tensor, out: Tensor) -> None:
        """``out += left @ J`` for ``left`` [N, A, V] and ``out`` [N, A, U]."""
        for values, run in self._runs():
            here = out[:, :, run.column : run.column + run.length]
            here.addcmul_(left[:, :, run.row : run.row + run.length], values[:, None])

    def _runs(self) -> Iterator[tuple[Tensor, Run]]:
        for values, runs in zip(self.values, self.pattern.runs, strict=True):
            for run in runs:
                yield values[:, run.column : run.column + run.length], run


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
    return Pattern(row_of, colours)
