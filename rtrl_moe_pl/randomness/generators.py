"""States of torch's own generators, which cells may draw from (dropout); everything else here draws by counters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rtrl_moe_pl.randomness.counter import bits


def generator_states(device: torch.device) -> list[Tensor]:
    """The CPU's, and the GPU's if the device is one."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def set_generators(states: Sequence[Tensor], device: torch.device) -> None:
    """Go on from what `generator_states` gave; one that is on one side alone is left as it is."""
    torch.set_rng_state(states[0])
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


def seed_of_rank(rank: int) -> None:
    """Let each process of a run draw its own numbers, from the one seed that all were given; rank 0 goes on as it is.

    Done before the first draw for a lane: with the same numbers lanes of several processes would have the same masks.
    """
    if rank:
        torch.manual_seed(int(bits(torch.initial_seed(), rank)) & ((1 << 63) - 1))
