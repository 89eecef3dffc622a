"""One window of a stream, and the ways in which its cell is run and differentiated."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rtrl_moe_pl.cells.routed import Routing
from rtrl_moe_pl.gradients.windows import Unroll, unroll
from rtrl_moe_pl.linearization import Linearizer, Steps, WindowLinearization
from rtrl_moe_pl.linearization.derivatives import PlanMismatch
from rtrl_moe_pl.linearization.step import require_close


class RunWindow:
    """One window's data, and the ways to run it."""

    def __init__(
        self,
        cell: nn.Module,
        inputs: Tensor,  # [B, k, ..]
        start: Tensor,  # [B, S]
        initial: Tensor | None,
        starts: Tensor | None,
        starting: list[bool],
        routings: list[Routing] | None,  # of a routed cell, filled by ``unroll``
        without_graph: Unroll = unroll,
    ) -> None:
        self.cell, self.inputs, self.start = cell, inputs, start
        self.initial, self.starts, self.starting = initial, starts, starting
        self.routings, self.without_graph = routings, without_graph

    def given(self, states: Tensor) -> Tensor:
        """The states that the cell was given [k, B, S], of those that were there before every step."""
        if self.starts is None or self.initial is None:
            return states
        return torch.where(self.starts.T[..., None], self.initial, states)

    def cut(self, begin: int, end: int, start: Tensor) -> RunWindow:
        """The part from step ``begin`` up to ``end``, whose first step was given the state ``start``."""
        starts = None if self.starts is None else self.starts[:, begin:end]
        starting, routings = self.starting[begin:end], self.routings and self.routings[begin:end]
        return RunWindow(self.cell, self.inputs[:, begin:end], start, self.initial, starts, starting, routings)

    def unroll(self) -> tuple[list[Tensor], list[Tensor]]:
        initial = None if self.initial is None else self.initial.detach()
        steps = self.inputs.unbind(1)
        starts = self.starts, self.starting
        return self.without_graph(self.cell, steps, self.start, initial, *starts, self.routings)

    @torch.enable_grad()
    def unroll_with_graph(self) -> tuple[Tensor, list[Tensor]]:
        leaf = self.start.detach().requires_grad_()
        routings = None if self.routings else self.routings  # filled once
        steps = self.inputs.unbind(1)
        _, returned = unroll(self.cell, steps, leaf, self.initial, self.starts, self.starting, routings)
        return leaf, returned

    @torch.enable_grad()
    def linearize(
        self, linearizer: Linearizer, given: Tensor, returned: Tensor, cotangents: Tensor
    ) -> Steps | WindowLinearization | None:
        inputs, starts = self.inputs.transpose(0, 1).clone(), (self.starts, self.starting)  # the caller's may change
        return linearizer.linearize(inputs, given, returned, cotangents, self.initial, *starts, self.routings or ())

    def linearize_again(self, linearizer: Linearizer, returned: Tensor, cotangents: Tensor) -> WindowLinearization:
        """Run once more, with the graph, what has already been run without it."""
        leaf, again = self.unroll_with_graph()
        try:
            require_close(torch.stack([state.detach() for state in again]), returned)  # compiled steps round otherwise
        except PlanMismatch:
            raise RuntimeError(
                f"{type(self.cell).__name__} gave other states when a window was run again: a random cell must be "
                "random from its first window on (use train() before training starts)"
            ) from None
        return linearizer.linearize_graph(leaf, again, cotangents)
