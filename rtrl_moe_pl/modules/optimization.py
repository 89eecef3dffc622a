"""Optimizers and schedules that a run with hand-written gradients cannot use, refused in one line before it begins."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from inspect import signature
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import LBFGS, Optimizer, SparseAdam
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR, ReduceLROnPlateau

from rtrl_moe_pl.cells.base import at_least, not_negative
from rtrl_moe_pl.training.optimizers import parts_of

# They change weights, or train, by ways that hand-written gradients do not go, and some without end.
UNUSABLE_CALLBACKS = (
    lightning_callbacks.BatchSizeFinder,
    lightning_callbacks.LearningRateFinder,
    lightning_callbacks.StochasticWeightAveraging,
    lightning_callbacks.BackboneFinetuning,
    lightning_callbacks.ModelPruning,
)
_NEEDS = {SparseAdam: "it takes sparse gradients alone", LBFGS: "it computes the loss again within a step"}


def prepare_callbacks(callbacks: Iterable[object]) -> None:
    """Refuse, by a ValueError, callbacks of Lightning that do not work with hand-written gradients; set others up.

    `EarlyStopping` judges a figure of validations after validations, where nothing else was said: by itself it would
    judge an old one at the end of an epoch that max_steps cut short, and again when the epoch goes on.
    """
    for callback in callbacks:
        if isinstance(callback, lightning_callbacks.EarlyStopping) and callback.monitor.startswith("val/"):
            callback._check_on_train_epoch_end = callback._check_on_train_epoch_end or False
        if isinstance(callback, UNUSABLE_CALLBACKS):
            name = type(callback).__name__
            raise ValueError(f"trainer.callbacks: {name} does not work with hand-written gradients: leave it out")


def require_usable(optimizer: Optimizer) -> None:
    """Raise ValueError for an optimizer that cannot be stepped once per update with dense gradients."""
    for number, part in enumerate(parts_of(optimizer)):
        option = "model.embedding_optimizer" if number else "model.optimizer"
        if type(part) in _NEEDS:
            raise ValueError(f"{option} cannot be {type(part).__name__}: {_NEEDS[type(part)]}; use Adam, AdamW or SGD")
        for group in part.param_groups:
            _require_finite(option, group)


def _require_finite(path: str, options: Mapping[str, object]) -> None:
    """Raise ValueError for a number that is nan or infinite, which torch takes for most options."""
    for name, value in options.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{path}.{name} must be finite, got {value}")


def require_schedule(scheduler: object, trainer: Trainer, update_every: int) -> None:
    """Raise ValueError for a schedule that cannot be stepped once per update, or ends before the run does."""
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError("model.lr_scheduler cannot be ReduceLROnPlateau: schedules are stepped once per update")
    for name in ("step_size", "T_max", "T_0"):  # else a division by zero in the first step
        at_least(1, f"model.lr_scheduler.{name}", getattr(scheduler, name, 1))
    _require_finite("model.lr_scheduler", vars(scheduler))
    for group in scheduler.optimizer.param_groups:  # type: ignore[attr-defined]
        for name in ("max_lr", "lr"):  # a cycle's; what the first step takes
            not_negative(f"model.lr_scheduler: {name}", group.get(name, 0.0))
    if isinstance(scheduler, OneCycleLR):
        steps, limit = _planned(trainer, update_every)
        if scheduler.total_steps < steps:
            raise ValueError(
                f"model.lr_scheduler: OneCycleLR ends after total_steps={scheduler.total_steps}, before {limit}: "
                f"set it to {steps + 1}, one more"
            )


def warn_of_unused_rates(rates: Sequence[float], scheduler: Any) -> None:
    """Say so where a schedule has learning rates of its own, and others were given to its optimizer.

    Args:
        rates: of the optimizer's groups, before the schedule was made. The default of an optimizer was not given.
        scheduler: made, and not yet stepped.
    """
    if not isinstance(scheduler, OneCycleLR | CyclicLR):
        return
    defaults = [signature(type(part)).parameters.get("lr") for part in parts_of(scheduler.optimizer)]
    known = {default.default for default in defaults if default is not None}
    for number, (rate, group) in enumerate(zip(rates, scheduler.optimizer.param_groups, strict=True)):
        if isinstance(scheduler, OneCycleLR):
            options = {"max_lr": group["max_lr"]}
        else:
            options = {"base_lr": group["initial_lr"], "max_lr": scheduler.max_lrs[number]}
        if rate not in {*known, *options.values()}:
            own = " and ".join(f"{name}={value:g}" for name, value in options.items())
            rank_zero_warn(
                f"the learning rate {rate:g} of an optimizer is not used: model.lr_scheduler sets it, a "
                f"{type(scheduler).__name__} with {own}: change it there"
            )


def require_updates(trainer: Trainer, data: object, update_every: int) -> None:
    """Raise ValueError if a run has fewer batches than one update takes."""
    batches = _batches(trainer, data)
    if not trainer.fast_dev_run and batches is not None and 0 < batches < update_every:  # type: ignore[attr-defined]
        raise ValueError(
            f"model.update_every={update_every} is more than the {batches} batches of trainer.max_epochs="
            f"{trainer.max_epochs}: no update would come; lower it, or raise trainer.max_epochs"
        )


def _planned(trainer: Any, update_every: int) -> tuple[int, str]:
    """Optimizer steps of a run, -1 if that is not known, and what says so."""
    if trainer.max_steps > 0:
        return trainer.max_steps, f"trainer.max_steps={trainer.max_steps}"
    batches = _batches(trainer, trainer.datamodule)
    if batches is None:
        return -1, ""
    steps = batches // update_every
    return steps, f"the {steps} steps of trainer.max_epochs={trainer.max_epochs}"


def _batches(trainer: Any, data: object) -> int | None:
    """Training batches of a run; None if that is not known.

    The Trainer's own estimate would make the loaders, which then forget the position of a checkpoint.
    """
    batches, limit = getattr(data, "batches_per_epoch", None), trainer.limit_train_batches
    if batches is None or trainer.max_epochs in (None, -1):
        return None
    return trainer.max_epochs * (min(batches, limit) if isinstance(limit, int) else int(batches * limit))
