"""How ARC puzzles are augmented: grids turned or mirrored, and their colours 1 to 9 permuted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rtrl_moe_pl.randomness import bits, integers
from rtrl_moe_pl.tasks.puzzles.arc_files import COLORS
from rtrl_moe_pl.tasks.puzzles.arc_grids import distinct
from rtrl_moe_pl.tasks.puzzles.grids import DIHEDRAL

TRIES = 5  # augmentations drawn for every one that is wanted
_ELEMENT, _COLORS = 3, 4  # what a draw is for: numbers that `ArcPuzzles` leaves free


@dataclass(frozen=True)
class Augmentations:
    """An element of the dihedral group, see `grids.dihedral`, and a permutation of ten colours that leaves 0 alone.

    Args:
        dihedral, colors: which of the two are made.
    """

    dihedral: bool
    colors: bool

    def draw(self, seed: int, *counters: Tensor) -> tuple[Tensor, Tensor]:
        """A random element [..] and a random permutation [.., 10] for every combination of counters."""
        element = integers(seed, _ELEMENT, *counters, low=0, high=DIHEDRAL if self.dihedral else 1)
        color = torch.arange(1, COLORS, device=element.device)
        key = bits(seed, _COLORS, *(counter[..., None] for counter in counters), color)
        shown = 1 + key.argsort(stable=True) if self.colors else color.expand(key.shape)
        return element, torch.cat([torch.zeros_like(shown[..., :1]), shown], -1)

    def fixed(self, group: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
        """Augmentation ``number`` of a group, whatever the seed; 0 is none."""
        element, permutation = self.draw(0, group, number)
        same = torch.arange(COLORS, device=number.device)
        return element * (number > 0), torch.where((number > 0)[..., None], permutation, same)

    def distinct(self, cells: Tensor, size: Tensor, given: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
        """Numbers of fixed augmentations that differ, at most ``wanted``, and how many there are: [G, wanted] and [G].

        Args:
            cells, size: of all grids, see `arc_grids.pack`.
            given: [G, P, 2] bool, the grids in which they must differ.
        """
        number = torch.arange(TRIES * wanted if wanted > 1 else 1)
        numbers, counts = torch.zeros(len(cells), wanted, dtype=torch.int64), torch.ones(len(cells), dtype=torch.int64)
        for group in range(len(cells)) if wanted > 1 else ():
            drawn = self.fixed(torch.full_like(number, group), number)
            found = distinct(cells[group][given[group]], size[group][given[group]], *drawn)[:wanted]
            numbers[group, : len(found)], counts[group] = found, len(found)
        return numbers, counts
