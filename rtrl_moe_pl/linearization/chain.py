"""The reverse sweep over a window: S + 1 cotangents from its end to its start."""

from __future__ import annotations

from dataclasses import dataclass

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
    """Cotangents over a window; the last axis holds the S end-state entries, then the loss.

    Args:
        states: cotangent of the state returned at each step, [k, B, S, S + 1]; None where no one needs them.
        start: cotangent of the state the window began with, [B, S, S + 1].
        initial: cotangent of the initial state used at the starts, summed over them, [B, S, S + 1]; None if none.
        taps: cotangents of taps' outputs by ``jacobian_key``.
    """

    states: Tensor | None
    start: Tensor
    initial: Tensor | None
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

    Cost: k B (S + 1) S^2 products; k small steps in sequence, all else is batched over the window.
    """
    steps, batch, size = loss_cotangents.shape
    back = _diagonal_step(derivatives, steps, batch, size, workspace)
    keys = {jacobian_key(jacobian): jacobian for _, jacobian in derivatives.taps}
    if back is None:
        back = _MatrixStep(transition_matrices(derivatives, steps, batch, loss_cotangents, workspace))
    elif set(keys) > set(back.taps):
        keep_states = True
    keep_states |= not back.taps
    kept = steps + 1 if keep_states else 2  # a ring; kept whole, [0] is the window's start
    ring = workspace.empty("states", (kept, batch, size, size + 1), loss_cotangents)
    state = ring[steps % kept]
    state.zero_().diagonal(dim1=1, dim2=2).fill_(1.0)
    state[:, :, size] = loss_cotangents[-1]
    lossy = (loss_cotangents != 0).flatten(1).any(1).tolist()
    initial: Tensor | None = None
    for t in reversed(range(steps)):
        earlier = ring[t % kept]
        back(t, state, earlier)
        state = earlier
        if starting[t]:
            assert starts is not None
            at_start = starts[:, t, None, None]
            taken = torch.where(at_start, state, 0.0)
            initial = taken if initial is None else initial + taken
            state.masked_fill_(at_start, 0.0)
        if t % FLUSH_EVERY == 0:
            copy_flushed(state, state)
        if t and lossy[t - 1]:
            state[:, :, size] += loss_cotangents[t - 1]
    states = ring[1:] if keep_states else None
    taps: dict[Key, Cotangents] = {key: StoredCotangents(value) for key, value in back.taps.items()}
    for key, jacobian in keys.items():
        if key not in taps:
            assert states is not None
            taps[key] = tap_cotangents(jacobian, states, f"tap {len(taps)}", workspace)
    return Sweep(states, state, initial, taps)


class _MatrixStep:
    """One step back by the matrix ds'/ds: for any cell."""

    def __init__(self, transitions: Tensor) -> None:
        self.transitions = transitions.permute(1, 2, 3, 0)  # [k, B, S, S], transposed
        self.taps: dict[Key, Tensor] = {}

    def __call__(self, t: int, later: Tensor, earlier: Tensor) -> None:
        torch.bmm(self.transitions[t], later, out=earlier)


class _DiagonalStep:
    """One step back where ds'/ds = diag(T) W + diag(a): the tap's cotangents are on the way, and W is shared."""

    def __init__(
        self, scale: Tensor | None, weight: Tensor | None, direct: Tensor | None, taps: dict[Key, Tensor], steps: int
    ) -> None:
        self.scale = None if scale is None else scale.view(steps, -1, scale.shape[1], 1)
        self.direct = None if direct is None else direct.view(steps, -1, direct.shape[1], 1)
        self.weight = weight  # [B, S, S], transposed
        self.taps = taps
        self.out = next(iter(taps.values()), None)

    def __call__(self, t: int, later: Tensor, earlier: Tensor) -> None:
        if self.scale is None or self.weight is None or self.out is None:
            assert self.direct is not None
            torch.mul(later, self.direct[t], out=earlier)
            return
        torch.mul(later, self.scale[t], out=self.out[t])
        torch.bmm(self.weight, self.out[t], out=earlier)
        if self.direct is not None:
            earlier.addcmul_(later, self.direct[t])


def _diagonal_step(
    derivatives: StepDerivatives, steps: int, batch: int, size: int, workspace: Workspace
) -> _DiagonalStep | None:
    """The cheaper step where the cell allows it."""
    through = [(j, w) for j, w in derivatives.sparse if w is not None]
    direct = [j for j, w in derivatives.sparse if w is None]
    jacobians = [j for j, _ in through] + direct
    if derivatives.dense is not None or len(through) > 1 or not all(j.pattern.is_diagonal for j in jacobians):
        return None
    factor = direct[0].values[0] if direct else None
    if not through:
        return _DiagonalStep(None, None, factor, {}, steps) if direct else None
    jacobian, weight = through[0]
    assert weight is not None
    out = workspace.empty("tap 0", (steps, batch, size, size + 1), weight)
    taps = {jacobian_key(jacobian): out}
    return _DiagonalStep(jacobian.values[0], weight.T.expand(batch, -1, -1), factor, taps, steps)


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


def tap_cotangents(jacobian: Jacobian, states: Tensor, name: str, workspace: Workspace) -> Cotangents:
    """Cotangents of a tap's output at every step, given those of the states [k, B, S, S + 1]."""
    if isinstance(jacobian, SparseJacobian):
        return ScaledCotangents(states, jacobian, workspace)
    steps, batch, _, width = states.shape
    out = workspace.empty(name, (steps * batch, jacobian.shape[2], width), states)
    torch.bmm(jacobian.transpose(1, 2), states.flatten(0, 1), out=out)
    return StoredCotangents(out.unflatten(0, (steps, batch)))


def jacobian_key(jacobian: Jacobian) -> Key:
    """Equal for taps whose outputs are added: autograd hands both the same tensors."""
    values = jacobian.values if isinstance(jacobian, SparseJacobian) else [jacobian]
    return tuple((v.data_ptr(), v.shape, v.stride()) for v in values)
