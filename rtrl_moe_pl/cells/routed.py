"""Cells whose state is slots, of which a step reads some and writes some."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rtrl_moe_pl.cells.base import Cell, at_least


class Routing(NamedTuple):
    """What a step of each row chose: indices without a gradient, int64.

    Args:
        read: [N, R] slots that the step depends on.
        written: [N, W] slots that it changes, none twice in a row.
        experts: [N, A] experts whose parameters it meets; [N, 0] for a cell without experts.
    """

    read: Tensor
    written: Tensor
    experts: Tensor


class RoutedCell(Cell):
    """A cell whose state is ``num_slots`` slots; all but the written ones stay exactly as they are.

    A subclass chooses in ``route`` and computes in ``update``, which is given nothing but the chosen slots: so the
    derivatives of a step have few rows and columns, and gradient algorithms can leave out all else without an error.

    Attributes:
        banks: names of the parameters [E, ..] whose rows are experts' own, for forecasts and pictures of costs.

    Args:
        input_size: D.
        num_slots, slot_size: S and d; the state is [num_slots, slot_size], flat.
        num_experts: E; 0 for a cell without experts.
        read_slots, write_slots, active_experts: R, W and A, how many are chosen; all of them makes a dense cell.
        learned_initial_state: see ``Cell``.

    Raises:
        ValueError: for a number of choices below 1 or above what there is.
        TypeError: for a subclass that overrides ``forward``.
    """

    def __init__(
        self,
        input_size: int | None,
        num_slots: int,
        slot_size: int,
        num_experts: int = 0,
        read_slots: int = 2,
        write_slots: int = 2,
        active_experts: int = 2,
        *,
        learned_initial_state: bool = False,
    ) -> None:
        at_least(1, "num_slots", num_slots)
        at_least(1, "slot_size", slot_size)
        super().__init__(input_size, num_slots * slot_size, learned_initial_state=learned_initial_state)
        self.num_slots, self.slot_size = num_slots, slot_size
        self.num_experts = at_least(0, "num_experts", num_experts)
        self.read_slots = _choices("read_slots", read_slots, "num_slots", num_slots)
        self.write_slots = _choices("write_slots", write_slots, "num_slots", num_slots)
        self.active_experts = (
            _choices("active_experts", active_experts, "num_experts", num_experts) if num_experts else 0
        )

    banks: tuple[str, ...] = ()

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        if "forward" in vars(cls):
            raise TypeError(f"{cls.__name__} overrides forward: a RoutedCell's step is advance, override that")

    @abstractmethod
    def route(self, x: Tensor, s: Tensor) -> Routing:
        """What a step from x [N, D] and s [N, S] chooses: a pure function, without a gradient."""

    @abstractmethod
    def update(self, x: Tensor, read: Tensor, old: Tensor, routing: Routing) -> Tensor:
        """The new contents of the written slots, [N, W, slot_size].

        Differentiated with respect to all but ``routing``, which must be fixed: a gate's value may depend on the
        chosen slots and experts alone.

        Args:
            x: [N, D].
            read: contents of the read slots, [N, R, slot_size].
            old: contents of the written slots, [N, W, slot_size].
            routing: what ``route`` chose.
        """

    def advance(self, x: Tensor, s: Tensor) -> tuple[Tensor, Routing]:
        """The next state and what was chosen on the way. Override it to share work between the two."""
        slots = s.unflatten(-1, (self.num_slots, self.slot_size))
        routing = self.route(x, s)
        read, old = take_slots(slots, routing.read), take_slots(slots, routing.written)
        return put_slots(slots, routing.written, self.update(x, read, old, routing)).flatten(1), routing

    def balance(self, used: Routing) -> None:
        """Change what is chosen, never what is computed, after an update; nothing by default.

        Args:
            used: how often each slot was read [S] and written [S] and each expert chosen [E]; of all processes.
        """

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return self.advance(x, s)[0]


def _choices(name: str, value: int, of: str, limit: int) -> int:
    """The number of choices, if there is as much to choose from."""
    at_least(1, name, value)
    if value > limit:
        raise ValueError(f"{name} must be at most {of} ({limit}), got {value}")
    return value


def require_routings(cell: RoutedCell, routings: Sequence[Routing]) -> None:
    """Raise ValueError unless what some steps chose is there, and no slot is written twice in a step."""
    name = f"{type(cell).__name__}.route"
    sizes = cell.num_slots, cell.num_slots, cell.num_experts
    for part, steps, size in zip(Routing._fields, zip(*routings, strict=True), sizes, strict=True):
        chosen = torch.cat(steps)
        if chosen.numel() and not bool(((chosen >= 0) & (chosen < size)).all()):
            raise ValueError(f"{name} must choose .{part} from 0 to {size - 1}, got {chosen.min()} to {chosen.max()}")
        if part == "written" and bool((chosen.sort(1).values.diff(dim=1) == 0).any()):
            raise ValueError(f"{name} must not write a slot twice in a step: its new content would be either")


def take_slots(slots: Tensor, index: Tensor) -> Tensor:
    """Slots [N, I, d] of ``slots`` [N, S, d] by ``index`` [N, I].

    Raises:
        TypeError: for an index of another type than int64.
    """
    if index.dtype != torch.int64:
        raise TypeError(f"indices of slots must be int64, got {index.dtype}")
    return slots.gather(1, index.unsqueeze(-1).expand(-1, -1, slots.shape[-1]))


def put_slots(slots: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """A copy of ``slots`` [N, S, d] with ``values`` [N, I, d] in the places ``index`` [N, I].

    Raises:
        ValueError: for values of another shape.
    """
    if values.shape != (*index.shape, slots.shape[-1]):
        raise ValueError(f"new contents of slots must be {[*index.shape, slots.shape[-1]]}, got {list(values.shape)}")
    return slots.scatter(1, index.unsqueeze(-1).expand_as(values), values)
