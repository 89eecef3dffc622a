"""What every cell has: a flat state, its initial value, and one step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Cell(nn.Module, ABC):
    """One step of a recurrent network on a flat state.

    Subclassing is a convenience: the gradient algorithms take any ``nn.Module`` with ``state_size``,
    ``initial_state`` and ``forward``. A cell is a deterministic function of its arguments, treats every row of the
    batch alone and changes nothing in place.

    Args:
        input_size: D, the width of an input; None where it has none (token ids).
        state_size: S, the width of the state.
        learned_initial_state: start every sequence from a parameter ``initial`` (at first zero), not from zero.

    Raises:
        TypeError: if a size is not an integer.
        ValueError: if a size is below 1.
    """

    initial: nn.Parameter | None

    def __init__(self, input_size: int | None, state_size: int, *, learned_initial_state: bool = False) -> None:
        super().__init__()
        self.input_size = None if input_size is None else at_least(1, "input_size", input_size)
        self.state_size = at_least(1, "state_size", state_size)
        initial = nn.Parameter(torch.zeros(state_size)) if learned_initial_state else None
        self.register_parameter("initial", initial)

    @property
    def output_size(self) -> int:
        """Width of what the next cell of a ``Stack`` reads."""
        return self.state_size

    def output(self, state: Tensor) -> Tensor:
        """What the next cell of a ``Stack`` reads of a state [B, S], as [B, output_size]."""
        return state

    def initial_state(self, batch_size: int) -> Tensor:
        """State at a sequence start, [B, S], in the parameters' dtype and on their device; not to be written to."""
        if self.initial is not None:
            return self.initial.expand(batch_size, -1)
        return next(self.parameters()).new_zeros(batch_size, self.state_size)

    @abstractmethod
    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        """The next state [B, S], from the input x [B, D] and the state s [B, S]."""


def require_inputs(cell: nn.Module, inputs: Tensor) -> None:
    """Raise ValueError if inputs [B, T, ..] are not what a ``Cell`` says that it reads."""
    size = cell.input_size if isinstance(cell, Cell) else None
    if size is not None and inputs.shape[2:] != (size,):
        fix = ": token ids need a cell with an embedding, or data.encoding one_hot" if inputs.ndim == 2 else ""
        raise ValueError(f"{type(cell).__name__} reads [batch, time, {size}] numbers, got {list(inputs.shape)}{fix}")


def at_least(minimum: int, name: str, value: int) -> int:
    """Return the value if it is an integer of at least ``minimum``; say in one line what is wrong if not."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    if value >= 2**63:
        raise ValueError(f"{name} must be below 2^63, got {value}")
    return value


def not_negative(name: str, value: float) -> float:
    """Return the value if it is a finite number of at least 0; say in one line what is wrong if not."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number of at least 0, got {value}")
    return value


def positive(name: str, value: float) -> float:
    """Return the value if it is a finite number above 0; say in one line what is wrong if not."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, got {value}")
    return value
