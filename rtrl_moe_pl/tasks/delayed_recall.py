"""Delayed recall: a value shown once is asked for after a gap."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rtrl_moe_pl.cells.base import at_least
from rtrl_moe_pl.randomness import integers
from rtrl_moe_pl.tasks.base import Steps, Task

_VALUE, _GAP, _NOISE = range(3)  # what a draw is for


@dataclass(frozen=True, repr=False)
class DelayedRecall(Task):
    """Tokens value, noise x gap, query; the label, asked for at the query and nowhere else, is the value.

    The gap is the number of steps strictly between value and query. Chance is 1 / values. A gradient truncated to
    windows no longer than min_gap + 1 steps never connects the answer with the value: unlike a^n b^n, whose counter
    can be learned from neighbouring steps, this separates truncated from exact gradients.

    Tokens: 0..values-1 the values, then the noise tokens, last the query.

    Args:
        values: number of values, at least 2.
        noise_tokens: number of different tokens in the gap, drawn uniformly; 1 is a blank gap.
        min_gap: least gap, at least 0.
        max_gap: largest gap; gaps are uniform between the two.

    Raises:
        TypeError, ValueError: for options that leave no sequences, naming the option.
    """

    values: int = 4
    noise_tokens: int = 4
    min_gap: int = 20
    max_gap: int = 40

    def __post_init__(self) -> None:
        at_least(2, "values", self.values)
        at_least(1, "noise_tokens (1 is a blank gap)", self.noise_tokens)
        at_least(0, "min_gap", self.min_gap)
        at_least(self.min_gap, f"max_gap (min_gap is {self.min_gap})", self.max_gap)

    @property
    def vocabulary_size(self) -> int:
        return self.values + self.noise_tokens + 1

    @property
    def num_classes(self) -> int:
        return self.values

    @property
    def min_length(self) -> int:
        return self.min_gap + 2

    @property
    def max_length(self) -> int:
        return self.max_gap + 2

    def scale(self, factor: int) -> DelayedRecall:
        """Gaps uniform in factor * max_gap // 2 + 1 .. factor * max_gap; a largest gap of 0 cannot be scaled."""
        at_least(1, "the length factor", factor)
        if factor == 1:
            return self
        max_gap = factor * at_least(1, "max_gap (to be scaled)", self.max_gap)
        return replace(self, min_gap=max_gap // 2 + 1, max_gap=max_gap)

    def lengths(self, seed: int, index: Tensor) -> Tensor:
        return integers(seed, _GAP, index, low=self.min_gap, high=self.max_gap + 1) + 2

    def at(self, seed: int, index: Tensor, position: Tensor) -> Steps:
        value = integers(seed, _VALUE, index, low=0, high=self.values)
        noise = integers(seed, _NOISE, index, position, low=self.values, high=self.values + self.noise_tokens)
        asked = position == self.lengths(seed, index) - 1
        tokens = torch.where(position == 0, value, noise).masked_fill(asked, self.vocabulary_size - 1)
        return Steps(tokens, value * asked, asked.float())
