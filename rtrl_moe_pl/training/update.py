"""The one place that writes ``p.grad``: reduce over ranks, normalise, clip, step, schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rtrl_moe_pl.training.failure import NumericalFailure, first_bad


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place; a process alone keeps it as it is.

    Every rank must call it the same number of times, with tensors of one shape and type.
    Cost: one collective.
    """
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
    return values


class Stepper(Protocol):
    """An optimizer or a learning rate schedule."""

    def step(self) -> Any: ...


@dataclass(frozen=True)
class UpdateResult:
    """What an update did.

    Attributes:
        stepped: whether the optimizer was stepped; False when no weight was seen on any rank.
        grad_norm: L2 norm of the mean gradient before clipping; 0 if not stepped.
        weight: the weight seen on all ranks since the last update.
        counts: what was counted on all ranks since then, [n]; None if nothing was.
    """

    stepped: bool
    grad_norm: float
    weight: float
    counts: Tensor | None = None


class GradientSums:
    """Gradients, loss weights and counts summed over the batches since the last update."""

    def __init__(self) -> None:
        self.grads: dict[str, Tensor] = {}
        self.weight: Tensor | None = None
        self.counts: Tensor | None = None
        self.batches = 0

    def add(self, grads: Mapping[str, Tensor], weight: Tensor, counts: Tensor | None = None) -> None:
        """Add one batch: gradients of the summed loss, the sum of its loss weights (0-dim), and counts [n]."""
        if self.weight is None:
            self.grads, self.weight, self.counts = dict(grads), weight, counts
        else:
            added = {name: self.grads[name] + grad if name in self.grads else grad for name, grad in grads.items()}
            self.grads = {**self.grads, **added}  # a parameter may have been frozen in some of the batches
            self.weight = self.weight + weight
            self.counts = counts if self.counts is None or counts is None else self.counts + counts
        self.batches += 1

    def clear(self) -> None:
        self.grads, self.weight, self.counts, self.batches = {}, None, None, 0

    def to(self, device: torch.device) -> None:
        """Move the sums, which a checkpoint may have brought from another device."""
        self.grads = {name: grad.to(device) for name, grad in self.grads.items()}
        self.weight = None if self.weight is None else self.weight.to(device)
        self.counts = None if self.counts is None else self.counts.to(device)

    def state_dict(self) -> dict[str, Any]:
        return {"grads": dict(self.grads), "weight": self.weight, "counts": self.counts, "batches": self.batches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.grads, self.weight, self.batches = dict(state["grads"]), state["weight"], state["batches"]
        self.counts = state.get("counts")


def update(
    parameters: Mapping[str, nn.Parameter],
    sums: GradientSums,
    optimizer: Stepper,
    scheduler: Stepper | None = None,
    gradient_clip: float | None = None,
) -> UpdateResult:
    """Step the optimizer on the mean gradient over ranks, lanes, steps and batches, and clear the sums.

    One flat collective carries [gradients, weight]; nothing is averaged anywhere else. Every rank must call it the
    same number of times. With zero weight on all ranks the optimizer is not stepped (Adam moves on zero gradients).

    Args:
        parameters: by the names used in ``sums.grads``; frozen ones and those without a gradient get ``grad = None``.
        sums: sums of gradients and weights since the last update; a weight that is not finite marks a failure of this
            rank's batch, and so reaches every rank.
        optimizer: stepped once, or not at all.
        scheduler: stepped after the optimizer, whenever that is.
        gradient_clip: largest L2 norm of the mean gradient, or None.

    Raises:
        NumericalFailure: on every rank; before anything is changed if the weight or a gradient is not finite, after
            the step if it made a parameter so.
    Cost: one pass over the gradients, one collective, one transfer to the host.
    """
    if sums.weight is None:
        raise ValueError("update needs at least one batch: call GradientSums.add before it")
    unknown = sums.grads.keys() - parameters.keys()
    if unknown:
        raise ValueError(f"gradients for unknown parameters {sorted(unknown)}: the module has {sorted(parameters)}")
    names = [name for name in sums.grads if parameters[name].requires_grad]
    gradients = [sums.grads[name].reshape(-1) for name in names]
    counts = sums.weight.new_zeros(0) if sums.counts is None else sums.counts
    flat = sum_over_ranks(torch.cat([*gradients, sums.weight.reshape(1), counts.to(sums.weight)]))
    flat, weight, counts = flat.split([sum(map(len, gradients)), 1, len(counts)])
    total, sum_norm = torch.stack([weight[0], torch.linalg.vector_norm(flat)]).tolist()
    counts = counts if len(counts) else None
    means = dict(zip(names, flat.split([parameters[name].numel() for name in names]), strict=True))
    if not (math.isfinite(total) and math.isfinite(sum_norm)):
        named = [*((f"gradient of {name}", means[name]) for name in names), ("the gradient of all parameters", flat)]
        raise NumericalFailure(first_bad(named) or "the batch of another rank is not finite")
    sums.clear()
    if total == 0:
        return UpdateResult(stepped=False, grad_norm=0.0, weight=0.0, counts=counts)

    grad_norm = sum_norm / total
    clip = min(1.0, gradient_clip / grad_norm) if gradient_clip is not None and grad_norm > 0 else 1.0
    flat.mul_(clip / total)  # before the optimizer sees them: mean over all ranks, then clipped
    for name, parameter in parameters.items():
        parameter.grad = means[name].view_as(parameter).to(parameter.dtype) if name in means else None
    optimizer.step()
    if not math.isfinite(float(nn.utils.get_total_norm(parameters.values()))):
        raise NumericalFailure(first_bad((f"parameter {name}", p) for name, p in parameters.items()) or "parameters")
    if scheduler is not None:
        scheduler.step()
    return UpdateResult(stepped=True, grad_norm=grad_norm, weight=total, counts=counts)
