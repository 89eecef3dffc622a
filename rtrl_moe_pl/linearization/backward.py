"""One step back in time, for cotangents of the state: by a matrix, or cheaper where the cell allows it."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from rtrl_moe_pl.linearization.derivatives import Key, StepDerivatives, jacobian_key
from rtrl_moe_pl.linearization.routed_backward import RoutedBackward
from rtrl_moe_pl.linearization.sparse import SparseJacobian
from rtrl_moe_pl.linearization.workspace import Workspace


class Backward(Protocol):
    """Steps back, in the order in which they were run; ``tap`` is what is met on the way, if anything is.

    A tap met on the way writes its cotangents to ``out``: [B, S, S] of the states, [B, 1, S] of the loss.
    """

    has_tap: bool
    slot_size: int  # d of a routed cell
    in_place: bool  # later and earlier cotangents of the states may be, and are, one tensor

    def __init__(self, workspace: Workspace, capacity: int) -> None: ...

    def width(self, size: int) -> int:
        """Numbers on the way, per lane; 0 for none."""
        ...

    def extend(self, derivatives: StepDerivatives, like: Tensor) -> None:
        """Add the steps of ``like`` [k, B, S]; what a parameter's update would change is copied."""
        ...

    def states(self, t: int, later: Tensor, earlier: Tensor, out: Tensor | None) -> None:
        """Write the cotangents of the state that step ``t`` was given, from those of what it returned: [B, S, S]."""
        ...

    def add_loss(self, t: int, later: Tensor, earlier: Tensor, out: Tensor | None) -> None:
        """Add the loss's part to what is in ``earlier``: [B, 1, S]."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and lists of them."""
        ...

    def load_state_dict(self, state: dict[str, Any], like: Tensor) -> None:
        """Restore the steps of ``like`` [K, B, S], bit for bit."""
        ...


class MatrixBackward:
    """By the matrix ds'/ds: for any cell."""

    has_tap = in_place = False
    slot_size = 1

    def __init__(self, workspace: Workspace, capacity: int) -> None:
        self.workspace, self.capacity = workspace, capacity
        self.transitions: list[Tensor] = []
        self.flipped: list[Tensor] = []

    def width(self, size: int) -> int:
        return 0

    def extend(self, derivatives: StepDerivatives, like: Tensor) -> None:
        write_transitions(derivatives, self._room(like))

    def _room(self, like: Tensor) -> Tensor:
        """[S, k B, S] for the matrices ds'/ds of further steps, row index first; they are views of it from now on."""
        steps, batch, size = like.shape
        begin = len(self.flipped)
        whole = self.workspace.empty("transitions", (size, max(self.capacity, begin + steps) * batch, size), like)
        room = whole[:, begin * batch : (begin + steps) * batch]
        flipped = room.unflatten(1, (steps, batch)).permute(1, 2, 3, 0)  # [k, B, S, S], transposed
        self.flipped += flipped.unbind(0)
        self.transitions += flipped.transpose(2, 3).unbind(0)
        return room

    def state_dict(self) -> dict[str, Any]:
        return {"transitions": torch.stack(self.transitions)}

    def load_state_dict(self, state: dict[str, Any], like: Tensor) -> None:
        self._room(like).copy_(state["transitions"].to(like).flatten(0, 1).transpose(0, 1))

    def states(self, t: int, later: Tensor, earlier: Tensor, out: Tensor | None) -> None:
        torch.bmm(self.flipped[t], later, out=earlier)

    def add_loss(self, t: int, later: Tensor, earlier: Tensor, out: Tensor | None) -> None:
        earlier.baddbmm_(later, self.transitions[t])


