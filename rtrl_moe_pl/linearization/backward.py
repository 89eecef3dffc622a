"""One step back in time, for cotangents of the state: by a matrix, or cheaper where the cell allows it."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from rtrl_moe_pl.linearization.sparse import SparseJacobian
from rtrl_moe_pl.linearization.step import Jacobian, StepDerivatives
from rtrl_moe_pl.linearization.workspace import Workspace

Key = tuple[object, ...]


class Backward(Protocol):
    """Steps back, in the order in which they were run; ``tap`` is what is met on the way, if anything is.

    A tap met on the way writes its cotangents to ``out``: [B, S, S] of the states, [B, 1, S] of the loss.
    """

    has_tap: bool

    def extend(self, derivatives: StepDerivatives, like: Tensor) -> None:
        """Add the steps of ``like`` [k, B, S]; what a parameter's update would change is copied."""
        ...

    def states(self, t: int, later: Tensor, earlier: Tensor, out: Tensor | None) -> None:
        """Write the cotangents of the state that step ``t`` was given, from those of what it returned: [B, S, S]."""
        ...

    def add_loss(self, t: int, later: Tensor, earlier: Tensor, out: Tensor | None) -> None:
        """Add the loss's part to what is in ``earlier``: [B, 1, S]."""
        ...


class MatrixBackward:
    """By the matrix ds'/ds: for any cell."""

    has_tap = False

    def __init__(self, workspace: Workspace, capacity: int) -> None:
        self.workspace, self.capacity = workspace, capacity
        self.transitions: list[Tensor] = []
        self.flipped: list[Tensor] = []

    def extend(self, derivatives: StepDerivatives, like: Tensor) -> None:
        steps, batch, size = like.shape
        begin = len(self.flipped)
        room = self.workspace.empty("transitions", (size, max(self.capacity, begin + steps) * batch, size), like)
        matrices = transition_matrices(derivatives, like, room[:, begin * batch : (begin + steps) * batch])
        flipped = matrices.permute(1, 2, 3, 0)  # [k, B, S, S], transposed
        self.flipped += flipped.unbind(0)
        self.transitions += flipped.transpose(2, 3).unbind(0)

    def states(self, t: int, later: Tensor, earlier: Tensor, out: Tensor | None) -> None:
        torch.bmm(self.flipped[t], later, out=earlier)

    def add_loss(self, t: int, later: Tensor, earlier: Tensor, out: Tensor | None) -> None:
        earlier.baddbmm_(later, self.transitions[t])


class TapBackward:
    """Where ds'/ds = diag(T) W + diag(a): the tap's cotangents are on the way, and a step's rows share W."""

    has_tap = True

    def __init__(self, workspace: Workspace, capacity: int) -> None:
        self.scale: list[Tensor] = []
        self.scale_row: list[Tensor] = []
        self.direct: list[Tensor] = []  # empty where a = 0
        self.direct_row: list[Tensor] = []
        self.weight: list[Tensor] = []
        self.flipped: list[Tensor] = []

    def extend(self, derivatives: StepDerivatives, like: Tensor) -> None:
        jacobian, weight, direct = _scales(derivatives)
        assert jacobian is not None
        assert weight is not None
        steps, batch, size = like.shape
        _extend(self.scale, self.scale_row, jacobian.values[0], steps)
        if direct is not None:
            _extend(self.direct, self.direct_row, direct.values[0], steps)
        weights = weight.clone().expand(batch, size, size)
        self.weight += [weights] * steps
        self.flipped += [weights.transpose(1, 2)] * steps

    def states(self, t: int, later: Tensor, earlier: Tensor, out: Tensor | None) -> None:
        assert out is not None
        torch.mul(later, self.scale[t], out=out)
        torch.bmm(self.flipped[t], out, out=earlier)
        if self.direct:
            earlier.addcmul_(later, self.direct[t])

    def add_loss(self, t: int, later: Tensor, earlier: Tensor, out: Tensor | None) -> None:
        assert out is not None
        torch.mul(later, self.scale_row[t], out=out)
        earlier.baddbmm_(out, self.weight[t])
        if self.direct:
            earlier.addcmul_(later, self.direct_row[t])


