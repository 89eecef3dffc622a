"""One window run forward: the cell in a loop, the readout once over all its states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rtrl_moe_pl.cells.routed import RoutedCell, Routing, require_routings

Targets = Any  # a tensor [B, T, ..] or a tuple of them
LossFunction = Callable[[Tensor, Targets], Tensor]
Unroll = Callable[..., tuple[list[Tensor], list[Tensor]]]  # as ``unroll``


def slice_time(value: Targets, start: int, stop: int) -> Targets:
    """Cut ``[B, T, ..]`` tensors, or a tuple of them, to the steps ``start .. stop - 1``."""
    if isinstance(value, Tensor):
        return value[:, start:stop]
    return tuple(slice_time(part, start, stop) for part in value)


def starting_steps(starts: Tensor | None, steps: int) -> list[bool]:
    """Whether any lane starts at each step; one transfer for the whole window."""
    return [False] * steps if starts is None else starts.any(0).tolist()


def routings_of(cell: nn.Module) -> list[Routing] | None:
    """Where ``unroll`` may put what a routed cell chooses; None for any other cell."""
    return [] if isinstance(cell, RoutedCell) else None


def unroll(
    cell: nn.Module,
    inputs: Sequence[Tensor],  # k tensors [B, ..]
    state: Tensor,  # [B, S]
    initial: Tensor | None,  # [B, S]
    starts: Tensor | None,  # [B, k] bool
    starting: list[bool],
    routings: list[Routing] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Run the cell over a window.

    Args:
        routings: of a routed cell, to be filled with what each step chose.

    Raises:
        ValueError: if the cell returns no state, changes the one it is given, or chooses what there is not.

    Returns:
        the k states the cell was given (after a start replaced them) and the k states it returned, each [B, S].
    """
    given: list[Tensor] = []
    returned: list[Tensor] = []
    for t, x in enumerate(inputs):
        if starting[t]:
            assert starts is not None
            assert initial is not None
            state = torch.where(starts[:, t, None], initial, state)
        given.append(state)
        version = _version(state)
        if routings is None:
            state = cell(x, state)
        else:
            state, routing = cell.advance(x, state)  # type: ignore[operator]
            routings.append(routing)
        if not isinstance(state, Tensor) or state.shape != given[0].shape:
            got = f"shape {tuple(state.shape)}" if isinstance(state, Tensor) else f"a {type(state).__name__}"
            raise ValueError(
                f"{type(cell).__name__}.forward returned {got}, but it was given a state of shape "
                f"{tuple(given[0].shape)}: a cell must return one tensor [batch, state_size]"
            )
        if _version(given[-1]) != version:
            raise ValueError(
                f"{type(cell).__name__}.forward changes the state it is given in place: return a new tensor"
            )
        returned.append(state)
    if routings:
        require_routings(cell, routings)  # type: ignore[arg-type]
    return given, returned


def _version(value: Tensor) -> int:
    """How often a tensor was changed in place; tensors of inference mode do not count."""
    return 0 if value.is_inference() else value._version


def read_out(readout: nn.Module, states: Tensor, inputs: Tensor) -> Tensor:
    """Apply the readout once to all states of a window.

    Args:
        readout: module [N, S] -> [N, O]; called as ``readout(s, x)`` if it has ``takes_input = True``.
        states: [k, B, S], time first.
        inputs: [B, k, ..].

    Returns:
        outputs [B, k, O].
    """
    steps, batch = states.shape[:2]
    rows = states.transpose(0, 1).reshape(batch * steps, -1)
    if getattr(readout, "takes_input", False):
        outputs = readout(rows, inputs.reshape(batch * steps, *inputs.shape[2:]))
    else:
        outputs = readout(rows)
    if outputs.ndim != 2 or outputs.shape[0] != batch * steps:
        raise ValueError(
            f"{type(readout).__name__} returned shape {tuple(outputs.shape)} for {batch * steps} states: "
            "a readout must return [rows, outputs]"
        )
    return outputs.view(batch, steps, -1)


def auxiliary_loss(cell: nn.Module, inputs: Tensor, given: Tensor, weight: float | Tensor) -> Tensor | None:
    """What a cell's ``auxiliary(x, s) -> [N]`` adds to the loss, summed over all rows; None if there is nothing.

    Args:
        inputs: [B, k, ..].
        given: the states that the cell was given, [k, B, S].
        weight: of the sum.
    """
    auxiliary = getattr(cell, "auxiliary", None)
    penalty = None if auxiliary is None else auxiliary(inputs.transpose(0, 1).flatten(0, 1), given.flatten(0, 1))
    return None if penalty is None else weight * penalty.sum()


def evaluate_loss(loss_fn: LossFunction, outputs: Tensor, targets: Targets, auxiliary: Tensor | None = None) -> Tensor:
    """The window's loss, checked to be one number; with what the cell adds.

    Raises:
        TypeError: if the loss cannot do with the targets.
        ValueError: if it returns anything else.
    """
    try:
        loss = loss_fn(outputs, targets)
    except (AttributeError, TypeError) as error:
        name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
        raise TypeError(f"the loss {name} does not take outputs and these targets: {error}") from error
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn returned {got}: it must return one number, summed over lanes and steps")
    return loss.reshape(()) if auxiliary is None else loss.reshape(()) + auxiliary
