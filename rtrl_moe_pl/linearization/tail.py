"""The last steps of a stream, differentiated and not yet multiplied into an influence matrix."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rtrl_moe_pl.linearization.backward import KINDS, Backward, MatrixBackward, kind_of_backward, tap_on_the_way
from rtrl_moe_pl.linearization.derivatives import (
    Jacobian,
    Key,
    StepDerivatives,
    jacobian_key,
    leaves,
    shared,
    with_leaves,
)
from rtrl_moe_pl.linearization.routed_backward import RoutedBackward
from rtrl_moe_pl.linearization.sparse import Pattern, SparseJacobian
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
        """Equal for steps that one tail can hold."""
        return _structure(self.form, self.derivatives.taps)

    @cached_property
    def form(self) -> list[Any]:
        """How a step back is made: its kind, the number of the tap met on the way or -1, whether diag(a) is added."""
        kind, met, has_direct = kind_of_backward(self.derivatives), -1, False
        if kind is not MatrixBackward:
            has_direct = any(weight is None for _, weight in self.derivatives.sparse)
        if kind.has_tap:
            key = tap_on_the_way(self.derivatives)
            met = next(i for i, (_, jacobian) in enumerate(self.derivatives.taps) if jacobian_key(jacobian) == key)
        return [kind.__name__, met, has_direct]


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
        self.starts: list[Tensor | None] = []  # per step the lanes that start, [B] bool; None for none
        self.taps: list[tuple[Tap, Jacobian]] = []
        self.backward: Backward | None = None
        self.form: list[Any] = []  # of all its ``Steps``
        self.like: Tensor | None = None  # [B, S]
        self._structure: object = None

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def on_the_way(self) -> Key | None:
        """The ``jacobian_key`` of the tap whose cotangents the backward steps meet."""
        _, met, _ = self.form
        return None if met < 0 else jacobian_key(self.taps[met][1])

    def slots_used(self) -> tuple[Tensor | None, Tensor | None]:
        """Of a routed cell, the slots that were written, and those that were read or written; None for all."""
        if not isinstance(self.backward, RoutedBackward):
            return None, None
        assert self.like is not None
        started = torch.zeros(len(self.like), dtype=torch.bool, device=self.like.device)
        for here in self.starts:
            started = started if here is None else started | here
        return self.backward.slots_used(started)

    def takes(self, steps: Steps) -> bool:
        """Whether these steps can be added: there is room, and they were differentiated in the same way."""
        if not len(self):
            return True
        return len(self) + len(steps) <= self.capacity and self._structure == steps.structure

    def append(self, steps: Steps) -> None:
        """Add what ``takes`` allows."""
        derivatives, count, rows = steps.derivatives, len(steps), len(self) * steps.like.shape[1]
        if self.backward is None:
            self._begin(steps.form, steps.like[0])
        assert self.backward is not None
        self.backward.extend(derivatives, steps.like)
        self.taps = self._gathered(derivatives.taps, rows, count) if rows else derivatives.taps
        self._structure = self._structure or steps.structure
        starts = None if steps.starts is None else steps.starts.clone()
        self.starts += [
            starts[:, t] if starts is not None and there else None for t, there in enumerate(steps.starting)
        ]

    def _begin(self, form: list[Any], like: Tensor) -> None:
        self.form, self.like = form, like.clone()
        self.backward = KINDS[form[0]](self.workspace, self.capacity)

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, numbers and strings; empty without steps."""
        if self.backward is None or self.like is None:
            return {}
        none = torch.zeros(len(self.like), dtype=torch.bool, device=self.like.device)
        taps = []
        for (tap, jacobian), held in zip(self.taps, shared(self.taps), strict=True):
            pattern = jacobian.pattern if isinstance(jacobian, SparseJacobian) else None
            taps.append(
                {
                    "names": [tap.weight or "", tap.bias or ""],
                    "transposed": tap.transposed,
                    "output": list(tap.output.shape[1:]),
                    "has": [tap.input is not None, tap.experts is not None],
                    "leaves": held,
                    "pattern": [] if pattern is None else [pattern.row_of, pattern.colour_of],
                }
            )
        return {
            "starts": torch.stack([none if here is None else here for here in self.starts]),
            "leaves": [leaf.clone() for leaf in leaves(self.taps).values()],
            "taps": taps,
            "form": self.form,
            "backward": self.backward.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], like: Tensor) -> None:
        """Restore what ``state_dict`` gave, bit for bit; ``like`` [B, S] has the type and device."""
        self.clear()
        if not state:
            return
        values = [leaf.to(like.device, like.dtype if leaf.is_floating_point() else None) for leaf in state["leaves"]]
        for saved in state["taps"]:
            own = [values[number] for number in saved["leaves"]]
            source, experts = (own.pop(0) if has else None for has in saved["has"])
            output = torch.empty(1, *saved["output"])
            weight, bias = (name or None for name in saved["names"])
            tap = Tap(output, source, weight, bias, saved["transposed"], experts=experts)
            if not saved["pattern"]:
                self.taps.append((tap, own[0]))
            else:
                pattern = Pattern(*(part.to(like.device) for part in saved["pattern"]))
                self.taps.append((tap, SparseJacobian(pattern, own)))
        self.starts = [here if bool(here.any()) else None for here in state["starts"].to(like.device)]
        self._begin(state["form"], like)
        assert self.backward is not None
        self.backward.load_state_dict(state["backward"], like.expand(len(self), -1, -1))
        self._structure = _structure(self.form, self.taps)

    def _gathered(self, taps: list[tuple[Tap, Jacobian]], rows: int, count: int) -> list[tuple[Tap, Jacobian]]:
        """All steps' taps: those held, ``rows`` rows, and ``taps`` after them."""
        held, new, joined = leaves(self.taps), leaves(taps), []
        for number, (before, value) in enumerate(zip(held.values(), new.values(), strict=True)):
            lanes = value.shape[0] // count
            buffer = self.workspace.empty(f"leaf {number}", (self.capacity * lanes, *value.shape[1:]), value)
            if before.data_ptr() != buffer.data_ptr():
                buffer[:rows] = before
            buffer[rows : rows + len(value)] = value
            joined.append(buffer[: rows + len(value)])
        return with_leaves(taps, joined)


def _structure(form: list[Any], taps: list[tuple[Tap, Jacobian]]) -> object:
    """Equal for steps of one form whose taps can be gathered: the same parameters, shapes, patterns, shared tensors."""
    forms = []
    for (tap, jacobian), held in zip(taps, shared(taps), strict=True):
        pattern = jacobian.pattern.key if isinstance(jacobian, SparseJacobian) else None
        forms.append((tap.signature, pattern, held))
    return form, [(v.shape[1:], v.dtype) for v in leaves(taps).values()], forms
