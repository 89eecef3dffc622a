"""Puzzles as coloured grids: demonstrations, query, the prediction of every supervision step, and the answer."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor

from rtrl_moe_pl.cells.base import at_least
from rtrl_moe_pl.data.puzzles import PuzzleBatch, PuzzleDataModule
from rtrl_moe_pl.reasoning.etrm import Thoughts
from rtrl_moe_pl.tasks.puzzles import IGNORED, Puzzles, PuzzleShape
from rtrl_moe_pl.tasks.puzzles.colors import Look, is_bright
from rtrl_moe_pl.tasks.puzzles.grids import PAD
from rtrl_moe_pl.training.pictures import picture_folder, show, when

_PANEL = 1.15  # inches
_SYMBOLS_UP_TO = 12  # cells a side; a symbol in smaller ones cannot be read


def puzzle_figure(
    puzzles: Puzzles, thoughts: Thoughts, shape: PuzzleShape, look: Look, names: list[str], title: str
) -> Figure:
    """Draw B puzzles, two rows each: demonstrations, query and answer above; the prediction of every step below.

    Predictions are framed green where they are right and red where they are wrong (grey: the answer is not known).
    """
    steps, count = thoughts.halt.shape
    columns = max(steps, 2 * int(puzzles.demo_mask.sum(1).max()) + 2 if puzzles.demo_mask.numel() else 2)
    figure = Figure(figsize=(max(6, _PANEL * columns), 2 * count * 1.35 * _PANEL + 0.5), layout="constrained")
    panels = figure.subplots(2 * count, columns, squeeze=False)
    figure.suptitle(title, fontsize=9)
    for axes in panels.flat:
        axes.axis("off")
    for i, name in enumerate(names):
        row, thought = puzzles.rows(torch.tensor([i])), Thoughts(thoughts.predictions[:, i], thoughts.halt[:, i])
        known = bool(row.valid)
        grids = [
            (f"{what} {k + 1}", side[0, k])
            for k in row.demo_mask[0].nonzero()[:, 0].tolist()
            for what, side in (("demo", row.demo_inputs), ("answer", row.demo_labels))
        ]
        grids.append(("query", row.inputs[0]))
        if known:
            grids.append(("target", row.labels[0].masked_fill(row.labels[0] == IGNORED, PAD)))
        for axes, (what, tokens) in zip(panels[2 * i], grids, strict=False):
            _draw(axes, tokens.view(shape.height, shape.width), look, what)
        panels[2 * i, 0].text(
            -0.15, 0.5, name, rotation=90, va="center", fontsize=8, transform=panels[2 * i, 0].transAxes
        )
        asked = row.labels[0] != IGNORED
        for step in range(steps):
            tokens = thought.predictions[step]
            right = bool(((tokens == row.labels[0]) | ~asked).all())
            frame = ("tab:green" if right else "tab:red") if known else "grey"
            tokens = tokens.masked_fill(~asked, PAD) if known else tokens
            text = f"step {step + 1}, q {float(thought.halt[step]):.1f}"
            _draw(panels[2 * i + 1, step], tokens.view(shape.height, shape.width), look, text, frame)
    return figure


def _draw(axes: Axes, grid: Tensor, look: Look, text: str, frame: str = "grey") -> None:
    grid = cropped(grid)
    axes.axis("on")
    axes.imshow(grid.numpy(), cmap=ListedColormap(look.colors), vmin=-0.5, vmax=len(look.colors) - 0.5)
    axes.set_xticks(torch.arange(0.5, grid.shape[1] - 1).tolist(), labels=[])
    axes.set_yticks(torch.arange(0.5, grid.shape[0] - 1).tolist(), labels=[])
    axes.tick_params(length=0)
    axes.grid(color="grey", linewidth=0.3)
    for spine in axes.spines.values():
        spine.set(color=frame, linewidth=1 if frame == "grey" else 2.5)
    axes.set_title(text, fontsize=7, pad=3)
    if max(grid.shape) <= _SYMBOLS_UP_TO:
        for (row, column), token in zip(
            torch.cartesian_prod(*map(torch.arange, grid.shape)).tolist(), grid.flatten().tolist(), strict=True
        ):
            ink = "black" if is_bright(look.colors[token]) else "white"
            axes.text(column, row, look.symbols[token], ha="center", va="center", fontsize=6, color=ink)


def cropped(grid: Tensor) -> Tensor:
    """Tokens [H, W] without the rows and columns at the lower right that hold nothing; at least one cell."""
    there = grid != PAD
    if not bool(there.any()):
        return grid[:1, :1]
    return grid[: int(there.any(1).nonzero()[-1]) + 1, : int(there.any(0).nonzero()[-1]) + 1]


class PuzzlePicture(Callback):
    """Draws the first puzzles of every evaluation set after every validation and test.

    The figure goes to loggers that take figures (TensorBoard) as ``val/SET_puzzles``, and beside the logs as
    ``val_SET_puzzles.png``, over the one before. Nothing is drawn in sanity checks and under ``fast_dev_run``.

    Args:
        puzzles: how many of each set, at least 1.

    Cost: about half a second a figure.
    """

    def __init__(self, puzzles: int = 3) -> None:
        self.puzzles = at_least(1, "puzzles", puzzles)
        self._drawn: dict[int, tuple[Puzzles, Thoughts, list[str]]] = {}  # by loader

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
        pl_module: LightningModule,
        outputs: Any,
        batch: PuzzleBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if dataloader_idx not in self._drawn:
            rows = torch.arange(min(self.puzzles, len(batch.index)))
            puzzles = Puzzles(*(tensor[rows].cpu() for tensor in batch.puzzles))
            thoughts = Thoughts(outputs.predictions[:, rows].cpu(), outputs.halt[:, rows].cpu())
            self._drawn[dataloader_idx] = puzzles, thoughts, [f"puzzle {i}" for i in batch.index[rows].tolist()]

    on_test_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show(trainer, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show(trainer, "test")

    def _show(self, trainer: Trainer, stage: str) -> None:
        if trainer.sanity_checking or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder, data = picture_folder(trainer), trainer.datamodule  # type: ignore[attr-defined]
        if not trainer.is_global_zero:
            return
        for loader, (puzzles, thoughts, names) in self._drawn.items():
            name = data.validation_names[loader]
            title = f"{name} {when(trainer)}"
            figure = puzzle_figure(puzzles, thoughts, data.shape, data.task.look, names, title)
            show(figure, trainer, folder, stage, f"{name}_puzzles", dpi=110)
