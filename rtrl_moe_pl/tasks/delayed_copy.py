"""Delayed copy: say again what was said some steps ago."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rtrl_moe_pl.cells.base import at_least
from rtrl_moe_pl.randomness import integers
from rtrl_moe_pl.tasks.base import FixedLengthTask, Steps


@dataclass(frozen=True, repr=False)
class DelayedCopy(FixedLengthTask):
    """Uniform tokens; the label at step t, asked for at every step from ``delay`` on, is the token of step t - delay.

    Chance is 1 / symbols. A state must hold ``delay`` tokens at once: a test of capacity, where Haystack is one of
    duration.

    Args:
        symbols: number of tokens, at least 2.
        delay: in steps, at least 1.
        length: steps of every sequence, more than ``delay``.

    Raises:
        TypeError, ValueError: for options that leave nothing to ask for, naming the option.
    """

    symbols: int = 4
    delay: int = 1
    length: int = 400

    def __post_init__(self) -> None:
        at_least(2, "symbols", self.symbols)
        at_least(1, "delay", self.delay)
        at_least(self.delay + 1, f"length (delay is {self.delay})", self.length)

    @property
    def vocabulary_size(self) -> int:
        return self.symbols

    @property
    def num_classes(self) -> int:
        return self.symbols

    def at(self, seed: int, index: Tensor, position: Tensor) -> Steps:
        tokens = integers(seed, index, position, low=0, high=self.symbols)
        asked = (position >= self.delay).expand_as(tokens)
        labels = integers(seed, index, (position - self.delay).clamp(min=0), low=0, high=self.symbols)
        return Steps(tokens, labels * asked, asked.float())
