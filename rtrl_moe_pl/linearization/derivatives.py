"""What the derivatives of a step are, and how those of many rows are put together from a few at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rtrl_moe_pl.cells.routed import Routing
from rtrl_moe_pl.linearization.routed import RoutedInputs
from rtrl_moe_pl.linearization.sparse import SparseJacobian
from rtrl_moe_pl.linearization.taps import Tap

Jacobian = SparseJacobian | Tensor  # dense: [N, V, U]
Key = tuple[object, ...]


class PlanMismatch(Exception):
    """The cell did something that its plan does not describe: plan again, or take the slow path."""


@dataclass
class StepDerivatives:
    """d s' at fixed parameters, for N rows.

    Args:
        sparse: pairs (T [N, S, U], W [U, S]) whose products T W are summed into ds'/ds; W None for the identity.
        dense: what else is summed into it, [N, S, S], or None.
        taps: each tap with ds'/d(its output) [N, S, U].
        routing: of a routed cell, whose s' and s are here the slots written [N, W d] and those read and written
            [N, (R + W) d].
    """

    sparse: list[tuple[SparseJacobian, Tensor | None]]
    dense: Tensor | None
    taps: list[tuple[Tap, Jacobian]]
    routing: Routing | None = None


def jacobian_key(jacobian: Jacobian) -> Key:
    """Equal for taps whose outputs are added: autograd hands both the same tensors."""
    values = jacobian.values if isinstance(jacobian, SparseJacobian) else [jacobian]
    return tuple((v.data_ptr(), v.shape, v.stride()) for v in values)


def in_tiles(
    differentiate: Callable[[Tensor | RoutedInputs, Tensor], tuple[Tensor, StepDerivatives]],
    x: Tensor | RoutedInputs,
    state: Tensor,
    rows: int,
) -> tuple[Tensor, StepDerivatives]:
    """New states [N, S] and dense derivatives of N rows, from ``differentiate`` called on ``rows`` of them at a time.

    Raises:
        PlanMismatch: if the taps whose outputs are added are not the same in every tile.
    """
    if len(state) <= rows:
        return differentiate(x, state)
    outputs, taps, whole = [], [], []
    owners: list[int] = []  # of every Jacobian, the first that is the same tensor
    for begin in range(0, len(state), rows):
        here = slice(begin, begin + rows)
        output, found = differentiate(x[here], state[here])
        outputs.append(output)
        taps.append([tap for tap, _ in found.taps])
        parts: list[Any] = [found.dense, *(part for _, part in found.taps)]
        keys = [jacobian_key(part) for part in parts]
        if begin == 0:
            owners = [keys.index(key) for key in keys]
            whole = [part.new_empty(len(state), *part.shape[1:]) for part in parts]
            whole = [whole[owner] for owner in owners]
        if owners != [keys.index(key) for key in keys]:
            raise PlanMismatch("layers whose outputs are added in some rows are not in others")
        for i in set(owners):
            whole[i][here] = parts[i]
    joined = map(_joined, zip(*taps, strict=True))
    return torch.cat(outputs), StepDerivatives([], whole[0], list(zip(joined, whole[1:], strict=True)))


def _joined(parts: tuple[Tap, ...]) -> Tap:
    """One meeting, from those of some rows each."""
    inputs = [part.input for part in parts if part.input is not None]
    experts = [part.experts for part in parts if part.experts is not None]
    return replace(
        parts[0], input=torch.cat(inputs) if inputs else None, experts=torch.cat(experts) if experts else None
    )
