"""How evenly a routed cell uses its slots and experts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rtrl_moe_pl.cells import Routing


def usage_entropy(counts: Tensor) -> Tensor:
    """Entropy of how often each was chosen [n], as part of its largest value log n: 1 for all alike, 0 for one alone.

    0-dim; 1 where there is only one to choose, 0 where none was chosen.
    """
    if len(counts) == 1:
        return torch.ones((), device=counts.device)
    share = counts.double() / counts.sum().clamp(min=1)
    return (torch.special.entr(share).sum() / math.log(len(counts))).float()


def usage_figures(used: Routing) -> dict[str, Tensor]:
    """Figures by tag, of counts [S], [S] and [E]."""
    figures = {
        "train/read_entropy": usage_entropy(used.read),
        "train/write_entropy": usage_entropy(used.written),
        "train/unwritten_slots": (used.written == 0).sum().float(),
    }
    if len(used.experts):
        figures["train/expert_entropy"] = usage_entropy(used.experts)
        figures["train/dead_experts"] = (used.experts == 0).sum().float()
    return figures
