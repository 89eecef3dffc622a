"""What every gradient algorithm shares: a window length, and the order of reading and writing.

With P = ds/dtheta at a window's start, J = ds_end/ds_start and M = ds_end/dtheta inside it,

    gradient  =  dL/dtheta at a fixed start state  +  (dL/ds_start) P        read first
    P        <-  J P + M                                                     then write
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rtrl_moe_pl.cells.base import require_inputs
from rtrl_moe_pl.gradients.compiled import CompiledUnroll
from rtrl_moe_pl.gradients.memory import Forecast, Memory, recurrent_parameters
from rtrl_moe_pl.gradients.windows import LossFunction, Targets, Unroll, slice_time, unroll
from rtrl_moe_pl.sensitivities import ZeroSensitivity


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

    exact: bool
    carries_influence: ClassVar[bool] = False

    def __init__(self, window: int | None = None) -> None:
        self.window = window
        self.unroll: Unroll = unroll  # how a window is run forward

    def compile(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Run windows forward by torch.compile from now on; see ``CompiledUnroll``. Equal but for rounding."""
        self.unroll = CompiledUnroll(self.window, backend)

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
            device, dtype: of the state; by default those of the initial state, and of the parameters where wider.

        Raises:
            ValueError: if the cell is none, its initial state has the wrong shape, or this algorithm cannot train it.
            MemoryForecastError: if the influence matrix does not fit in the free memory.
        """
        require_cell(cell)
        with torch.no_grad():
            state = cell.initial_state(batch_size)  # type: ignore[operator]
        expected = (batch_size, int(cell.state_size))  # type: ignore[arg-type]
        if tuple(state.shape) != expected:
            raise ValueError(
                f"{type(cell).__name__}.initial_state({batch_size}) returned shape {tuple(state.shape)}, "
                f"it must be [batch_size, state_size] = {expected}"
            )
        kind = dtype or state.dtype
        if dtype is None:  # a float32 zero state of a float64 cell becomes float64 at the first step
            for parameter in cell.parameters():
                kind = torch.promote_types(kind, parameter.dtype)
        state = state.to(device=device or state.device, dtype=kind).clone()
        return self._init(cell, state)

    @abstractmethod
    def _init(self, cell: nn.Module, state: Tensor) -> Memory: ...

    def require_room(self, cell: nn.Module, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        """Raise MemoryForecastError unless what is carried for so many lanes fits in the free memory."""
        return None

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
        auxiliary_weight: float | Tensor = 1.0,
    ) -> WindowResult:
        """Run one window: gradient first, then the influence. Parameters are not changed.

        Args:
            loss_fn: ``(outputs [B, k, O], targets) -> scalar``, summed (not averaged) over lanes and steps.
            starts: lanes whose state is replaced by the initial state before a step.
            auxiliary_weight: of the sum over lanes and steps of the cell's ``auxiliary(x, s)``, if it has one, in the
                loss.

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
        auxiliary_weight: float | Tensor = 1.0,
    ) -> WindowResult:
        """``step`` over all windows of ``inputs`` [B, T, ..]; losses and gradients are summed, outputs joined.

        Where the length of a window changes nothing but rounding, several may be run as one.
        """
        require_data(inputs, targets, starts)
        steps = inputs.shape[1]
        length = self._joined_window(cell, memory) or steps
        results: list[WindowResult] = []
        with torch.autocast(inputs.device.type, enabled=False):
            for begin in range(0, steps, length):
                end = min(begin + length, steps)
                part = None if starts is None else starts[:, begin:end]
                cut = slice_time(targets, begin, end)
                result = self.step(cell, readout, inputs[:, begin:end], cut, loss_fn, memory, part, auxiliary_weight)
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

    def _joined_window(self, cell: nn.Module, memory: Memory) -> int | None:
        """Steps to be run at a time; None for everything that is delivered."""
        return self.window


def checked_window(window: int, name: str = "window") -> int:
    """The window, or ValueError for anything but a whole number of steps."""
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(f"{name} must be a whole number of steps, at least 1; got {window!r}")
    return window


def require_cell(cell: nn.Module) -> None:
    """Raise ValueError if a module is no cell."""
    missing = [name for name in ("state_size", "initial_state") if not hasattr(cell, name)]
    if missing:
        raise ValueError(
            f"{type(cell).__name__} is no cell: it has no {' and no '.join(missing)}; a cell has state_size, "
            "initial_state(batch_size) and forward(x, state) (torch.nn cells: rtrl_moe_pl.cells.TorchCell)"
        )
    for name, parameter in cell.named_parameters():
        if parameter.is_complex():
            raise ValueError(
                f"the cell's {name} is complex: keep it as a real parameter [.., 2] and use torch.view_as_complex"
            )


def require_data(inputs: Tensor, targets: Targets, starts: Tensor | None) -> None:
    """Raise ValueError or TypeError if inputs, targets and starts are not of the same lanes and steps."""
    if inputs.ndim < 2 or inputs.shape[1] == 0:
        raise ValueError(f"inputs must be [batch, time, ..] with at least one step, got shape {tuple(inputs.shape)}")
    expected = tuple(inputs.shape[:2])
    for target in targets if isinstance(targets, tuple) else (targets,):
        if not isinstance(target, Tensor):
            raise TypeError(
                f"targets must be a tensor [batch, time, ..] or a tuple of them, got {type(target).__name__}"
            )
        if tuple(target.shape[:2]) != expected:
            raise ValueError(f"targets have shape {tuple(target.shape)}, inputs are of {expected} [batch, time]")
    if starts is not None and (tuple(starts.shape) != expected or starts.dtype != torch.bool):
        raise ValueError(
            f"starts must be a bool tensor of shape {expected} [batch, time], "
            f"got {starts.dtype} of shape {tuple(starts.shape)}"
        )


def named_parameters(cell: nn.Module, readout: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters by public name; one shared by cell and readout appears once, under its cell name."""
    found = recurrent_parameters(cell)
    known = {id(p) for p in found.values()}
    return found | {f"readout.{name}": p for name, p in readout.named_parameters() if id(p) not in known}


def with_fresh_start(
    algorithm: GradientAlgorithm,
    cell: nn.Module,
    memory: Memory,
    inputs: Tensor,
    targets: Targets,
    starts: Tensor | None,
) -> Tensor | None:
    """The window's starts, everything checked, with a start at step 0 for a fresh memory."""
    require_data(inputs, targets, starts)
    require_inputs(cell, inputs)
    memory.require_whole()
    batch, steps = inputs.shape[:2]
    if batch != memory.batch_size:
        raise ValueError(
            f"got {batch} lanes, but the carried state and influence are of {memory.batch_size}: "
            "the batch size must stay the same while a memory is carried (drop a smaller last batch)"
        )
    if algorithm.carries_influence == isinstance(memory.base, ZeroSensitivity):
        raise ValueError(f"this memory was made by another algorithm: use {algorithm}.init")
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
