"""What DataModules of sequences and of puzzles share."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningDataModule


class TaskDataModule(LightningDataModule):
    """A DataModule of a task; a subclass sets ``task``, ``seed`` and ``batch_size``."""

    task: Any
    seed: int
    batch_size: int

    def __str__(self) -> str:  # Lightning's own takes loaders of its kind alone
        return f"{type(self).__name__}({self.task!r}, seed={self.seed}, batch_size={self.batch_size})"

    @property
    def process(self) -> tuple[int, int]:
        """This process's rank, and the number of processes; alone where there is no trainer."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
