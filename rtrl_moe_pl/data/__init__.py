"""Data modules: tasks cut into windows of persistent lanes, or into whole sequences, made on the device."""

from rtrl_moe_pl.data.batch import Batch
from rtrl_moe_pl.data.loader import Request, StreamLoader, ValidationLoader
from rtrl_moe_pl.data.module import SequenceDataModule
from rtrl_moe_pl.data.stream import Cursor, Stream, window
from rtrl_moe_pl.data.task_modules import AnBnDataModule, DelayedRecallDataModule

__all__ = [
    "AnBnDataModule",
    "Batch",
    "Cursor",
    "DelayedRecallDataModule",
    "Request",
    "SequenceDataModule",
    "Stream",
    "StreamLoader",
    "ValidationLoader",
    "window",
]
