"""Small recursive models and puzzles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rtrl_moe_pl.reasoning import TRM, Carry, PairTokenEncoder
from rtrl_moe_pl.tasks.puzzles import Puzzles, PuzzleShape, RulePuzzles

SHAPE = PuzzleShape(vocabulary=5, height=2, width=3, max_demos=2, identities=4)
RULES = RulePuzzles(size=2, colors=3, train_rules=4, held_out_rules=2, demos=2)


def trm(shape: PuzzleShape = SHAPE, **options: Any) -> TRM:
    """The same weights every time, in float64."""
    torch.manual_seed(0)
    small = {"width": 8, "heads": 2, "layers": 1, "h_cycles": 2, "l_cycles": 2, "prefix": 3, "expansion": 0.5}
    return TRM(shape, **{**small, **options}).double()


def encoder(shape: PuzzleShape = SHAPE, **options: Any) -> PairTokenEncoder:
    torch.manual_seed(1)
    return PairTokenEncoder(shape, 8, 3, heads=2, expansion=0.5, **options).double()


def draw(index: Tensor, split: str = "train") -> Puzzles:
    return RULES.draw(split, 0, index)


def lanes(model: TRM, count: int = 4) -> Carry:
    """Lanes that begin with the puzzles 0, 1, .."""
    index = torch.arange(count)
    return Carry.first(model, index, draw(index))
