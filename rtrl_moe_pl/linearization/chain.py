"""The reverse sweep over a window: S + 1 cotangents from its end to its start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rtrl_moe_pl.linearization.cotangents import Cotangents, ScaledCotangents, StoredCotangents
from rtrl_moe_pl.linearization.sparse import SparseJacobian
from rtrl_moe_pl.linearization.step import Jacobian, StepDerivatives
from rtrl_moe_pl.linearization.window import copy_flushed
from rtrl_moe_pl.linearization.workspace import Workspace

Key = tuple[object, ...]
FLUSH_EVERY = 8  # steps; a contracting cell loses a few orders of magnitude in that time


@dataclass
class Sweep:
    """Cotangents over a window, of the end state's S entries and of the window's loss.

    Args:
        states: of the state returned at each step, from the end state, [k, B, S, S]; None where no one needs them.
        losses: of the state returned at each step, from the loss, [k, B, S].
        transition, cotangent: of the state the window began with, [B, S, S] and [B, S].
        initial, initial_loss: of the initial state used at the starts, summed over them; None if there was none.
        taps: of taps' outputs, by ``jacobian_key``.
    """

    states: Tensor | None
    losses: Tensor
    transition: Tensor
    cotangent: Tensor
    initial: Tensor | None
    initial_loss: Tensor | None
    taps: dict[Key, Cotangents]


def sweep(
    derivatives: StepDerivatives,
    loss_cotangents: Tensor,  # [k, B, S]
    starts: Tensor | None,  # [B, k] bool
    starting: list[bool],
    keep_states: bool,
    workspace: Workspace,
) -> Sweep:
    """Pull the identity on the end state, and the loss, back through the window, and on to the taps.

    Args:
        keep_states: keep the cotangents of all states, not only of the first.

    Cost: k B S^3 multiply-adds; k small steps in sequence, all else is batched over the window.
    """
    steps, batch, size = loss_cotangents.shape
    back: _Step | None = _diagonal_step(derivatives, loss_cotangents, workspace)
    keys = {jacobian_key(jacobian): jacobian for _, jacobian in derivatives.taps}
    if back is None:
        back = _MatrixStep(transition_matrices(derivatives, steps, batch, loss_cotangents, workspace))
    keep_states |= bool(keys.keys() - back.taps.keys())
    kept = steps + 1 if keep_states else 2  # a ring; kept whole, [0] is the window's start
    ring = workspace.empty("states", (kept, batch, size, size), loss_cotangents)
    states = ring.unbind(0)
    states[steps % kept].zero_().diagonal(dim1=1, dim2=2).fill_(1.0)
    # losses[t + 1] belongs to the state that step t returned, [0] to the window's start; as rows [B, 1, S]
    every_loss = torch.cat([torch.zeros_like(loss_cotangents[:1]), loss_cotangents])
    losses = every_loss.unsqueeze(2).unbind(0)
    initial, initial_loss = None, None
    for t in reversed(range(steps)):
        earlier = states[t % kept]
        back.states(t, states[(t + 1) % kept], earlier)
        if starting[t]:
            assert starts is not None
            here = starts[:, t, None, None]
            loss = torch.zeros_like(losses[t])
            back.add_loss(t, losses[t + 1], loss)
            taken, taken_loss = torch.where(here, earlier, 0.0), torch.where(here, loss, 0.0)[:, 0]
            initial = taken if initial is None else initial + taken
            initial_loss = taken_loss if initial_loss is None else initial_loss + taken_loss
            earlier.masked_fill_(here, 0.0)
            losses[t].add_(loss.masked_fill_(here, 0.0))
        else:
            back.add_loss(t, losses[t + 1], losses[t])
        if t % FLUSH_EVERY == 0:
            copy_flushed(earlier, earlier)
    later = ring[1:] if keep_states else None
    taps: dict[Key, Cotangents] = dict(back.taps)
    for key, jacobian in keys.items():
        if key not in taps:
            assert later is not None
            taps[key] = tap_cotangents(jacobian, later, every_loss[1:], f"tap {len(taps)}", workspace)
    return Sweep(later, every_loss[1:], states[0], every_loss[0], initial, initial_loss, taps)


class _Step(Protocol):
    """One step back, with the taps' cotangents that were met on the way."""

    taps: dict[Key, StoredCotangents]

    def states(self, t: int, later: Tensor, earlier: Tensor) -> None:
        """Write the cotangents of the state that step ``t`` was given, from those of what it returned: [B, S, S]."""
        ...

    def add_loss(self, t: int, later: Tensor, earlier: Tensor) -> None:
        """Add the loss's part to what is in ``earlier``: [B, 1, S]."""
        ...


class _MatrixStep:
    """By the matrix ds'/ds: for any cell."""

    def __init__(self, transitions: Tensor) -> None:
        flipped = transitions.permute(1, 2, 3, 0)  # [k, B, S, S], transposed
        self.flipped, self.transitions = flipped.unbind(0), flipped.transpose(2, 3).unbind(0)
        self.taps: dict[Key, StoredCotangents] = {}

    def states(self, t: int, later: Tensor, earlier: Tensor) -> None:
        torch.bmm(self.flipped[t], later, out=earlier)

    def add_loss(self, t: int, later: Tensor, earlier: Tensor) -> None:
        earlier.baddbmm_(later, self.transitions[t])


