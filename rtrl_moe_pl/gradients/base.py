"""What every gradient algorithm shares: a window length, and the order of reading and writing.

With P = ds/dtheta at a window's start, J = ds_end/ds_start and M = ds_end/dtheta inside it,

    gradient  =  dL/dtheta at a fixed start state  +  (dL/ds_start) P        read first
    P        <-  J P + M                                                     then write
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from rtrl_moe_pl.gradients.memory import Forecast, Memory
from rtrl_moe_pl.gradients.windows import LossFunction, Targets, slice_time


@dataclass
class WindowResult:
    """What one or several windows gave.

    Args:
        loss: summed over lanes and steps, 0-dim, no graph.
        outputs: [B, k, O], no graph.
        grads: by ``cell.<name>`` and ``readout.<name>``, summed over lanes and steps; zeros for unused parameters.
        memory: to hand to the next window.
    """

    loss: Tensor
    outputs: Tensor
    grads: dict[str, Tensor]
    memory: Memory


class GradientAlgorithm(ABC):
    """Configuration of a gradient algorithm; all memory is an argument.

    Args:
        window: steps differentiated in reverse at a time; None for everything that is delivered.
    """

    exact: ClassVar[bool]
    carries_influence: ClassVar[bool] = False

    def __init__(self, window: int | None = None) -> None:
        if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
            raise ValueError(f"window must be a whole number of steps, at least 1; got {window!r}")
        self.window = window

    def __repr__(self) -> str:
        return f"{type(self).__name__}({'' if self.window is None else f'window={self.window}'})"

    def init(
        self,
        cell: nn.Module,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Memory:
        """A fresh memory: its first step counts as a start in every lane.

        Args:
            cell: module with ``state_size``, ``initial_state(batch_size)`` and ``forward(x, s)``.
            batch_size: lanes B.
            device, dtype: of the state; by default those of the initial state.

        Raises:
            ValueError: if the initial state has the wrong shape, or the cell cannot be trained by this algorithm.
            MemoryForecastError: if the influence matrix does not fit in the free memory.
        """
        with torch.no_grad():
            state = cell.initial_state(batch_size)  # type: ignore[operator]
        expected = (batch_size, int(cell.state_size))  # type: ignore[arg-type]
        if tuple(state.shape) != expected:
            raise ValueError(
                f"{type(cell).__name__}.initial_state({batch_size}) returned shape {tuple(state.shape)}, "
                f"it must be [batch_size, state_size] = {expected}"
            )
        state = state.to(device=device or state.device, dtype=dtype or state.dtype).clone()
        return self._init(cell, state)

    @abstractmethod
    def _init(self, cell: nn.Module, state: Tensor) -> Memory: ...

    @abstractmethod
    def forecast(self, cell: nn.Module, batch_size: int, dtype: torch.dtype, steps: int) -> Forecast:
        """Memory and cost for windows cut from ``steps`` delivered steps."""

    @abstractmethod
    def step(
        self,
        cell: nn.Module,
        readout: nn.Module,
        inputs: Tensor,  # [B, k, ..]
        targets: Targets,  # [B, k, ..], or a tuple of such
        loss_fn: LossFunction,
        memory: Memory,
        starts: Tensor | None = None,  # [B, k] bool
    ) -> WindowResult:
        """Run one window: gradient first, then the influence. Parameters are not changed.

        Args:
            loss_fn: ``(outputs [B, k, O], targets) -> scalar``, summed (not averaged) over lanes and steps.
            starts: lanes whose state is replaced by the initial state before a step.

        Raises:
            ValueError: if the batch size differs from the memory's, or cell, readout or loss return a wrong shape.
        """

    def run(
        self,
        cell: nn.Module,
        readout: nn.Module,
        inputs: Tensor,
        targets: Targets,
        loss_fn: LossFunction,
        memory: Memory,
        starts: Tensor | None = None,
    ) -> WindowResult:
        """``step`` over all windows of ``inputs`` [B, T, ..]; losses and gradients are summed, outputs joined."""
        steps = inputs.shape[1]
        if steps == 0:
            raise ValueError("inputs have no time steps: give [batch, time, ..] with at least one")
        length = self.window or steps
        results: list[WindowResult] = []
        for begin in range(0, steps, length):
            end = min(begin + length, steps)
            result = self.step(
                cell,
                readout,
                inputs[:, begin:end],
                slice_time(targets, begin, end),
                loss_fn,
                memory,
                None if starts is None else starts[:, begin:end],
            )
            memory = result.memory
            results.append(result)
        if len(results) == 1:
            return results[0]
        return WindowResult(
            torch.stack([r.loss for r in results]).sum(),
            torch.cat([r.outputs for r in results], 1),
            {name: torch.stack([r.grads[name] for r in results]).sum(0) for name in results[0].grads},
            memory,
        )


def named_parameters(cell: nn.Module, readout: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters by public name; one shared by cell and readout appears once, under its cell name."""
    return dict(nn.ModuleDict({"cell": cell, "readout": readout}).named_parameters())


def with_fresh_start(memory: Memory, inputs: Tensor, starts: Tensor | None) -> Tensor | None:
    """The window's starts, checked, with a start at step 0 for a fresh memory."""
    batch, steps = inputs.shape[:2]
    if batch != memory.batch_size:
        raise ValueError(
            f"got {batch} lanes, but the carried state and influence are of {memory.batch_size}: "
            "the batch size must stay the same while a memory is carried (drop a smaller last batch)"
        )
    if starts is not None and (starts.shape != (batch, steps) or starts.dtype != torch.bool):
        raise ValueError(
            f"starts must be a bool tensor of shape {(batch, steps)} [batch, time], "
            f"got {starts.dtype} of shape {tuple(starts.shape)}"
        )
    if not memory.fresh:
        return starts
    starts = torch.zeros(batch, steps, dtype=torch.bool, device=inputs.device) if starts is None else starts.clone()
    starts[:, 0] = True
    return starts


def autograd_gradients(
    loss: Tensor, parameters: dict[str, nn.Parameter], *more: Tensor
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Autograd's gradient by name, and of ``more`` tensors; zeros where there is none."""
    free = {name: p for name, p in parameters.items() if p.requires_grad}
    wanted = [*free.values(), *more]
    found: list[Tensor | None] = [None] * len(wanted)
    if loss.requires_grad and wanted:
        found = list(torch.autograd.grad(loss, wanted, allow_unused=True))
    filled = [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, found, strict=True)]
    by_name = dict(zip(free, filled, strict=False))
    return {n: by_name.get(n, torch.zeros_like(p)) for n, p in parameters.items()}, filled[len(free) :]
