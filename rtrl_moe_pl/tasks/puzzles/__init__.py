"""Puzzles: grids with an answer, and demonstrations of the rule, as pure functions of (split, seed, index)."""

from rtrl_moe_pl.tasks.puzzles.arc import ArcPuzzles
from rtrl_moe_pl.tasks.puzzles.base import IGNORED, Puzzles, PuzzleShape, PuzzleTask
from rtrl_moe_pl.tasks.puzzles.maze import Maze
from rtrl_moe_pl.tasks.puzzles.question import read_questions
from rtrl_moe_pl.tasks.puzzles.rules import RulePuzzles
from rtrl_moe_pl.tasks.puzzles.sudoku import Sudoku

__all__ = [
    "IGNORED",
    "ArcPuzzles",
    "Maze",
    "PuzzleShape",
    "PuzzleTask",
    "Puzzles",
    "RulePuzzles",
    "Sudoku",
    "read_questions",
]
