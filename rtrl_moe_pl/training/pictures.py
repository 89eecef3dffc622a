"""Figures that callbacks draw: beside the logs, and in the loggers that take them."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer
from matplotlib.figure import Figure
from torch import Tensor


def picture_folder(trainer: Trainer) -> Path:
    """Where pictures are saved. To be asked for on every rank: Lightning asks rank 0."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def when(trainer: Trainer) -> str:
    """For a title."""
    done = trainer.fit_loop.total_batch_idx + 1
    return f"after {done:,} batches" if done else "without training in this run"


def log_histogram(trainer: Trainer, tag: str, values: Tensor) -> None:
    """Hand values [n] to loggers that take histograms; nothing if there are none."""
    for logger in trainer.loggers:
        add_histogram = getattr(getattr(logger, "experiment", None), "add_histogram", None)
        if add_histogram is not None and len(values):
            add_histogram(tag, values, global_step=max(0, trainer.fit_loop.total_batch_idx))


def show(figure: Figure, trainer: Trainer, folder: Path, stage: str, name: str, dpi: int) -> None:
    """Save ``STAGE_NAME.png``, over an earlier one, and hand the figure to loggers as ``STAGE/NAME``; on rank 0."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{stage}_{name}.png", dpi=dpi)
    for logger in trainer.loggers:  # by the latest batch, as the scalars of a validation are
        add_figure = getattr(getattr(logger, "experiment", None), "add_figure", None)
        if add_figure is not None:
            add_figure(f"{stage}/{name}", figure, global_step=max(0, trainer.fit_loop.total_batch_idx))
