"""What DataModules of sequences and of puzzles share."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule

from rtrl_moe_pl.gradients.memory import MemoryForecastError, free_memory, readable


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

    @property
    def device(self) -> torch.device:
        """Where batches are made: on the module's device; on the CPU where there is none."""
        module = None if self.trainer is None else self.trainer.lightning_module
        return torch.device("cpu") if module is None else module.device

    def require_room(self, batch: str, size: float, advice: str) -> None:
        """Raise MemoryForecastError unless a batch fits in the free memory, before it is made.

        Args:
            batch: what it is.
            size: bytes that making it takes, about.
            advice: which options make it smaller.
        """
        free = free_memory(self.device)
        if size > free:
            raise MemoryForecastError(
                f"data: {batch} takes about {readable(size)}, but {readable(free)} are free: {advice}"
            )
