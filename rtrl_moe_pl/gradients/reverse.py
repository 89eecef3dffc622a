"""Reverse mode alone: autograd through a window, nothing carried but the state."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rtrl_moe_pl.gradients.base import (
    GradientAlgorithm,
    WindowResult,
    autograd_gradients,
    checked_window,
    named_parameters,
    with_fresh_start,
)
from rtrl_moe_pl.gradients.compiled import CompiledUnroll
from rtrl_moe_pl.gradients.memory import Forecast, Memory, recurrent_parameters
from rtrl_moe_pl.gradients.windows import (
    LossFunction,
    Targets,
    auxiliary_loss,
    evaluate_loss,
    read_out,
    routings_of,
    starting_steps,
)
from rtrl_moe_pl.sensitivities import ZeroSensitivity


class _ReverseMode(GradientAlgorithm):
    """Autograd through one window, nothing carried but the state."""

    def _init(self, cell: nn.Module, state: Tensor) -> Memory:
        shapes = {name: p.shape for name, p in recurrent_parameters(cell).items() if p.requires_grad}
        return Memory(state, ZeroSensitivity(shapes, state.shape[0], state.shape[1], state.dtype, state.device))

    def forecast(self, cell: nn.Module, batch_size: int, dtype: torch.dtype, steps: int) -> Forecast:
        # rough: what autograd keeps depends on the operations; `graph_bytes` of a few steps counts it
        steps = min(self.window or steps, steps)
        outputs = sum(p.shape[0] for p in cell.parameters() if p.ndim == 2)
        kept = 4 * (outputs + int(cell.state_size))  # type: ignore[arg-type]
        count = sum(p.numel() for p in cell.parameters())
        return Forecast(0, steps * batch_size * kept * dtype.itemsize, 4.0 * count)

    @torch.enable_grad()
    def step(
        self,
        cell: nn.Module,
        readout: nn.Module,
        inputs: Tensor,
        targets: Targets,
        loss_fn: LossFunction,
        memory: Memory,
        starts: Tensor | None = None,
        auxiliary_weight: float | Tensor = 1.0,
    ) -> WindowResult:
        starts = with_fresh_start(self, cell, memory, inputs, targets, starts)
        starting = starting_steps(starts, inputs.shape[1])
        initial = cell.initial_state(memory.batch_size) if any(starting) else None  # type: ignore[operator]
        routings = routings_of(cell)
        given, returned = self.unroll(cell, inputs.unbind(1), memory.state, initial, starts, starting, routings)
        outputs = read_out(readout, torch.stack(returned), inputs)
        auxiliary = auxiliary_loss(cell, inputs, torch.stack(given), auxiliary_weight)
        loss = evaluate_loss(loss_fn, outputs, targets, auxiliary)
        grads, _ = autograd_gradients(loss, named_parameters(cell, readout))
        if inputs.is_cuda and isinstance(self.unroll, CompiledUnroll):  # the next window's graph writes where they are
            grads = {name: grad.clone() for name, grad in grads.items()}
        memory.state, memory.fresh = returned[-1].detach(), False
        if routings:
            memory.count(routings, cell)  # type: ignore[arg-type]
        return WindowResult(loss.detach(), outputs.detach(), grads, memory)


class BPTT(_ReverseMode):
    """Backpropagation through time over all steps delivered together.

    Cost: |theta| a step; memory grows with the length.
    Exact for sequences that are delivered whole.
    Not recommended: for long sequences, or streams that have no end.
    References: Werbos 1990, Proceedings of the IEEE 78(10):1550-1560.
    """

    exact = True

    def __init__(self) -> None:
        super().__init__(None)


class TBPTT(_ReverseMode):
    """Truncated backpropagation through time: windows, between which only the state is carried.

    Args:
        window: steps k; nothing that happened more than k steps before a loss, or in an earlier window, gets credit.

    Cost: |theta| a step; memory of one window.
    Exact: no, biased. Where what matters lies further back than the window it does not learn at all.
    References: Williams & Peng 1990, Neural Computation 2(4):490-501.
    """

    exact = False

    def __init__(self, window: int) -> None:
        super().__init__(checked_window(window))
