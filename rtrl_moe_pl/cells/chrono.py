"""Gate biases that begin with long memories."""

from __future__ import annotations

import torch
from torch import Tensor

from rtrl_moe_pl.cells.base import at_least


def chrono_bias(size: int, max_memory: int) -> Tensor:
    """Draw biases b [size] of gates that keep the state, b = log u with u uniform in [1, max_memory - 1].

    A gate at its bias alone keeps sigmoid(b) of the state in a step and so remembers for 1 + u steps: between 2 and
    ``max_memory``.

    Raises:
        ValueError: if ``max_memory`` is below 2.
    References: Tallec & Ollivier 2018, arXiv:1804.11188.
    """
    at_least(2, "max_memory", max_memory)
    return torch.empty(size).uniform_(1, max_memory - 1).log()
