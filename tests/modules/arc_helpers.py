"""A small folder of ARC tasks, and a module that knows their answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rtrl_moe_pl.data import ArcDataModule
from rtrl_moe_pl.modules import ReasoningModule
from rtrl_moe_pl.reasoning import TRM, Halting, PairTokenEncoder, Thoughts
from rtrl_moe_pl.tasks.puzzles import IGNORED, Puzzles
from rtrl_moe_pl.tasks.puzzles.grids import COLOR
from tests.tasks.puzzles.arc_case import content, write

PLAIN: dict[str, Any] = {"dihedral": False, "colors": False, "translate": False}


def arc_data(folder: Path, held_out: dict[str, Any], **options: Any) -> ArcDataModule:
    """One training task, and these to evaluate; grids of 1 x 3 cells."""
    write(folder, "training", {"train": content(0)})
    source = str(write(folder, "evaluation", held_out))
    sizes = {"max_size": 4, "max_demos": 3, "batch_size": 2, "batches_per_epoch": 2, "validation_batch_size": 2}
    return ArcDataModule(source, **{**sizes, **PLAIN, **options})


class Oracle(ReasoningModule):
    """Answers right at its second step of three and halts there; surest at the last, where it is wrong.

    Task ``fails`` (by the first number of its grids) is answered wrongly throughout; where nothing is asked for there
    is noise.
    """

    def __init__(self, data: ArcDataModule, fails: int | None = None) -> None:
        super().__init__(
            data.shape,
            lambda shape: TRM(shape, width=8, heads=2, layers=1, h_cycles=1, l_cycles=1, prefix=2),
            lambda shape, width, prefix: PairTokenEncoder(shape, width, prefix, heads=2),
            halting=Halting(max_steps=3),
        )
        self.fails = fails

    def forward(self, puzzles: Puzzles) -> Thoughts:
        noise = 1 + (3 + torch.arange(puzzles.labels.shape[1]).expand_as(puzzles.labels)) % 11  # a border at cell 8
        right = torch.where(puzzles.labels == IGNORED, noise, puzzles.labels)
        wrong = right.clone()
        wrong[:, 0] = COLOR + 9
        if self.fails is not None:
            right = torch.where((puzzles.inputs[:, :1] == COLOR + self.fails), wrong, right)
        halt = torch.tensor([-2.0, 1.0, 3.0])[:, None].expand(-1, len(right))
        return Thoughts(torch.stack([wrong, right, wrong]), halt, halt)
