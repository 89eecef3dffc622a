"""Puzzles as coloured grids: demonstrations, query, the prediction of every supervision step, and the answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from rtrl_moe_pl.cells.base import at_least
from rtrl_moe_pl.data.puzzles import PuzzleBatch, PuzzleDataModule
from rtrl_moe_pl.reasoning.etrm import Thoughts
from rtrl_moe_pl.reasoning.metrics import Curves
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
        one = torch.tensor([i])
        row, thought = puzzles.rows(one), thoughts.rows(one)
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
            tokens = thought.predictions[step, 0]
            right = bool(((tokens == row.labels[0]) | ~asked).all())
            frame = ("tab:green" if right else "tab:red") if known else "grey"
            tokens = tokens.masked_fill(~asked, PAD) if known else tokens
            text = f"step {step + 1}, q {float(thought.halt[step, 0]):.1f}"
            _draw(panels[2 * i + 1, step], tokens.view(shape.height, shape.width), look, text, frame)
    return figure


def _draw(axes: Axes, grid: Tensor, look: Look, text: str, frame: str = "grey") -> None:
    grid = cropped(grid)
    axes.axis("on")
    axes.imshow(grid.numpy(), cmap=ListedColormap(look.colors), vmin=-0.5, vmax=len(look.colors) - 0.5)
    rows, columns = grid.shape
    axes.set_xticks([i + 0.5 for i in range(columns - 1)], labels=[])
    axes.set_yticks([i + 0.5 for i in range(rows - 1)], labels=[])
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


def steps_figure(curves: Mapping[str, Curves], title: str) -> Figure:
    """Accuracy of the answer at every supervision step, and the share of puzzles that halt there, of every set."""
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    for i, (name, (exact, halted)) in enumerate(curves.items()):
        width, share = 0.8 / len(curves), halted / max(1, int(halted.sum()))
        place = torch.arange(1, len(share) + 1) + (i - (len(curves) - 1) / 2) * width
        axes.bar(place.tolist(), share.tolist(), width, color=f"C{i}", alpha=0.3)
        axes.plot(range(1, len(exact) + 1), exact.tolist(), color=f"C{i}", marker="o", markersize=3, label=name)
    axes.set(xlabel="supervision step", ylabel="exact accuracy (bars: puzzles that halt)", ylim=(-0.02, 1.03))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(title, fontsize=9)
    axes.legend(frameon=False, fontsize=8)
    return figure


class PuzzlePicture(Callback):
    """Draws the first puzzles of every evaluation set, and accuracy by supervision step, after validation and test.

    Figures go to loggers that take them (TensorBoard) as ``val/SET_puzzles`` and ``val/by_step``, and beside the logs
    as ``val_SET_puzzles.png`` and ``val_by_step.png``, over those before. Nothing is drawn in sanity checks and under
    ``fast_dev_run``.

    Args:
        puzzles: how many of each set, at least 1; no more than there are in its first batch.

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
            puzzles = batch.puzzles.rows(rows).to("cpu")
            thoughts = outputs.rows(rows).cpu()
            self._drawn[dataloader_idx] = puzzles, thoughts, [f"puzzle {i}" for i in batch.index[rows].tolist()]

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
        for loader, (puzzles, thoughts, names) in self._drawn.items():
            name = data.validation_names[loader]
            title = f"{name} {when(trainer)}"
            figure = puzzle_figure(puzzles, thoughts, data.shape, data.task.look, names, title)
            show(figure, trainer, folder, stage, f"{name}_puzzles", dpi=110)
        curves: Any = getattr(module, "curves", None)
        if curves:
            show(steps_figure(curves, when(trainer)), trainer, folder, stage, "by_step", dpi=110)
