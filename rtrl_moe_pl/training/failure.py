"""Numerical failure: stop the run and name the first tensor that went bad."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class NumericalFailure(RuntimeError):
    """A tensor of the training step holds NaN or infinity."""


def describe_bad(tensor: Tensor) -> str | None:
    """Say what is wrong with a tensor: NaN, infinity, or a norm that overflows; None if nothing is."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return None
    values = tensor.detach()
    if torch.isfinite(values).all():
        norm = torch.linalg.vector_norm(values)
        return None if torch.isfinite(norm) else f"is finite, but its norm overflows {values.dtype}"
    nans = int(torch.isnan(values).sum())
    infinities = int(torch.isinf(values).sum())
    return f"holds {nans} NaN and {infinities} infinite of {values.numel()} values"


def first_bad(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Describe the first bad tensor of (name, tensor) pairs given in the order of computation; None if all are fine."""
    for name, tensor in tensors:
        wrong = describe_bad(tensor)
        if wrong is not None:
            return f"{name} {wrong}"
    return None
