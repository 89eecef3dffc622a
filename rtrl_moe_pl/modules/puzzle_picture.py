"""Pictures of puzzles and of accuracy by supervision step, after every validation and test."""

from __future__ import annotations

from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from rtrl_moe_pl.cells.base import at_least
from rtrl_moe_pl.data.puzzles import PuzzleBatch, PuzzleDataModule
from rtrl_moe_pl.modules.puzzle_drawing import puzzle_figure, steps_figure
from rtrl_moe_pl.reasoning.etrm import Thoughts
from rtrl_moe_pl.tasks.puzzles import Puzzles
from rtrl_moe_pl.training.pictures import picture_folder, show, when


class PuzzlePicture(Callback):
    """Draws the first puzzles of every evaluation set, and accuracy by supervision step, after validation and test.

    Pictures go to loggers that take them (TensorBoard) as ``val/SET_puzzles`` and ``val/by_step``, and beside the logs
    as ``val_SET_puzzles.png`` and ``val_by_step.png``, over those before. Nothing is drawn in sanity checks and under
    ``fast_dev_run``. What is drawn is said at `puzzle_figure` and `steps_figure`; the answer that is given is that
    under q-halt, and "q_halt probability" is what sigmoid(q_halt) says: how likely the answer is to be right.

    Args:
        puzzles: how many of each set, at least 1; no more than there are in its first batch.

    Cost: 0.2 s a picture of 3 puzzles, 0.4 s where grids are 30 x 30 (one thread, drawn and saved).
    """

    def __init__(self, puzzles: int = 3) -> None:
        self.puzzles = at_least(1, "puzzles", puzzles)
        self._drawn: dict[int, tuple[Puzzles, Thoughts, Tensor, list[str]]] = {}  # by loader

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, PuzzleDataModule):
            raise TypeError(f"PuzzlePicture needs a PuzzleDataModule, got {type(data).__name__}")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._drawn = {}

    on_test_start = on_validation_start

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: PuzzleBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if dataloader_idx not in self._drawn:
            rows = (batch.index >= 0).nonzero()[: self.puzzles, 0]
            puzzles, thoughts = batch.puzzles.rows(rows).to("cpu"), outputs.rows(rows).cpu()
            names = [f"puzzle {i}" for i in batch.index[rows].tolist()]
            step = thoughts.halted_at(pl_module.halting.max_steps)
            self._drawn[dataloader_idx] = puzzles, thoughts, step, names

    on_test_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show(trainer, pl_module, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show(trainer, pl_module, "test")

    def _show(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        if trainer.sanity_checking or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder, data = picture_folder(trainer), trainer.datamodule  # type: ignore[attr-defined]
        if not trainer.is_global_zero:
            return
        for loader, drawn in self._drawn.items():
            name = data.validation_names[loader]
            draw = partial(puzzle_figure, data.task, *drawn, f"{name}, {when(trainer)}")
            show(draw, trainer, folder, stage, f"{name}_puzzles", dpi=110)
        curves: Any = getattr(module, "curves", None)
        if curves:
            show(partial(steps_figure, curves, when(trainer)), trainer, folder, stage, "by_step", dpi=110)