class TapBackward:
    """Where ds'/ds = diag(T) W + diag(a): the tap's cotangents are on the way, and a step's rows share W."""

    has_tap = True
    in_place = False
    slot_size = 1

    def __init__(self, workspace: Workspace, capacity: int) -> None:
        self.scale: list[Tensor] = []
        self.scale_row: list[Tensor] = []
        self.direct: list[Tensor] = []  # empty where a = 0
        self.direct_row: list[Tensor] = []
        self.weight: list[Tensor] = []
        self.flipped: list[Tensor] = []

    def width(self, size: int) -> int:
        return size

    def extend(self, derivatives: StepDerivatives, like: Tensor) -> None:
        jacobian, weight, direct = _scales(derivatives)
        assert jacobian is not None
        assert weight is not None
        _extend(self.scale, self.scale_row, jacobian.values[0], len(like))
        if direct is not None:
            _extend(self.direct, self.direct_row, direct.values[0], len(like))
        self._add_weight(weight.clone(), like)

    def _add_weight(self, weight: Tensor, like: Tensor) -> None:
        weights = weight.expand(like.shape[1], -1, -1)
        self.weight += [weights] * len(like)
        self.flipped += [weights.transpose(1, 2)] * len(like)

    def state_dict(self) -> dict[str, Any]:
        changes = [t for t, weight in enumerate(self.weight) if not t or weight is not self.weight[t - 1]]
        state = {"scale": torch.cat(self.scale_row)[:, 0], "changes": changes}
        state["weights"] = [self.weight[t][0].clone() for t in changes]
        return state | ({"direct": torch.cat(self.direct_row)[:, 0]} if self.direct else {})

    def load_state_dict(self, state: dict[str, Any], like: Tensor) -> None:
        _extend(self.scale, self.scale_row, state["scale"].to(like), len(like))
        if "direct" in state:
            _extend(self.direct, self.direct_row, state["direct"].to(like), len(like))
        ends = [*state["changes"][1:], len(like)]
        for weight, begin, end in zip(state["weights"], state["changes"], ends, strict=True):
            self._add_weight(weight.to(like), like[begin:end])

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

    has_tap = in_place = False
    slot_size = 1

    def __init__(self, workspace: Workspace, capacity: int) -> None:
        self.direct: list[Tensor] = []
        self.direct_row: list[Tensor] = []

    def width(self, size: int) -> int:
        return 0

    def extend(self, derivatives: StepDerivatives, like: Tensor) -> None:
        _, _, direct = _scales(derivatives)
        assert direct is not None
        _extend(self.direct, self.direct_row, direct.values[0], len(like))

    def state_dict(self) -> dict[str, Any]:
        return {"direct": torch.cat(self.direct_row)[:, 0]}

    def load_state_dict(self, state: dict[str, Any], like: Tensor) -> None:
        _extend(self.direct, self.direct_row, state["direct"].to(like), len(like))

    def states(self, t: int, later: Tensor, earlier: Tensor, out: Tensor | None) -> None:
        torch.mul(later, self.direct[t], out=earlier)

    def add_loss(self, t: int, later: Tensor, earlier: Tensor, out: Tensor | None) -> None:
        earlier.addcmul_(later, self.direct_row[t])


def kind_of_backward(derivatives: StepDerivatives) -> type[Backward]:
    """The cheapest that these derivatives allow."""
    if derivatives.routing is not None:
        return RoutedBackward
    through = [j for j, w in derivatives.sparse if w is not None]
    if derivatives.dense is not None or len(through) > 1 or not derivatives.sparse:
        return MatrixBackward
    if not all(j.pattern.is_diagonal for j, _ in derivatives.sparse):
        return MatrixBackward
    return TapBackward if through else ElementwiseBackward


KINDS = {kind.__name__: kind for kind in (MatrixBackward, TapBackward, ElementwiseBackward, RoutedBackward)}


def tap_on_the_way(derivatives: StepDerivatives) -> Key:
    """Which tap's cotangents ``TapBackward`` meets, by ``jacobian_key``."""
    jacobian, _, _ = _scales(derivatives)
    assert jacobian is not None
    return jacobian_key(jacobian)


def write_transitions(derivatives: StepDerivatives, out: Tensor) -> None:
    """ds'/ds of N rows, row index first: [S, N, S]."""
    if derivatives.sparse:
        eye = torch.eye(len(out), dtype=out.dtype, device=out.device)
        factors = [jacobian.by_row(eye if w is None else w) for jacobian, w in derivatives.sparse]
        left, right = (torch.cat(parts, axis) for parts, axis in zip(zip(*factors, strict=True), (2, 1), strict=True))
        torch.bmm(left, right, out=out)  # [S, N, G] by [S, G, S]
    else:
        out.zero_()
    if derivatives.dense is not None:
        out += derivatives.dense.transpose(0, 1)


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
