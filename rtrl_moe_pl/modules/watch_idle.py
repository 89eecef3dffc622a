"""What takes no part in training: parameters, units, slots and experts."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from rtrl_moe_pl.cells import RoutedCell
from rtrl_moe_pl.cells.base import at_least, not_negative
from rtrl_moe_pl.modules.naming import some
from rtrl_moe_pl.modules.watch import Watch


class IdleWatch(Watch):
    """Warns of what was idle at each of the last ``looks`` looks; once of every kind, with the names.

    A parameter is idle if all of its gradient was zero, or it has none, in the last update; a unit of the state if its
    value was the same at all of these looks and in all lanes of this process, to within ``tolerance`` (a dead ReLU, a
    saturated tanh); a slot or an expert of a routed cell (whose units are not looked at one by one) if no lane of any
    process wrote or used it in any batch between the looks, over ``updates`` updates or more: balancing takes time to
    bring it back. Frozen parameters are left alone.

    Args:
        looks: at least 1.
        updates: of the weights without a use, at least 1.
        tolerance: largest difference of values that count as the same.

    Raises:
        TypeError, ValueError: for an option out of range.
    """

    kept = ("_idle", "_since", "_ranges")

    def __init__(self, looks: int = 10, updates: int = 500, tolerance: float = 1e-4) -> None:
        self.looks, self.updates = at_least(1, "looks", looks), at_least(1, "updates", updates)
        self.tolerance = not_negative("tolerance", tolerance)

    def begin(self) -> None:
        self._idle: dict[str, int] = {}  # for how many looks, by kind and name
        self._since: dict[str, int] = {}  # the update that was the last before, likewise
        self._ranges: list[Tensor] = []  # [2, S]: smallest and largest over lanes

    def look(self, trainer: Trainer, module: Any) -> None:
        if trainer.global_step > self.step_seen:
            trained = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
            seen = {name: grad.any() for name, grad in trained.items() if grad is not None}
            active = dict(zip(seen, torch.stack(list(seen.values())).tolist(), strict=True)) if seen else {}
            self._count(trainer, "parameters", [(name, active.get(name, False)) for name in trained], 0)
        memory, used = getattr(module, "memory", None), getattr(module, "used", None)
        if used is not None:
            self._count(trainer, "slots", enumerate(used.written.tolist()), self.updates)
            self._count(trainer, "experts", enumerate(used.experts.tolist()), self.updates)
        if memory is not None and not isinstance(module.cell, RoutedCell):
            self._ranges = [*self._ranges, torch.stack(memory.state.aminmax(dim=0))][-self.looks :]
            if len(self._ranges) == self.looks:
                low, high = torch.stack(self._ranges).unbind(1)  # [looks, S] each
                dead = high.amax(0) - low.amin(0) <= self.tolerance
                self._warn(trainer, "units", dead.nonzero().flatten().tolist(), memory.state.shape[1])

    def _count(self, trainer: Trainer, kind: str, active: Any, updates: int) -> None:
        """Count looks without activity; ``active``: pairs of a name and whether, or how often, it was."""
        names, total = [], 0
        for name, seen in active:
            key, total = f"{kind} {name}", total + 1
            if seen or key not in self._idle:
                self._idle[key], self._since[key] = 0, trainer.global_step if seen else self.step_seen
            self._idle[key] += not seen
            if self._idle[key] >= self.looks and trainer.global_step - self._since[key] >= updates:
                names.append(name)
        self._warn(trainer, kind, names, total)

    def _warn(self, trainer: Trainer, kind: str, names: list[Any], total: int) -> None:
        if names:
            what, advice = _SAYS[kind]
            self.warn(
                trainer,
                kind,
                f"{len(names)} of {total} {kind} {what} at {self.looks} looks in a row ({some(names)}): {advice}",
            )


_SAYS = {
    "parameters": (
        "had no gradient",
        "if they had one before, try a smaller learning rate (units that are saturated pass none on); else check that "
        "the loss depends on them (audit names the path of each), freeze them, or take them out",
    ),
    "units": (
        "of the state did not change, in any lane,",
        "they are dead or saturated; try a smaller learning rate, smaller initial weights, a cell with gates or tanh "
        "instead of ReLU, or a smaller state",
    ),
    "slots": ("were not written", "try a larger slot_balance_rate of the cell, more write_slots, or fewer slots"),
    "experts": ("were not used", "try a larger balance_rate of the cell, more active_experts, or fewer experts"),
}
