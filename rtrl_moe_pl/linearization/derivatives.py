"""What the derivatives of a step are, and how those of many rows are put together from a few at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

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
    return tuple(map(place, values))


def place(value: Tensor) -> Key:
    """Equal for one tensor seen twice."""
    return value.data_ptr(), value.shape, value.stride()


def tensors(tap: Tap, jacobian: Jacobian) -> list[Tensor]:
    """What a tap holds for every row."""
    values = jacobian.values if isinstance(jacobian, SparseJacobian) else [jacobian]
    return [*(v for v in (tap.input, tap.experts) if v is not None), *values]


def leaves(taps: Sequence[tuple[Tap, Jacobian]]) -> dict[Key, Tensor]:
    """Every different tensor of some taps, by where it lies, in order."""
    return {place(value): value for tap, jacobian in taps for value in tensors(tap, jacobian)}


def shared(taps: Sequence[tuple[Tap, Jacobian]]) -> list[list[int]]:
    """Which of the ``leaves`` each tap holds."""
    order = {key: number for number, key in enumerate(leaves(taps))}
    return [[order[place(value)] for value in tensors(tap, jacobian)] for tap, jacobian in taps]


def with_leaves(taps: Sequence[tuple[Tap, Jacobian]], others: Sequence[Tensor]) -> list[tuple[Tap, Jacobian]]:
    """The same taps with other tensors in place of their ``leaves``."""
    new = dict(zip(leaves(taps), others, strict=True))
    result: list[tuple[Tap, Jacobian]] = []
    for tap, jacobian in taps:
        source, experts = (None if v is None else new[place(v)] for v in (tap.input, tap.experts))
        if isinstance(jacobian, SparseJacobian):
            whole: Jacobian = replace(jacobian, values=[new[place(v)] for v in jacobian.values])
        else:
            whole = new[place(jacobian)]
        result.append((replace(tap, input=source, experts=experts), whole))
    return result


def detached(taps: Sequence[Tap]) -> list[Tap]:
    """What outlives the step: no graph, no buffer of the cell's (it may change), of the output its shape alone."""
    copies: dict[Key, Tensor] = {}  # what taps share, they go on to share

    def kept(value: Tensor | None) -> Tensor | None:
        if value is None or value.requires_grad:
            return None if value is None else value.detach()
        if place(value) not in copies:
            copies[place(value)] = value.clone()
        return copies[place(value)]

    return [
        replace(tap, output=tap.output[:1].detach().clone(), input=kept(tap.input), experts=kept(tap.experts))
        for tap in taps
    ]


def in_tiles(
    differentiate: Callable[[Tensor | RoutedInputs, Tensor], tuple[Tensor, StepDerivatives]],
    x: Tensor | RoutedInputs,
    state: Tensor,
    rows: int,
) -> tuple[Tensor, StepDerivatives]:
    """New states [N, S] and dense derivatives of N rows, from ``differentiate`` called on ``rows`` of them at a time.

    What several taps share in every tile they share in the whole; if tiles differ in that, all rows are taken at once.
    """
    if len(state) <= rows:
        return differentiate(x, state)
    outputs, dense, whole, pattern, taps = [], [], [], [], []
    for begin in range(0, len(state), rows):
        here = slice(begin, begin + rows)
        output, found = differentiate(x[here], state[here])
        assert found.dense is not None
        outputs.append(output)
        dense.append(found.dense)
        taps, parts = found.taps, list(leaves(found.taps).values())
        if begin == 0:
            pattern, whole = shared(taps), [part.new_empty(len(state), *part.shape[1:]) for part in parts]
        elif shared(taps) != pattern:
            return differentiate(x, state)
        for joined, part in zip(whole, parts, strict=True):
            joined[here] = part
    return torch.cat(outputs), StepDerivatives([], torch.cat(dense), with_leaves(taps, whole))
