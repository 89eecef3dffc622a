"""Figures that callbacks draw: beside the logs, and in the loggers that take them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imsave
from torch import Tensor


def picture_folder(trainer: Trainer) -> Path:
    """Where pictures are saved. To be asked for on every rank: Lightning asks rank 0."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def when(trainer: Trainer) -> str:
    """Which weights are shown, for a title."""
    if trainer.ckpt_path and trainer.state.fn != "fit":
        return f"with the weights of {Path(str(trainer.ckpt_path)).name}"
    done = trainer.fit_loop.total_batch_idx + 1
    return f"after {done:,} batches" if done else "without training in this run"


def log_histogram(trainer: Trainer, tag: str, counts: Tensor) -> None:
    """Hand 1, 2, .., n, as often as counted ([n] int64), to loggers that take histograms; nothing if all are 0."""
    for logger in trainer.loggers:
        add_histogram = getattr(getattr(logger, "experiment", None), "add_histogram", None)
        if add_histogram is not None and bool(counts.any()):
            values = torch.arange(1, len(counts) + 1, device=counts.device).repeat_interleave(counts)
            add_histogram(tag, values, global_step=max(0, trainer.fit_loop.total_batch_idx))


def save(draw: Callable[[], Figure], path: Path, dpi: int) -> None:
    """Draw a figure and save it as a PNG, over an earlier one; a fault is a warning, see `_harmless`."""
    with _harmless(path):
        _save(draw(), path, dpi)


def show(draw: Callable[[], Figure], trainer: Trainer, folder: Path, stage: str, name: str, dpi: int) -> None:
    """Draw a figure, save ``STAGE_NAME.png``, over an earlier one, and hand it to loggers as ``STAGE/NAME``.

    For rank 0 alone. A fault is a warning, see `_harmless`. The figure is rendered once, unless there are loggers that
    take figures but no images.
    """
    path, tag = folder / f"{stage}_{name}.png", f"{stage}/{name}"
    with _harmless(path):
        figure = draw()
        pixels = _save(figure, path, dpi)
        step = max(0, trainer.fit_loop.total_batch_idx)  # as the scalars of a validation have
        for logger in trainer.loggers:
            experiment: Any = getattr(logger, "experiment", None)
            if hasattr(experiment, "add_image"):
                experiment.add_image(tag, pixels, global_step=step, dataformats="HWC")
            elif hasattr(experiment, "add_figure"):
                experiment.add_figure(tag, figure, global_step=step)


def _save(figure: Figure, path: Path, dpi: int) -> np.ndarray:
    """The pixels, [height, width, 3] uint8."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    path.parent.mkdir(parents=True, exist_ok=True)
    imsave(path, pixels, pil_kwargs={"compress_level": 2})  # half the time of the default
    return pixels


@contextmanager
def _harmless(path: Path) -> Iterator[None]:
    """A picture stops no run: whatever goes wrong is one line of warning, with its place in the log at level DEBUG."""
    try:
        yield
    except Exception as error:
        cause = " ".join(str(error).split())
        rank_zero_warn(f"no picture {path}, but the run goes on: {type(error).__name__}: {cause}")
        logging.getLogger(__name__).debug("no picture %s", path, exc_info=True)
