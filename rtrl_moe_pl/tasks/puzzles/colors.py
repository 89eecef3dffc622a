"""How tokens look: colours for pictures and the terminal, symbols where there are none or they do not tell enough."""

from __future__ import annotations

from typing import NamedTuple

from matplotlib.colors import to_rgb
from torch import Tensor

ARC = ("#000000", "#0074d9", "#ff4136", "#2ecc40", "#ffdc00", "#aaaaaa", "#f012be", "#ff851b", "#7fdbff", "#870c25")
NONE = "?"  # the symbol of a token that is no number: where one was asked for, an answer has none
_RESET = "\x1b[0m"


class Look(NamedTuple):
    """Of each token of a vocabulary."""

    colors: tuple[str, ...]  # as matplotlib takes them
    symbols: tuple[str, ...]  # a character, "" for none; one that is no letter or digit only stands in for its colour
    box: tuple[int, int] | None = None  # rows and columns of cells that are set apart by thicker lines

    @staticmethod
    def of_grids(vocabulary: int) -> Look:
        """Nothing, the border, and the ten colours of ARC with their numbers."""
        colors = ("#ffffff", "#e8e8e8", *ARC)[:vocabulary]
        return Look(colors, (NONE, NONE, *map(str, range(10)))[:vocabulary])


def in_terminal(grid: Tensor, look: Look, colored: bool) -> str:
    """Lines of cells for tokens [H, W]: coloured, or symbols alone, where colour codes would be noise (a file)."""
    if not colored:
        return "\n".join("".join(f"{look.symbols[token]:^3}" for token in row).rstrip() for row in grid.tolist())
    return "\n".join("".join(_cell(look, token) for token in row) + _RESET for row in grid.tolist())


def _cell(look: Look, token: int) -> str:
    symbol = look.symbols[token]
    symbol = symbol if symbol.isalnum() or symbol == NONE else ""  # others stand for a colour
    red, green, blue = (round(255 * part) for part in to_rgb(look.colors[token]))
    ink = 30 if is_bright(look.colors[token]) else 97
    return f"\x1b[48;2;{red};{green};{blue};{ink}m{symbol:^3}"


def is_bright(color: str) -> bool:
    """Whether black is easier to read on it than white."""
    red, green, blue = to_rgb(color)
    return 0.3 * red + 0.6 * green + 0.1 * blue > 0.5
