"""Puzzles from a JSON file in the form of ARC, to be answered by a trained model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from rtrl_moe_pl.tasks.puzzles.arc_files import Grid, read_task
from rtrl_moe_pl.tasks.puzzles.base import IGNORED, Puzzles, PuzzleTask
from rtrl_moe_pl.tasks.puzzles.grids import PAD


def read_questions(path: str | Path, task: PuzzleTask) -> Puzzles:
    """The test pairs of a file, each with all its demonstrations.

    The file: {"train": [{"input": grid, "output": grid}, ..], "test": [{"input": grid}, ..]}, grids as lists of rows
    of numbers. Where a test pair has an output its labels are that, and nothing is asked outside of it; else all are
    `IGNORED`. Puzzles without demonstrations (sudoku, mazes) need no "train". Identities are 0.

    Raises:
        ValueError: one line, for a file that is none (see `read_task`), more demonstrations than the task's largest
            number, or a grid that the task has no tokens for; naming the file and the pair.
        OSError: if it cannot be read.
    """
    shape = task.shape
    given = read_task(path, demonstrations=shape.max_demos > 0)
    if len(given.train) > shape.max_demos > 0:
        raise ValueError(
            f"{path}: {len(given.train)} demonstrations, but the model was made for at most {shape.max_demos}: leave "
            "some out"
        )
    demos = given.train if shape.max_demos else ()

    def tokens(grid: Grid | None, where: str) -> Tensor:
        if grid is None:
            return torch.full((shape.cells,), IGNORED)
        try:
            return task.to_tokens(grid)
        except ValueError as fault:
            raise ValueError(f"{path}: {where}: {fault}") from fault

    count = len(given.test)
    sides = torch.zeros(2, count, shape.max_demos, shape.cells, dtype=torch.int64)
    for number, pair in enumerate(demos):
        for side, grid in enumerate(pair):
            sides[side, :, number] = tokens(grid, f"train pair {number + 1}, {('input', 'output')[side]}")
    rows = [
        [tokens(grid, f"test pair {number}, {name}") for name, grid in zip(("input", "output"), pair, strict=True)]
        for number, pair in enumerate(given.test, 1)
    ]
    inputs, labels = (torch.stack(part) for part in zip(*rows, strict=True))
    labels = labels.masked_fill(labels == PAD, IGNORED)
    mask = (torch.arange(shape.max_demos) < len(demos)).expand(count, -1)
    return Puzzles(inputs, labels, sides[0], sides[1], mask, torch.zeros(count, dtype=torch.int64))
