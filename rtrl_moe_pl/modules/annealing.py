"""Gates that become choices while a cell is trained."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from rtrl_moe_pl.cells.base import at_least, positive


class TemperatureAnnealing(Callback):
    """Moves the ``temperature`` of the module's cell from ``start`` to ``end``, by the same factor each batch.

    A function of the number of batches alone, so that a resumed run goes on as if it had not been interrupted; the
    cell keeps the latest with its weights. It is logged as ``train/temperature``.

    Args:
        start, end: above 0.
        batches: after which ``end`` is reached, at least 1.

    Raises:
        ValueError: if they are not.
        TypeError: in ``setup``, for a cell without a temperature.
    """

    def __init__(self, start: float = 1.0, end: float = 0.1, batches: int = 1000) -> None:
        self.start, self.end = positive("start", start), positive("end", end)
        self.batches = at_least(1, "batches", batches)

    def at(self, batch: int) -> float:
        """The temperature in batch number ``batch``, from 0."""
        return self.start * (self.end / self.start) ** min(1.0, batch / self.batches)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        cell = getattr(pl_module, "cell", None)
        if not hasattr(cell, "temperature"):
            raise TypeError(
                f"TemperatureAnnealing needs a cell with a temperature, such as RecurrentMoE, got {type(cell).__name__}"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        cell: Any = pl_module.cell
        cell.temperature = self.at(trainer.fit_loop.total_batch_idx)
        pl_module.log("train/temperature", cell.temperature)
