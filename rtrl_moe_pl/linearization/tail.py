"""The last steps of a stream, differentiated and not yet multiplied into an influence matrix."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from rtrl_moe_pl.linearization.backward import (
    Backward,
    Key,
    jacobian_key,
    kind_of_backward,
    tap_on_the_way,
)
from rtrl_moe_pl.linearization.sparse import SparseJacobian
from rtrl_moe_pl.linearization.step import Jacobian, StepDerivatives
from rtrl_moe_pl.linearization.taps import Tap
from rtrl_moe_pl.linearization.workspace import Workspace


@dataclass
class Steps:
    """Some steps of all lanes, differentiated at the weights they were run with.

    Args:
        derivatives: of N = k B rows, without a graph.
        like: [k, B, S], for shape, type and device.
        starts: [B, k] bool, or None.
        starting: whether any lane starts at each step.
    """

    derivatives: StepDerivatives
    like: Tensor
    starts: Tensor | None
    starting: list[bool]

    def __len__(self) -> int:
        return len(self.like)

    @cached_property
    def structure(self) -> object:
        """Equal for steps whose taps can be gathered: the same parameters, shapes and shared tensors."""
        leaves = _leaves(self.derivatives.taps)
        order = {place: number for number, place in enumerate(leaves)}
        taps = []
        for tap, jacobian in self.derivatives.taps:
            pattern = id(jacobian.pattern) if isinstance(jacobian, SparseJacobian) else None
            taps.append((tap.signature, pattern, [order[_place(value)] for value in _tensors(tap, jacobian)]))
        return kind_of_backward(self.derivatives), [(v.shape[1:], v.dtype) for v in leaves.values()], taps


class Tail:
    """Steps that the loss of every new window is pulled back through, until they become part of P.

    One window's steps cost no copy. When more are added, the taps' inputs and Jacobians are gathered in buffers, so
    that a product over time stays one product.

    Args:
        capacity: steps it is asked to hold at most.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.workspace = Workspace()
        self.clear()

    def clear(self) -> None:
        """Forget the steps; buffers are kept."""
        self.windows = 0
        self.starts: list[Tensor | None] = []  # per step the lanes that start, [B] bool; None for none
        self.taps: list[tuple[Tap, Jacobian]] = []
        self.backward: Backward | None = None
        self.on_the_way: Key | None = None  # the tap whose cotangents the backward steps meet
        self.like: Tensor | None = None
        self._structure: object = None

    def __len__(self) -> int:
        return len(self.starts)

    def takes(self, steps: Steps) -> bool:
        """Whether these steps can be added: there is room, and they were differentiated in the same way."""
        if not self.windows:
            return True
        return len(self) + len(steps) <= self.capacity and self._structure == steps.structure

    def append(self, steps: Steps) -> None:
        """Add what ``takes`` allows."""
        derivatives, count, rows = steps.derivatives, len(steps), len(self) * steps.like.shape[1]
        if self.backward is None:
            self.backward = kind_of_backward(derivatives)(self.workspace, self.capacity)
            self._structure = steps.structure
            self.like = steps.like[0]
        self.backward.extend(derivatives, steps.like)
        self.taps = self._gathered(derivatives.taps, rows, count) if self.windows else derivatives.taps
        if self.backward.has_tap:
            place = next(
                i for i, (_, j) in enumerate(derivatives.taps) if jacobian_key(j) == tap_on_the_way(derivatives)
            )
            self.on_the_way = jacobian_key(self.taps[place][1])
        starts = None if steps.starts is None else steps.starts.clone()
        self.starts += [
            starts[:, t] if starts is not None and there else None for t, there in enumerate(steps.starting)
        ]
        self.windows += 1

    def _gathered(self, taps: list[tuple[Tap, Jacobian]], rows: int, count: int) -> list[tuple[Tap, Jacobian]]:
        """All steps' taps: those held, ``rows`` rows, and ``taps`` after them."""
        held, new = _leaves(self.taps), _leaves(taps)
        joined: dict[Key, Tensor] = {}
        for number, (before, value) in enumerate(zip(held.values(), new.values(), strict=True)):
            lanes = value.shape[0] // count
            buffer = self.workspace.empty(f"leaf {number}", (self.capacity * lanes, *value.shape[1:]), value)
            if before.data_ptr() != buffer.data_ptr():
                buffer[:rows] = before
            buffer[rows : rows + len(value)] = value
            joined[_place(value)] = buffer[: rows + len(value)]
        result: list[tuple[Tap, Jacobian]] = []
        for tap, jacobian in taps:
            source = None if tap.input is None else joined[_place(tap.input)]
            if isinstance(jacobian, SparseJacobian):
                whole: Jacobian = replace(jacobian, values=[joined[_place(v)] for v in jacobian.values])
            else:
                whole = joined[_place(jacobian)]
            result.append((replace(tap, input=source), whole))
        return result


def _place(value: Tensor) -> Key:
    return value.data_ptr(), value.shape, value.stride()


def _tensors(tap: Tap, jacobian: Jacobian) -> list[Tensor]:
    """What a tap holds for every row."""
    values = jacobian.values if isinstance(jacobian, SparseJacobian) else [jacobian]
    return values if tap.input is None else [tap.input, *values]


def _leaves(taps: list[tuple[Tap, Jacobian]]) -> dict[Key, Tensor]:
    """Every different tensor of some taps, by where it lies, in order."""
    return {_place(value): value for tap, jacobian in taps for value in _tensors(tap, jacobian)}