class ElementwiseBackward:
    """Where ds'/ds = diag(a)."""

    has_tap = False

    def __init__(self, workspace: Workspace, capacity: int) -> None:
        self.direct: list[Tensor] = []
        self.direct_row: list[Tensor] = []

    def extend(self, derivatives: StepDerivatives, like: Tensor) -> None:
        _, _, direct = _scales(derivatives)
        assert direct is not None
        _extend(self.direct, self.direct_row, direct.values[0], len(like))

    def states(self, t: int, later: Tensor, earlier: Tensor, out: Tensor | None) -> None:
        torch.mul(later, self.direct[t], out=earlier)

    def add_loss(self, t: int, later: Tensor, earlier: Tensor, out: Tensor | None) -> None:
        earlier.addcmul_(later, self.direct_row[t])


def kind_of_backward(derivatives: StepDerivatives) -> type[MatrixBackward | TapBackward | ElementwiseBackward]:
    """The cheapest that these derivatives allow."""
    through = [j for j, w in derivatives.sparse if w is not None]
    if derivatives.dense is not None or len(through) > 1 or not derivatives.sparse:
        return MatrixBackward
    if not all(j.pattern.is_diagonal for j, _ in derivatives.sparse):
        return MatrixBackward
    return TapBackward if through else ElementwiseBackward


def tap_on_the_way(derivatives: StepDerivatives) -> Key:
    """Which tap's cotangents ``TapBackward`` meets, by ``jacobian_key``."""
    jacobian, _, _ = _scales(derivatives)
    assert jacobian is not None
    return jacobian_key(jacobian)


def jacobian_key(jacobian: Jacobian) -> Key:
    """Equal for taps whose outputs are added: autograd hands both the same tensors."""
    values = jacobian.values if isinstance(jacobian, SparseJacobian) else [jacobian]
    return tuple((v.data_ptr(), v.shape, v.stride()) for v in values)


def transition_matrices(derivatives: StepDerivatives, like: Tensor, room: Tensor) -> Tensor:
    """ds'/ds of every row, row index first: [S, k, B, S], in ``room`` [S, k B, S] where it is made of factors."""
    steps, batch, size = like.shape
    if not derivatives.sparse and derivatives.dense is not None:
        return derivatives.dense.transpose(0, 1).unflatten(1, (steps, batch))
    if derivatives.sparse:
        eye = torch.eye(size, dtype=like.dtype, device=like.device)
        factors = [jacobian.by_row(eye if w is None else w) for jacobian, w in derivatives.sparse]
        left, right = (torch.cat(parts, axis) for parts, axis in zip(zip(*factors, strict=True), (2, 1), strict=True))
        torch.bmm(left, right, out=room)  # [S, N, G] by [S, G, S]
    else:
        room.zero_()
    if derivatives.dense is not None:
        room += derivatives.dense.transpose(0, 1)
    return room.unflatten(1, (steps, batch))


def _scales(derivatives: StepDerivatives) -> tuple[SparseJacobian | None, Tensor | None, SparseJacobian | None]:
    """T and W of ``diag(T) W``, and ``diag(a)``, where they exist."""
    jacobian, weight, direct = None, None, None
    for factor, matrix in derivatives.sparse:
        if matrix is None:
            direct = factor
        else:
            jacobian, weight = factor, matrix
    return jacobian, weight, direct


def _extend(columns: list[Tensor], rows: list[Tensor], factor: Tensor, steps: int) -> None:
    """Add views of a factor [N, S] for every step: [B, S, 1] and [B, 1, S]."""
    parts = factor.unflatten(0, (steps, -1))
    columns += parts.unsqueeze(3).unbind(0)
    rows += parts.unsqueeze(2).unbind(0)
