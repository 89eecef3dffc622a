"""a^n b^n: does the number of a's equal the number of b's?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from rtrl_moe_pl.cells.base import at_least
from rtrl_moe_pl.randomness import integers
from rtrl_moe_pl.tasks.base import Steps, Task, one_of

A, B, QUESTION, PAD = range(4)  # tokens; only the predecessor's layout has PAD
MAX_DIFFERENCE = 4  # largest |j| of a balanced negative
_N, _LABEL, _DIFFERENCE, _LAST = range(4)  # what a draw is for


@dataclass(frozen=True, repr=False)
class AnBn(Task):
    """Tokens a..a b..b Q; label 1 if there are as many b's as a's, asked for at Q and nowhere else.

    Half of the sequences are positive. n is uniform in n_min..n_max for both classes: a positive has (n, n) letters,
    its balanced negative (n + j, n - j) or (n - j, n + j), so that **both classes have one distribution of lengths**.
    j is uniform over the values 1..min(4, n - 1) that keep both counts inside n_min..n_max, as the positives' counts
    are (and is 1 where none does): otherwise a single count would tell the class more often. The best rule that sees
    one count alone scores 55 % for n in 2..16; more for a narrower range (57 % for 2..8, 67 % for 2..4).

    Args:
        n_min: smallest n, at least 2 (at least 1 with the predecessor's negatives).
        n_max: largest n.
        layout: "compact": length 2n + 1. "predecessor": a..a b..b PAD..PAD Q, all sequences of one length.
        negatives: "balanced", or "predecessor": the number of b's uniform over n_min..n_max without the number of
            a's. Their lengths tell the class: parity alone scores 83 % (n <= 3) to 75 % (n <= 63).
        length: the one length of the predecessor's layout, at least 2 n_max + 1, which is the default.

    Raises:
        TypeError, ValueError: for options that leave no sequences, naming the option.
    """

    n_min: int = 2
    n_max: int = 16
    layout: Literal["compact", "predecessor"] = "compact"
    negatives: Literal["balanced", "predecessor"] = "balanced"
    length: int | None = None

    def __post_init__(self) -> None:
        one_of(("compact", "predecessor"), "layout", self.layout)
        one_of(("balanced", "predecessor"), "negatives", self.negatives)
        if self.negatives == "balanced":
            at_least(2, "n_min (with balanced negatives)", self.n_min)
            at_least(self.n_min, f"n_max (n_min is {self.n_min})", self.n_max)
        else:
            at_least(1, "n_min", self.n_min)
            at_least(self.n_min + 1, f"n_max (n_min is {self.n_min}, negatives need two counts)", self.n_max)
        if self.length is not None:
            if self.layout == "compact":
                raise ValueError(f"length is an option of layout 'predecessor' alone, got length={self.length}")
            at_least(2 * self.n_max + 1, f"length (n_max is {self.n_max})", self.length)

    @property
    def vocabulary_size(self) -> int:
        return 3 if self.layout == "compact" else 4

    @property
    def num_classes(self) -> int:
        return 2

    @property
    def min_length(self) -> int:
        return 2 * self.n_min + 1 if self.layout == "compact" else self.max_length

    @property
    def max_length(self) -> int:
        return self.length or 2 * self.n_max + 1

    def scale(self, factor: int) -> AnBn:
        """n uniform in factor * n_max // 2 + 1 .. factor * n_max: strictly longer than trained for factor >= 2."""
        at_least(1, "the length factor", factor)
        if factor == 1:
            return self
        n_max = factor * self.n_max
        length = self.length and factor * self.length
        return replace(self, n_min=n_max // 2 + 1, n_max=n_max, length=length)

    def counts(self, seed: int, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Number of a's, number of b's and label (1: equal) of each sequence, each int64 like ``index``."""
        n = integers(seed, _N, index, low=self.n_min, high=self.n_max + 1)
        label = integers(seed, _LABEL, index, low=0, high=2)
        if self.negatives == "balanced":
            inside = torch.minimum(n - self.n_min, self.n_max - n)  # largest j with both counts in range
            j_max = torch.minimum(inside, n - 1).clamp(1, MAX_DIFFERENCE)
            draw = integers(seed, _DIFFERENCE, index, low=0, high=2 * j_max)  # 2 (j - 1) + sign
            j = (1 - label) * (draw // 2 + 1) * (1 - 2 * (draw % 2))
            return n + j, n - j, label
        other = integers(seed, _LAST, index, low=self.n_min, high=self.n_max)
        other = other + (other >= n)
        return n, torch.where(label == 1, n, other), label

    def lengths(self, seed: int, index: Tensor) -> Tensor:
        if self.layout == "predecessor":
            return torch.full_like(index, self.max_length)
        if self.negatives == "balanced":
            return 2 * integers(seed, _N, index, low=self.n_min, high=self.n_max + 1) + 1
        first, last, _ = self.counts(seed, index)
        return first + last + 1

    def at(self, seed: int, index: Tensor, position: Tensor) -> Steps:
        first, last, label = self.counts(seed, index)
        letters = first + last
        asked = position == (letters if self.layout == "compact" else self.max_length - 1)
        tokens = (position >= first).long()  # A, then B
        if self.layout == "predecessor":
            tokens = tokens.masked_fill(position >= letters, PAD)
        tokens = tokens.masked_fill(asked, QUESTION)
        return Steps(tokens, label * asked, asked.float())
