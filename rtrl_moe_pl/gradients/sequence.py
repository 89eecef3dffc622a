"""The gradient of whole sequences, without Lightning."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rtrl_moe_pl.gradients.base import GradientAlgorithm
from rtrl_moe_pl.gradients.windows import LossFunction, Targets


@dataclass(frozen=True)
class SequenceResult:
    """Loss (a float, summed over windows), outputs [B, T, O], last state [B, S] and gradients by public name."""

    loss: float
    outputs: Tensor
    state: Tensor
    grads: dict[str, Tensor]


def sequence_gradient(
    algorithm: GradientAlgorithm,
    cell: nn.Module,
    readout: nn.Module,
    inputs: Tensor,  # [B, T, ..]
    targets: Targets,  # [B, T, ..], or a tuple of such
    loss_fn: LossFunction,
    *,
    starts: Tensor | None = None,  # [B, T] bool
    state: Tensor | None = None,  # [B, S]
) -> SequenceResult:
    """Loss and gradient of sequences, window by window, at fixed parameters (they are not changed).

    Args:
        algorithm: e.g. ``RTRL(window=16)``.
        cell: module with ``state_size``, ``initial_state(batch_size) -> [B, S]`` and ``forward(x, s) -> [B, S]``.
        readout: module [N, S] -> [N, O].
        loss_fn: ``(outputs [B, k, O], targets [B, k, ..]) -> scalar``, summed over the window's lanes and steps.
        starts: where a lane's state is replaced by the initial state before the step.
        state: the state before the first step, a constant without influence: chaining two calls through it
            truncates. None makes the first step a start, so that gradients reach a learned initial state.

    Raises:
        ValueError: for wrong shapes, a window without steps, or a cell that the algorithm cannot train.
        MemoryForecastError: if the influence matrix does not fit in the free memory.
    """
    memory = algorithm.init(cell, inputs.shape[0], inputs.device)
    if state is not None:
        kind = memory.state.dtype
        if not state.is_floating_point() or torch.promote_types(state.dtype, kind) != state.dtype:
            raise ValueError(f"state is {state.dtype}, the cell's is {kind}: convert it")
        if state.shape != memory.state.shape:
            raise ValueError(f"state has shape {tuple(state.shape)}, the cell's is {tuple(memory.state.shape)}")
        memory = algorithm.init(cell, inputs.shape[0], inputs.device, state.dtype)
        memory.state, memory.fresh = state.detach().clone(), False
    result = algorithm.run(cell, readout, inputs, targets, loss_fn, memory, starts)
    return SequenceResult(float(result.loss), result.outputs, result.memory.state, result.grads)
