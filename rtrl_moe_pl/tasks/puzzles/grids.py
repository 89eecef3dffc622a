"""Grids as tokens, and the symmetries of the square."""

from __future__ import annotations

import torch
from torch import Tensor

PAD, EOS, COLOR = range(3)  # tokens: nothing here, the border behind a grid, the first of the colours
DIHEDRAL = 8  # symmetries of the square


def dihedral(grids: Tensor, element: Tensor, height: Tensor | None = None, width: Tensor | None = None) -> Tensor:
    """Turn and mirror grids in the upper left corner of a square canvas.

    Element e turns counterclockwise by e % 4 quarters, and then, from 4 on, exchanges left and right.

    Args:
        grids: [.., n, n].
        element: [..] int64, 0 to 7.
        height, width: [..] int64, rows and columns of the grid before; None: n. What lies outside of it moves nowhere
            sensible: mask it.

    Returns:
        [.., n, n]; a turn by an odd number of quarters exchanges height and width.
    """
    n = grids.shape[-1]
    step = torch.arange(n, device=grids.device)
    row, column = step[:, None].expand(n, n), step[None, :].expand(n, n)
    size = torch.full_like(element, n)
    height, width = (size if height is None else height), (size if width is None else width)
    height, width, turns, mirrored = (t[..., None, None] for t in (height, width, element % 4, element >= 4))
    new_width = torch.where(turns % 2 == 0, width, height)
    column = torch.where(mirrored, new_width - 1 - column, column)
    # the cell that comes to (row, column) after 0, 1, 2, 3 quarters
    source_row = torch.where(turns % 2 == 0, row, column)
    source_column = torch.where(turns % 2 == 0, column, row)
    source_row = torch.where(turns >= 2, height - 1 - source_row, source_row)
    source_column = torch.where((turns == 1) | (turns == 2), width - 1 - source_column, source_column)
    source = (source_row * n + source_column).clamp(0, n * n - 1)
    return grids.flatten(-2).gather(-1, source.flatten(-2)).view_as(grids)


def inverse(element: Tensor) -> Tensor:
    """The element that undoes ``element``."""
    return torch.where(element >= 4, element, (4 - element) % 4)