class _TapStep:
    """Where ds'/ds = diag(T) W + diag(a): the tap's cotangents are on the way, and W is shared by all rows."""

    def __init__(self, scale: Tensor, weight: Tensor, direct: Tensor | None, tap: Key, out: StoredCotangents) -> None:
        steps, batch, size = out.shape
        self.scale, self.scale_row = _columns_and_rows(scale, steps)
        self.direct = None if direct is None else _columns_and_rows(direct, steps)
        self.weight = weight.expand(batch, size, size)
        self.flipped = self.weight.transpose(1, 2)
        self.out, self.out_loss = out.values.unbind(0), out.loss.unsqueeze(2).unbind(0)
        self.taps = {tap: out}

    def states(self, t: int, later: Tensor, earlier: Tensor) -> None:
        torch.mul(later, self.scale[t], out=self.out[t])
        torch.bmm(self.flipped, self.out[t], out=earlier)
        if self.direct is not None:
            earlier.addcmul_(later, self.direct[0][t])

    def add_loss(self, t: int, later: Tensor, earlier: Tensor) -> None:
        torch.mul(later, self.scale_row[t], out=self.out_loss[t])
        earlier.baddbmm_(self.out_loss[t], self.weight)
        if self.direct is not None:
            earlier.addcmul_(later, self.direct[1][t])


class _ElementwiseStep:
    """Where ds'/ds = diag(a)."""

    def __init__(self, direct: Tensor, steps: int) -> None:
        self.direct, self.direct_row = _columns_and_rows(direct, steps)
        self.taps: dict[Key, StoredCotangents] = {}

    def states(self, t: int, later: Tensor, earlier: Tensor) -> None:
        torch.mul(later, self.direct[t], out=earlier)

    def add_loss(self, t: int, later: Tensor, earlier: Tensor) -> None:
        earlier.addcmul_(later, self.direct_row[t])


def _columns_and_rows(factor: Tensor, steps: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Views of a factor [N, S] for every step: [B, S, 1] and [B, 1, S]."""
    parts = factor.unflatten(0, (steps, -1))
    return parts.unsqueeze(3).unbind(0), parts.unsqueeze(2).unbind(0)


def _diagonal_step(
    derivatives: StepDerivatives, like: Tensor, workspace: Workspace
) -> _TapStep | _ElementwiseStep | None:
    """The cheaper step where the cell allows it; ``like`` [k, B, S]."""
    steps, batch, size = like.shape
    through = [(j, w) for j, w in derivatives.sparse if w is not None]
    direct = [j for j, w in derivatives.sparse if w is None]
    jacobians = [j for j, _ in through] + direct
    if derivatives.dense is not None or len(through) > 1 or not all(j.pattern.is_diagonal for j in jacobians):
        return None
    factor = direct[0].values[0] if direct else None
    if not through:
        return None if factor is None else _ElementwiseStep(factor, steps)
    jacobian, weight = through[0]
    assert weight is not None
    out = workspace.empty("tap on the way", (steps, batch, size, size), like)
    return _TapStep(
        jacobian.values[0], weight, factor, jacobian_key(jacobian), StoredCotangents(out, torch.empty_like(like))
    )


def transition_matrices(
    derivatives: StepDerivatives, steps: int, batch: int, like: Tensor, workspace: Workspace
) -> Tensor:
    """ds'/ds of every row, row index first: [S, k, B, S]."""
    size = like.shape[-1]
    if not derivatives.sparse and derivatives.dense is not None:
        return derivatives.dense.transpose(0, 1).unflatten(1, (steps, batch))
    total = workspace.empty("transitions", (size, steps * batch, size), like)
    if derivatives.sparse:
        eye = torch.eye(size, dtype=like.dtype, device=like.device)
        factors = [jacobian.by_row(eye if w is None else w) for jacobian, w in derivatives.sparse]
        left, right = (torch.cat(parts, axis) for parts, axis in zip(zip(*factors, strict=True), (2, 1), strict=True))
        torch.bmm(left, right, out=total)  # [S, N, G] by [S, G, S]
    else:
        total.zero_()
    if derivatives.dense is not None:
        total += derivatives.dense.transpose(0, 1)
    return total.view(size, steps, batch, size)


def tap_cotangents(jacobian: Jacobian, states: Tensor, losses: Tensor, name: str, workspace: Workspace) -> Cotangents:
    """Cotangents of a tap's output at every step, given those of the states: [k, B, S, S] and [k, B, S]."""
    if isinstance(jacobian, SparseJacobian):
        return ScaledCotangents(states, losses, jacobian, workspace)
    steps, batch, size = losses.shape
    out = workspace.empty(name, (steps * batch, jacobian.shape[2], size), states)
    torch.bmm(jacobian.transpose(1, 2), states.flatten(0, 1), out=out)
    from_loss = torch.bmm(losses.flatten(0, 1)[:, None], jacobian)[:, 0]
    return StoredCotangents(out.unflatten(0, (steps, batch)), from_loss.unflatten(0, (steps, batch)))


def jacobian_key(jacobian: Jacobian) -> Key:
    """Equal for taps whose outputs are added: autograd hands both the same tensors."""
    values = jacobian.values if isinstance(jacobian, SparseJacobian) else [jacobian]
    return tuple((v.data_ptr(), v.shape, v.stride()) for v in values)
