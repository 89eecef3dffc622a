"""A learned vector per puzzle instead of demonstrations: the original recursive model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rtrl_moe_pl.reasoning.encoders.base import Encoder, Encoding
from rtrl_moe_pl.tasks.puzzles import Puzzles, PuzzleShape


class PuzzleEmbedding(Encoder):
    """Row ``identity`` of a table, at first zero, in the first position of the prefix; zeros in the others.

    What it learns of one puzzle says nothing of another: with held-out identities it is the control that must fail.
    """

    def __init__(self, shape: PuzzleShape, width: int, prefix: int) -> None:
        super().__init__(shape, width, prefix)
        self.table = nn.Parameter(torch.zeros(shape.identities, width))

    def forward(self, puzzles: Puzzles, noise: Tensor | None = None, state: Tensor | None = None) -> Encoding:
        row = self.table[puzzles.identity]
        return Encoding(torch.cat([row[:, None], row.new_zeros(len(row), self.prefix - 1, self.width)], 1))
