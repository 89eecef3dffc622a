"""ARC grids on a square canvas of tokens: turned, recoloured, put at a place and framed, and all of it undone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rtrl_moe_pl.tasks.puzzles.arc_files import COLORS, ArcTask
from rtrl_moe_pl.tasks.puzzles.grids import COLOR, DIHEDRAL, EOS, PAD, dihedral

VOCABULARY = COLOR + COLORS


def on_canvas(grid: np.ndarray | None, n: int) -> np.ndarray:
    """A grid of colours as [n, n] uint8 tokens: in the upper left corner, PAD outside; None: PAD alone."""
    canvas = np.full((n, n), PAD, np.uint8)
    if grid is not None:
        canvas[: grid.shape[0], : grid.shape[1]] = COLOR + grid
    return canvas


def off_canvas(canvas: np.ndarray) -> np.ndarray:
    """The grid of colours that lies in the upper left corner of a canvas."""
    return canvas[: (canvas[:, 0] != PAD).sum(), : (canvas[0] != PAD).sum()] - COLOR


def pack(tasks: Sequence[ArcTask], n: int, least_pairs: int = 0) -> tuple[Tensor, Tensor]:
    """All grids of some tasks.

    Returns:
        cells [G, P, 2, n, n] uint8: pairs in the order of `ArcTask.pairs`, input and output, as `on_canvas`; P is the
        most that a task has, or ``least_pairs``; and their sizes [G, P, 2, 2] int64, rows and columns, 0 where there
        is no grid.
    """
    most = max(least_pairs, *(len(task.pairs) for task in tasks))
    cells = np.full((len(tasks), most, 2, n, n), PAD, np.uint8)
    for group, task in enumerate(tasks):
        for pair, grids in enumerate(task.pairs):
            cells[group, pair] = [on_canvas(grid, n) for grid in grids]
    packed = torch.from_numpy(cells)
    there = packed != PAD
    return packed, torch.stack([there[..., 0].sum(-1), there[..., 0, :].sum(-1)], -1)


def transform(cells: Tensor, size: Tensor, element: Tensor, permutation: Tensor) -> tuple[Tensor, Tensor]:
    """Recolour the grids of each puzzle, and turn and mirror them.

    `grids.inverse` of the elements and the argsort of the permutations undo it.

    Args:
        cells: [B, N, n, n], N grids a puzzle, in the upper left corner.
        size: [B, N, 2], rows and columns.
        element: [B], see `grids.dihedral`.
        permutation: [B, 10], colour c becomes permutation[:, c].

    Returns:
        the same as int64, and the new sizes.
    """
    n = cells.shape[-1]
    fixed = torch.arange(COLOR, device=cells.device).expand(len(cells), COLOR)
    tokens = torch.cat([fixed, COLOR + permutation], 1)
    recoloured = tokens.gather(1, cells.flatten(1).long()).view(cells.shape)
    turned = dihedral(recoloured, element[:, None].expand(size.shape[:2]), *size.unbind(-1))
    size = torch.where((element % 2 == 1)[:, None, None], size.flip(-1), size)
    step = torch.arange(n, device=cells.device)
    row, column = step[:, None], step
    height, width = (side[..., None, None] for side in size.unbind(-1))
    return torch.where((row < height) & (column < width), turned, PAD), size


def place(cells: Tensor, size: Tensor, offset: Tensor) -> Tensor:
    """Move grids to ``offset`` [B, 2], with EOS in the row below and the column right of each, where there is room.

    Args:
        cells, size: see `transform`.
        offset: row and column of the upper left corner, of all grids of a puzzle.
    """
    row, column = _positions(cells, -offset[:, None])
    height, width = (side[..., None, None] for side in size.unbind(-1))
    rows, columns = (row >= 0) & (row < height), (column >= 0) & (column < width)
    border = ((row == height) & columns) | ((column == width) & rows)
    return torch.where(rows & columns, _at(cells, row, column), torch.where(border, EOS, PAD))


def crop(tokens: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Find the answer in what a model put out.

    It is the largest rectangle of colours alone (no EOS, no PAD) whose upper left corner is at ``offset``; of equally
    large ones that with the fewest rows. What lies elsewhere is not looked at: a model is never trained on it.

    Args:
        tokens: [B, n, n].
        offset: [B, 2].

    Returns:
        cells [B, n, n], in the upper left corner, PAD outside, and sizes [B, 2]; 0 where there is no colour at
        ``offset``.
    """
    n = tokens.shape[-1]
    row, column = _positions(tokens, offset)
    cells = _at(tokens, row, column)
    colored = (cells >= COLOR) & (row < n) & (column < n)
    widths = colored.long().cumprod(-1).sum(-1).cummin(-1).values  # [B, n]: of the widest rectangle of r + 1 rows
    step = torch.arange(n, device=tokens.device)
    last = (widths * (step + 1)).argmax(-1, keepdim=True)
    width = widths.gather(-1, last)
    height = (last + 1) * (width > 0)
    inside = (step[:, None] < height[..., None]) & (step < width[..., None])
    return torch.where(inside, cells, PAD), torch.cat([height, width], -1)


def _positions(cells: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [.., n, 1] and columns [.., 1, n], ``offset`` [.., 2] further on."""
    step = torch.arange(cells.shape[-1], device=cells.device)
    row, column = offset.unbind(-1)
    return row[..., None, None] + step[:, None], column[..., None, None] + step


def _at(cells: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """The cells at these rows and columns; any cell for those that are not on the canvas."""
    n = cells.shape[-1]
    source = (row * n + column).clamp(0, n * n - 1).expand(cells.shape)
    return cells.flatten(-2).gather(-1, source.flatten(-2)).view(cells.shape)


def distinct(cells: Tensor, size: Tensor, element: Tensor, permutation: Tensor) -> Tensor:
    """Which of M augmentations of a puzzle give one that no earlier one gives; exact, without making them.

    With the colours but 0 renamed in the order in which they are first seen, a turned puzzle has a form; an augmented
    one is given by the form of its turn, and by what the permutation makes of the colours in that order.

    Args:
        cells, size: [N, n, n] and [N, 2], the grids of the puzzle.
        element, permutation: [M] and [M, 10].

    Returns:
        their numbers, ascending, int64.
    """
    n_grids, same = len(cells), torch.arange(COLORS).expand(DIHEDRAL, COLORS)
    repeated = cells.expand(DIHEDRAL, *cells.shape), size.expand(DIHEDRAL, n_grids, 2)
    turned = transform(*repeated, torch.arange(DIHEDRAL), same)[0].flatten(1)  # [8, L]
    length = turned.shape[1]
    step = torch.arange(length).expand(DIHEDRAL, length)
    first = torch.full((DIHEDRAL, VOCABULARY), length).scatter_reduce(1, turned, step, "amin")[:, COLOR + 1 :]
    order = first.argsort(stable=True)  # [8, 9]: the colours but 0, in the order in which they are first seen
    names = torch.cat([torch.arange(COLOR + 1).expand(DIHEDRAL, COLOR + 1), order.argsort(-1) + COLOR + 1], 1)
    renamed = names.gather(1, turned)
    form = (renamed[:, None] == renamed).all(-1).int().argmax(-1)  # [8]: the first element that gives the same
    seen = int((first[0] < length).sum())
    shown = permutation[:, 1:].gather(1, order[element])[:, :seen]
    key = form[element] + DIHEDRAL * (shown * 10 ** torch.arange(seen)).sum(-1)
    return torch.from_numpy(np.sort(np.unique(key.numpy(), return_index=True)[1]))
