"""Linearize the windows of a routed cell in the rows and columns of what it chose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from rtrl_moe_pl.cells.routed import RoutedCell, Routing
from rtrl_moe_pl.linearization.derivatives import PlanMismatch
from rtrl_moe_pl.linearization.linearizer import Linearizer, require_same_states
from rtrl_moe_pl.linearization.routed import RoutedInputs, RoutedUpdate
from rtrl_moe_pl.linearization.tail import Steps


class RoutedLinearizer(Linearizer):
    """A ``Linearizer`` that needs a cell's ``route`` and ``update``, and differentiates the latter alone.

    Args:
        cell: whose ``forward`` is ``advance``: all slots but those written stay as they are.
        parameters: its parameters by public name; each must be met in ``update`` as an affine map, a look-up, a norm,
            an expert's product, or element-wise.
    """

    def __init__(self, cell: RoutedCell, parameters: dict[str, nn.Parameter]) -> None:
        self._update = RoutedUpdate(cell)
        super().__init__(cell, parameters, self._update)

    def _differentiate(
        self,
        inputs: Tensor,
        given: Tensor,
        returned: Tensor,
        starts: Tensor | None,
        starting: list[bool],
        routings: Sequence[Routing],
    ) -> Steps:
        routing = Routing(*map(torch.cat, zip(*routings, strict=True)))
        rows, states = RoutedInputs(inputs.flatten(0, 1), routing), given.flatten(0, 1)
        slots = self._update.gather(rows, states)
        written, derivatives = self._derivatives(rows, slots)
        again = self._update.scatter(rows, states, written).view(given.shape)
        why = "it changes slots that it does not choose to write, is random, mixes rows, or rounding makes it another"
        require_same_states(again, returned, why)
        assert self._plan is not None
        if self._plan.untapped:
            raise PlanMismatch(f"{min(self._plan.untapped)} is met in a form without a rule")
        return Steps(replace(derivatives, routing=routing), given, starts, starting)

    def fall_back(self, reason: str, for_good: bool = True) -> None:
        raise ValueError(
            f"{type(self.cell).__name__} cannot be trained by its rows: {reason.splitlines()[0]}; "
            "use RTRL(window=..), which takes any cell"
        )
