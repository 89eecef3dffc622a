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
    back = _diagonal_step(derivatives, steps, batch, size, workspace)
    keys = {jacobian_key(jacobian): jacobian for _, jacobian in derivatives.taps}
    if back is None:
        back = _MatrixStep(transition_matrices(derivatives, steps, batch, loss_cotangents, workspace))
    keep_states |= bool(keys.keys() - back.taps.keys())
    kept = steps + 1 if keep_states else 2  # a ring; kept whole, [0] is the window's start
    ring = workspace.empty("states", (kept, batch, size, size), loss_cotangents)
    state = ring[steps % kept]
    state.zero_().diagonal(dim1=1, dim2=2).fill_(1.0)
    # losses[t + 1] belongs to the state that step t returned, [0] to the window's start
    losses = torch.cat([torch.zeros_like(loss_cotangents[:1]), loss_cotangents])
    initial, initial_loss = None, None
    for t in reversed(range(steps)):
        earlier = ring[t % kept]
        back(t, state, earlier)
        loss = back.vector(t, losses[t + 1])
        state = earlier
        if starting[t]:
            assert starts is not None
            here = starts[:, t, None]
            taken, taken_loss = torch.where(here[..., None], state, 0.0), torch.where(here, loss, 0.0)
            initial = taken if initial is None else initial + taken
            initial_loss = taken_loss if initial_loss is None else initial_loss + taken_loss
            state.masked_fill_(here[..., None], 0.0)
            loss = loss.masked_fill(here, 0.0)
        if t % FLUSH_EVERY == 0:
            copy_flushed(state, state)
        losses[t] += loss
    states = ring[1:] if keep_states else None
    taps: dict[Key, Cotangents] = {}
    for key, jacobian in keys.items():
        if key in back.taps:
            assert isinstance(jacobian, SparseJacobian)
            from_loss = jacobian.times_left(losses[1:].flatten(0, 1)).unflatten(0, (steps, batch))
            taps[key] = StoredCotangents(back.taps[key], from_loss)
        else:
            assert states is not None
            taps[key] = tap_cotangents(jacobian, states, losses[1:], f"tap {len(taps)}", workspace)
    return Sweep(states, losses[1:], state, losses[0], initial, initial_loss, taps)


class _MatrixStep:
    """One step back by the matrix ds'/ds: for any cell."""

    def __init__(self, transitions: Tensor) -> None:
        self.transitions = transitions.permute(1, 2, 3, 0)  # [k, B, S, S], transposed
        self.taps: dict[Key, Tensor] = {}

    def __call__(self, t: int, later: Tensor, earlier: Tensor) -> None:
        torch.bmm(self.transitions[t], later, out=earlier)

    def vector(self, t: int, later: Tensor) -> Tensor:
        return torch.bmm(later[:, None], self.transitions[t].transpose(1, 2))[:, 0]


class _DiagonalStep:
    """One step back where ds'/ds = diag(T) W + diag(a): the tap's cotangents are on the way, and W is shared."""

    def __init__(
        self, scale: Tensor | None, weight: Tensor | None, direct: Tensor | None, taps: dict[Key, Tensor], steps: int
    ) -> None:
        self.scale = None if scale is None else scale.view(steps, -1, scale.shape[1])
        self.direct = None if direct is None else direct.view(steps, -1, direct.shape[1])
        self.weight = weight  # [S, S]
        self.taps = taps
        self.out = next(iter(taps.values()), None)

    def __call__(self, t: int, later: Tensor, earlier: Tensor) -> None:
        if self.scale is None or self.weight is None or self.out is None:
            assert self.direct is not None
            torch.mul(later, self.direct[t, :, :, None], out=earlier)
            return
        torch.mul(later, self.scale[t, :, :, None], out=self.out[t])
        torch.bmm(self.weight.T.expand(later.shape[0], -1, -1), self.out[t], out=earlier)
        if self.direct is not None:
            earlier.addcmul_(later, self.direct[t, :, :, None])

    def vector(self, t: int, later: Tensor) -> Tensor:
        if self.scale is None or self.weight is None:
            assert self.direct is not None
            return later * self.direct[t]
        earlier = (later * self.scale[t]) @ self.weight
        return earlier if self.direct is None else earlier.addcmul_(later, self.direct[t])


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
    out = workspace.empty("tap on the way", (steps, batch, size, size), weight)
    return _DiagonalStep(jacobian.values[0], weight, factor, {jacobian_key(jacobian): out}, steps)


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
