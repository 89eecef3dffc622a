"""Whether and how a run goes on from a checkpoint: its optimizer, its epoch, its early stopping."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from rtrl_moe_pl.training.optimizers import parts_of

OPTIMIZER = "rtrl_moe_pl_optimizer"
SCHEDULER = "rtrl_moe_pl_lr_scheduler"
# What training itself changes. The last rates are those of base_lrs and of the step.
_MOVES = {"params", "last_epoch", "base_lrs", "verbose", "lr_lambdas", "T_cur", "T_i"}
_CYCLED = {"betas", "momentum"}  # by a schedule with max_momentum


def describe(optimizer: Optimizer | None, scheduler: LRScheduler | None) -> dict[str, str]:
    """What a checkpoint says of its optimizer: the classes, "" for none."""
    parts = parts_of(optimizer) if optimizer else []
    return {
        OPTIMIZER: " and ".join(type(part).__name__ for part in parts),
        SCHEDULER: type(scheduler).__name__ if scheduler else "",
    }


def check_optimizer(
    checkpoint: Mapping[str, Any],
    optimizer: Optimizer,
    scheduler: LRScheduler | None,
    module: nn.Module,
    max_steps: int,
) -> None:
    """Compare a checkpoint's optimizer and schedule with those that the configuration makes.

    Options that differ are named in one warning: the checkpoint's are used. Those of a schedule that a checkpoint does
    not hold (`Warmup`'s) are the configuration's, and nothing to warn of.

    Args:
        checkpoint: of a fit.
        optimizer, scheduler: newly made.
        module: whose parameters they are.
        max_steps: of the run; -1: no limit.

    Raises:
        ValueError: if a class differs, or the schedule ends before the run does.
    """
    ours = describe(optimizer, scheduler)
    for key, option in ((OPTIMIZER, "model.optimizer"), (SCHEDULER, "model.lr_scheduler")):
        saved = checkpoint.get(key, ours[key])
        if saved != ours[key] and (saved or key == SCHEDULER):
            raise ValueError(
                f"{option}: the checkpoint was made with {saved or 'none'}, but the configuration says "
                f"{ours[key] or 'none'}: resume with the same"
            )
    groups = checkpoint["optimizer_states"][0]["param_groups"]
    differing = list(_groups(groups, optimizer.param_groups, scheduler is not None, module))
    if scheduler is not None and checkpoint.get("lr_schedulers"):
        state = checkpoint["lr_schedulers"][0]
        differing += _differing(state, scheduler.state_dict(), "of the schedule")
        if isinstance(scheduler, OneCycleLR) and state["total_steps"] < max_steps:
            raise ValueError(
                f"model.lr_scheduler: the checkpoint's OneCycleLR ends after total_steps={state['total_steps']}, "
                f"before trainer.max_steps={max_steps}: a schedule cannot be made longer on resuming"
            )
    if differing:
        begin = " from these weights: model.pretrained" if hasattr(module, "pretrained") else ""
        rank_zero_warn(
            f"the checkpoint's optimizer goes on as it was, not as the configuration says: {', '.join(differing)}; for "
            f"other options begin a new run{begin}"
        )


def _groups(saved: Sequence[Any], ours: Sequence[Any], scheduled: bool, module: nn.Module) -> Iterator[str]:
    names = {parameter: name.partition(".")[0] for name, parameter in module.named_parameters()}
    for there, here in zip(saved, ours, strict=False):
        moves = {"lr"} if scheduled else set()
        moves |= _CYCLED if "max_momentum" in here else set()
        part = f"of the {names.get(here['params'][0])}" if len(ours) > 1 else ""
        yield from _differing({key: value for key, value in there.items() if key not in moves}, here, part)


def _differing(there: Mapping[str, Any], here: Mapping[str, Any], part: str) -> list[str]:
    """Options of both that are not equal, in words. Private ones are not options, but for OneCycleLR's phases."""
    found = []
    for key in there.keys() & here.keys() - _MOVES:
        one, two = _plain(there[key]), _plain(here[key])
        if one != two and (not key.startswith("_") or key == "_schedule_phases"):
            name = " ".join(filter(None, ["lr" if key == "initial_lr" else key.lstrip("_"), part]))
            short = not isinstance(one, list) or (len(one) <= 2 and not isinstance(one[0], dict))
            found.append(f"{name} is {one} there and {two} here" if short else f"{name} differ")
    return sorted(found)


def _plain(value: Any) -> Any:
    """Numbers of tensors, lists of tuples: a checkpoint may keep the one for the other."""
    if isinstance(value, Tensor):
        return value.tolist()
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def require_resumable(checkpoint: Mapping[str, Any], carry: str) -> None:
    """Refuse, in one line, a checkpoint that training cannot go on from."""
    missing = [key for key in ("optimizer_states", "lr_schedulers", "loops", carry) if key not in checkpoint]
    if missing:
        raise ValueError(
            f"--ckpt_path: training cannot go on from this checkpoint, it holds no {', '.join(missing)}: give one that "
            "fit has written whole"
        )


def reopen_epoch(checkpoint: dict[str, Any]) -> None:
    """Let an epoch that max_steps ended early go on: Lightning counts it as one of max_epochs."""
    loops = checkpoint["loops"]["fit_loop"]
    progress, batches = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    counts = progress["total"]
    ended = counts["processed"] == counts["started"] == counts["ready"] > 0
    if ended and not batches["is_last_batch"]:
        for counts in progress.values():
            counts["processed"] -= 1
            counts["completed"] = min(counts["completed"], counts["processed"])


def close_epoch(fit_loop: Any) -> None:
    """Leave an epoch that had ended when the checkpoint was written.

    With max_steps, Lightning would run it again, without a batch, and count it twice.
    """
    progress = fit_loop.epoch_progress
    ended = progress.total.processed == progress.total.ready and not fit_loop.restarted_on_epoch_start
    if fit_loop.restarting and ended:
        for counts in (progress.total, progress.current):
            counts.completed = counts.processed
        fit_loop.reset_restart_stage()
        _Loop.restarting.fset(fit_loop, False)  # type: ignore[attr-defined]  # FitLoop's own setter would refuse


def stop_again(trainer: Any) -> None:
    """Stop at once, with a warning, where early stopping had ended the run that the checkpoint is of."""
    for callback in trainer.callbacks:
        if isinstance(callback, EarlyStopping) and callback.stopping_reason != EarlyStoppingReason.NOT_STOPPED:
            trainer.should_stop = True
            rank_zero_warn(
                f"{type(callback).__name__} on {callback.monitor} has ended the run that the checkpoint is of: to go "
                "on, leave it out of trainer.callbacks"
            )


def require_finite(weights: Mapping[str, Any]) -> None:
    """Refuse, in one line, the weights of a checkpoint if one is NaN or infinite."""
    for name, value in weights.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(f"--ckpt_path: {name} of this checkpoint holds NaN or infinity: give an earlier one")
