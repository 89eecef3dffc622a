"""Data modules: tasks cut into windows of persistent lanes, or into whole sequences, made on the device."""

from rtrl_moe_pl.data.batch import Batch
from rtrl_moe_pl.data.curriculum import CurriculumDataModule
from rtrl_moe_pl.data.distance import AccuracyByDistance
from rtrl_moe_pl.data.loader import Request, StreamLoader, ValidationLoader
from rtrl_moe_pl.data.module import SequenceDataModule
from rtrl_moe_pl.data.puzzle_modules import ArcDataModule, MazeDataModule, PuzzleDemoDataModule, SudokuDataModule
from rtrl_moe_pl.data.puzzles import PuzzleBatch, PuzzleDataModule, PuzzleStream
from rtrl_moe_pl.data.stream import Cursor, Stream, window
from rtrl_moe_pl.data.task_modules import (
    AnBnDataModule,
    DelayedCopyDataModule,
    DelayedRecallDataModule,
    HaystackDataModule,
)

__all__ = [
    "AccuracyByDistance",
    "AnBnDataModule",
    "ArcDataModule",
    "Batch",
    "CurriculumDataModule",
    "Cursor",
    "DelayedCopyDataModule",
    "DelayedRecallDataModule",
    "HaystackDataModule",
    "MazeDataModule",
    "PuzzleBatch",
    "PuzzleDataModule",
    "PuzzleDemoDataModule",
    "PuzzleStream",
    "Request",
    "SequenceDataModule",
    "Stream",
    "StreamLoader",
    "SudokuDataModule",
    "ValidationLoader",
    "window",
]
