"""Options that are refused before anything is made of them."""

from __future__ import annotations

import re
from pathlib import Path
from pydoc import locate
from string import Formatter
from typing import Any

from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.callbacks import Timer

from rtrl_moe_pl.cells.base import at_least
from rtrl_moe_pl.cli.offers import PRECISIONS, no_class
from rtrl_moe_pl.data.puzzles import PuzzleDataModule
from rtrl_moe_pl.modules import ReasoningModule, SequenceModule
from rtrl_moe_pl.tasks.base import one_of

PARTS = "train", "val", "test", "predict"


def check_options(config: Namespace) -> None:
    """Refuse options of Trainer and checkpoints that Lightning would stumble over later, or take without a word.

    Raises:
        OSError, TypeError, ValueError: naming the option.
    """
    for name in ("trainer", "checkpoint"):
        if not isinstance(config[name], Namespace):
            raise TypeError(f"{name}: needs keys and values, got {config[name]}")
    trainer, checkpoint = config.trainer, config.checkpoint
    if config.get("ckpt_path") == "":
        raise ValueError("--ckpt_path: needs a file, or last for the newest one, got ''")
    if trainer.barebones:
        raise ValueError("trainer.barebones=true is not supported: it takes no logger, checkpoints or callbacks")
    if str(trainer.precision).startswith("transformer-engine"):
        one_of(PRECISIONS, "trainer.precision", trainer.precision)
    if isinstance(trainer.accelerator, str):
        present = [name for name, held in AcceleratorRegistry.items() if held["accelerator"].is_available()]
        present += ["gpu"] * bool({"cuda", "mps"} & {*present})
        one_of(("auto", *sorted(present)), "trainer.accelerator (of this machine)", trainer.accelerator)
    for name in ("val_check_interval", "overfit_batches", *(f"limit_{part}_batches" for part in PARTS)):
        _refuse_no_part(f"trainer.{name}", trainer[name])
    at_least(0, "trainer.log_every_n_steps", trainer.log_every_n_steps)
    at_least(-1, "trainer.num_sanity_val_steps", trainer.num_sanity_val_steps or 0)
    for name in ("val_check_interval", "check_val_every_n_epoch"):
        if trainer[name] == 0:  # None: the default
            raise ValueError(
                f"trainer.{name} must be above 0, got 0: to switch validation off, set trainer.limit_val_batches to 0"
            )
    for unit in ("steps", "epochs"):
        least, most = trainer[f"min_{unit}"] or 0, trainer[f"max_{unit}"]
        if most is not None and -1 < most < least:
            raise ValueError(f"trainer.min_{unit} must be at most trainer.max_{unit} ({most}), got {least}")
    _refuse_no_time(trainer.max_time)
    _refuse_filename("checkpoint.filename", checkpoint.filename)
    _refuse_beneath_a_file("checkpoint.dirpath", checkpoint.dirpath)
    if isinstance(trainer.logger, Namespace):
        _refuse_beneath_a_file("trainer.logger.save_dir", trainer.logger.get("init_args.save_dir"))


def check_classes(model: Namespace, data: str) -> None:
    """Refuse data, by class path, that are not what the model reads, and layers of torch for cells.

    Such a layer's own words, as of an option that it does not take, would not say that it is none.
    """
    cell = model.get("init_args.cell.class_path", "")
    if cell.startswith("torch."):
        wrapped = ", or {class_path: TorchCell, init_args: {cell: ..}} around a torch.nn.GRUCell, LSTMCell or RNNCell"
        raise TypeError(no_class(model.class_path, "model.cell", cell) + wrapped)
    classes = [found if isinstance(found := locate(path), type) else object for path in (model.class_path, data)]
    puzzles = issubclass(classes[1], PuzzleDataModule)
    if puzzles and issubclass(classes[0], SequenceModule):
        raise ValueError(f"data: SequenceModule reads sequences, got puzzles of {classes[1].__name__}")
    if issubclass(classes[0], ReasoningModule) and not (puzzles or hasattr(classes[1], "shape")):
        raise ValueError(f"data: ReasoningModule needs a PuzzleDataModule, got {classes[1].__name__}")


def _refuse_no_part(option: str, given: Any) -> None:
    """Raise ValueError for what is neither a number of batches nor a part of them."""
    number = isinstance(given, int | float)  # None: the default; an interval may be a time
    if number and not (0 <= given <= 1 or (given > 1 and given % 1 == 0)):
        raise ValueError(
            f"{option} must be a whole number of batches, at least 0, or a part of them from 0.0 to 1.0, got {given}"
        )


def _refuse_no_time(given: Any) -> None:
    """Raise ValueError for what is no duration, and for a limit that is over before anything is trained."""
    try:
        left = None if given is None else Timer(given).time_remaining()
        known = not isinstance(given, str) or re.fullmatch(r"\s*\d+:\d\d:[0-5]\d:[0-5]\d\s*", given)
    except (MisconfigurationException, TypeError):
        left, known = None, False
    if not known:
        form = "DD:HH:MM:SS, with minutes and seconds below 60, or keys such as {hours: 3}"
        raise ValueError(f"trainer.max_time must be {form}, got {given}")
    if left is not None and left <= 0:
        raise ValueError(f"trainer.max_time must be above 0, or null for no limit, got {given}")


def _refuse_beneath_a_file(option: str, folder: str | None) -> None:
    """Raise OSError if the folder is a file, or would be within one."""
    if folder is None or "://" in folder:
        return
    for place in (Path(folder), *Path(folder).parents):
        if place.exists() and not place.is_dir():
            raise OSError(f"{option}: cannot write to {folder}: {place} is a file: choose another folder")


def _refuse_filename(option: str, name: str | None) -> None:
    """Raise ValueError for the name of a file whose braces, or formats of numbers, are none."""
    try:
        for _, _, spec, _ in Formatter().parse(name or ""):
            format(1, spec or "")
    except ValueError as error:
        raise ValueError(f"{option}: {name!r} is no name with {{figure}} or {{figure:.2f}} in it: {error}") from None
