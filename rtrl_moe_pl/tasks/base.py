"""What a task is: tokens, labels and weights at any step of any sequence, without making the rest of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import NamedTuple, Self

import torch
from torch import Tensor

from rtrl_moe_pl.cells.base import at_least


class Steps(NamedTuple):
    """Some steps of some sequences; the three tensors have one shape."""

    tokens: Tensor  # int64, below vocabulary_size
    labels: Tensor  # int64, below num_classes; 0 where the weight is 0
    weights: Tensor  # float32, the loss weight of each step


class Sequences(NamedTuple):
    """Whole sequences or parts of them, right-padded with their last token at weight 0."""

    tokens: Tensor  # [N, L] int64
    labels: Tensor  # [N, L] int64
    weights: Tensor  # [N, L] float32
    lengths: Tensor  # [N] int64


class Task(ABC):
    """An endless, indexed set of labelled token sequences: configuration only, no state.

    Sequence i of a seed is the same whatever the batch, the device or the process. A subclass (best a frozen
    dataclass: its repr identifies a data stream in checkpoints) draws from `rtrl_moe_pl.randomness` and defines what
    is abstract here; its methods must be vectorised and stay on the device of ``index``.
    """

    @property
    @abstractmethod
    def vocabulary_size(self) -> int:
        """Number of tokens."""

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """Number of labels."""

    @property
    @abstractmethod
    def min_length(self) -> int:
        """A lower bound on the lengths, at least 1. The closer it is, the less memory packing takes."""

    @property
    @abstractmethod
    def max_length(self) -> int:
        """An upper bound on the lengths: the width of a padded batch."""

    @abstractmethod
    def lengths(self, seed: int, index: Tensor) -> Tensor:
        """Number of steps of the sequences ``index`` (any shape), int64 of the same shape."""

    @abstractmethod
    def at(self, seed: int, index: Tensor, position: Tensor) -> Steps:
        """The steps ``position`` (from 0, below the length) of the sequences ``index``, broadcast together."""

    @abstractmethod
    def scale(self, factor: int) -> Self:
        """The same task with sequences up to ``factor`` times as long, all longer than any of this one's.

        ``scale(1)`` is the task itself.
        """

    def marks(self, tokens: Tensor) -> dict[str, Tensor]:
        """What a picture of a sequence should point out: names, and bool tensors like tokens [.., L]; none here."""
        return {}

    def sample(self, seed: int, index: Tensor, position: Tensor | None = None) -> Sequences:
        """Whole sequences, or a part of each.

        Args:
            seed: any integer.
            index: [N] int64, which sequences.
            position: [N, L] int64, which steps, from 0 on; None: all, L = max_length.

        Returns:
            Sequences of width L, on the device of ``index``.
        Cost: time and memory N L.
        """
        lengths = self.lengths(seed, index)[:, None]  # [N, 1]
        if position is None:
            position = torch.arange(self.max_length, device=index.device).expand(len(index), -1)
        inside = position < lengths
        steps = self.at(seed, index[:, None], torch.minimum(position, lengths - 1))
        return Sequences(steps.tokens, steps.labels * inside, steps.weights * inside, lengths[:, 0])

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({options})"


class FixedLengthTask(Task):
    """A task whose sequences all have ``length`` steps: a dataclass with that field. Scaled, nothing else changes."""

    length: int

    @property
    def min_length(self) -> int:
        return self.length

    @property
    def max_length(self) -> int:
        return self.length

    def lengths(self, seed: int, index: Tensor) -> Tensor:
        return torch.full_like(index, self.length)

    def scale(self, factor: int) -> Self:
        at_least(1, "the length factor", factor)
        return self if factor == 1 else replace(self, length=factor * self.length)  # type: ignore[type-var]


def one_of(choices: tuple[str, ...], name: str, value: str) -> str:
    """Return the value if it is one of the choices; say in one line what is wrong if not."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value
