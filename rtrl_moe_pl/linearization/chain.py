"""The reverse sweep over a window: S + 1 cotangents from its end to its start."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rtrl_moe_pl.linearization.sparse import SparseJacobian
from rtrl_moe_pl.linearization.step import StepDerivatives


@dataclass
class Sweep:
    """Cotangents of every state of a window; the last axis holds the S end-state entries, then the loss.

    Args:
        states: cotangent of the state returned at each step, [k, B, S, S + 1].
        start: cotangent of the state the window began with, [B, S, S + 1].
        initial: cotangent of the initial state used at the starts, summed over them, [B, S, S + 1]; None if none.
    """

    states: Tensor
    start: Tensor
    initial: Tensor | None


def sweep(
    derivatives: StepDerivatives,
    loss_cotangents: Tensor,  # [k, B, S]
    starts: Tensor | None,  # [B, k] bool
    starting: list[bool],
) -> Sweep:
    """Pull the identity on the end state, and the loss, back through the window.

    Cost: k B (S + 1) S^2 products; k small steps in sequence, all else is batched over the window.
    """
    steps, batch, size = loss_cotangents.shape
    transition = transition_matrices(derivatives, steps, batch)
    states = loss_cotangents.new_zeros(steps + 1, batch, size, size + 1)  # [0] is the window's start
    states[-1].diagonal(dim1=1, dim2=2).fill_(1.0)
    states[-1, :, :, size] = loss_cotangents[-1]
    lossy = (loss_cotangents != 0).flatten(1).any(1).tolist()
    initial: Tensor | None = None
    for t in reversed(range(steps)):
        torch.bmm(transition[:, t].permute(1, 2, 0), states[t + 1], out=states[t])
        if starting[t]:
            assert starts is not None
            at_start = starts[:, t, None, None]
            taken = torch.where(at_start, states[t], 0.0)
            initial = taken if initial is None else initial + taken
            states[t].masked_fill_(at_start, 0.0)
        if t and lossy[t - 1]:
            states[t, :, :, size] += loss_cotangents[t - 1]
    return Sweep(states[1:], states[0], initial)


def transition_matrices(derivatives: StepDerivatives, steps: int, batch: int) -> Tensor:
    """ds'/ds of every row, row index first: [S, k, B, S]."""
    total: Tensor | None = None
    if derivatives.sparse:
        left = torch.cat([jacobian.entries_by_row() for jacobian, _ in derivatives.sparse], 2)  # [S, N, G]
        right = torch.cat([jacobian.columns_by_row(w) for jacobian, w in derivatives.sparse], 1)  # [S, G, S]
        total = torch.bmm(left, right)  # [S, N, S]
    if derivatives.dense is not None:
        dense = derivatives.dense.transpose(0, 1)
        total = dense if total is None else total + dense
    assert total is not None
    return total.reshape(total.shape[0], steps, batch, -1)


def tap_cotangents(jacobian: SparseJacobian | Tensor, states: Tensor) -> Tensor:
    """Cotangents of a tap's output at every step: [k, B, U, S + 1]."""
    steps, batch, size, width = states.shape
    rows = states.view(steps * batch, size, width)
    if isinstance(jacobian, Tensor):
        return torch.bmm(jacobian.transpose(1, 2), rows).view(steps, batch, -1, width)
    out = rows.new_empty(rows.shape[0], jacobian.pattern.row_of.shape[1], width)
    jacobian.transposed_times(rows, out)
    return out.view(steps, batch, -1, width)
