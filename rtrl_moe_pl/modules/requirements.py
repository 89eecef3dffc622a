"""What a SequenceModule needs of its parts and of its batches, refused in one line where it is not so."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from rtrl_moe_pl.gradients import TBPTT, GradientAlgorithm
from rtrl_moe_pl.modules.losses import WeightedCrossEntropy

FORM = "Batch(inputs [B, T, ..], (labels [B, T], weights [B, T]), starts [B, T])"
NO_CLASS = -100  # a label that torch's cross-entropy leaves out


@torch.no_grad()
def require_batch(batch: Any, classes: int, dtype: torch.dtype, loss: nn.Module) -> None:
    """Refuse a batch, of data of a user's own, that would fail later in words about something else, or train wrongly.

    Args:
        batch: as a loader gave it, on the device.
        classes: that the readout tells apart; labels are looked at where the loss is weighted cross-entropy.
        dtype: of the model.
        loss: of the model.

    Raises:
        TypeError, ValueError: naming the part.
    Cost: a few reductions and transfers to the host: of first batches only.
    """
    try:
        inputs, (labels, weights), starts = batch.inputs, batch.targets, batch.starts
    except (AttributeError, TypeError, ValueError):
        raise TypeError(f"data: batches must be rtrl_moe_pl.data.{FORM}, got {type(batch).__name__}") from None
    if inputs.is_floating_point() and inputs.dtype != dtype:
        raise TypeError(f"data: inputs are {inputs.dtype}, the model is {dtype}: give them as that")
    shape, classified = tuple(inputs.shape[:2]), isinstance(loss, WeightedCrossEntropy)
    for name, tensor, kind, fits in (
        ("labels", labels, "int64", lambda labels: not classified or labels.dtype == torch.int64),
        ("weights", weights, "floating point", Tensor.is_floating_point),
        ("starts", starts, "bool, or None", lambda starts: starts.dtype == torch.bool),
    ):
        if tensor is None and name == "starts":
            continue
        if not (isinstance(tensor, Tensor) and fits(tensor)):
            given = getattr(tensor, "dtype", type(tensor).__name__)
            raise TypeError(f"data: {name} of a batch must be {kind}, got {given}: a batch is {FORM}")
        if (classified or name != "labels") and tuple(tensor.shape) != shape:
            raise ValueError(
                f"data: {name} of a batch must be {list(shape)} as its inputs, got {list(tensor.shape)}: a batch is "
                f"{FORM}"
            )
    if bool((weights < 0).any()):
        raise ValueError(f"data: weights of a batch must be at least 0, got {float(weights.min()):g}")
    wrong = labels[((labels < 0) | (labels >= classes)) & (labels != NO_CLASS)] if classified else labels[:0]
    if len(wrong):
        raise ValueError(
            f"data: labels of a batch must be 0 to {classes - 1} (data.output_size is {classes}), got {int(wrong[0])}"
        )


def warn_of_shorter_windows(gradient: GradientAlgorithm, steps: int) -> None:
    """Say so where lanes go on, and TBPTT's windows are the steps of a batch: the algorithm is another than it says."""
    if isinstance(gradient, TBPTT) and (gradient.window or 0) > steps:
        rank_zero_warn(
            f"model.gradient: {gradient!r} is cut after the {steps} steps of a batch, and trains as TBPTT(window="
            f"{steps}): set data.steps_per_batch to a multiple of its window for what it says"
        )


@torch.no_grad()
def require_readout(cell: nn.Module, readout: nn.Module, output_size: int) -> None:
    """Refuse a readout that does not fit the cell, in one line and before any data is made."""
    size = cell.state_size
    for name in ("num_slots", "slot_size"):
        ours, needed = getattr(readout, name, None), getattr(cell, name, None)
        if ours is not None and needed is not None and ours != needed:
            raise ValueError(f"model.readout.{name} is {ours}, but the cell's is {needed}: give both the same")
    given = [cell.initial_state(2)]  # type: ignore[operator]
    if getattr(readout, "takes_input", False):
        if not isinstance(getattr(cell, "input_size", None), int):
            return
        width = getattr(readout, "input_size", cell.input_size)
        if width != cell.input_size:
            raise ValueError(
                f"model.readout.input_size is {width}, but the cell reads {cell.input_size} numbers: give both the same"
            )
        given.append(given[0].new_zeros(2, cell.input_size))  # type: ignore[call-overload]
    try:
        shape = tuple(readout(*given).shape)
    except RuntimeError as error:
        raise ValueError(
            f"model.readout ({type(readout).__name__}) does not take states of size {size}: {error}"
        ) from None
    if shape != (2, output_size):
        raise ValueError(
            f"model.readout ({type(readout).__name__}) returns {shape[1:]} values for a state; "
            f"the data needs ({output_size},)"
        )
