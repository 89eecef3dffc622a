"""Haystack: a value named by a key, hidden in noise that looks like values, is asked for at the end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from rtrl_moe_pl.cells.base import at_least
from rtrl_moe_pl.randomness import integers
from rtrl_moe_pl.tasks.base import FixedLengthTask, Steps

BOS, KEY, SEPARATOR, QUESTION, VALUES = range(5)  # the last is the first of the values
_VALUE, _PLACE, _TIE, _NOISE, _ASKED = range(5)  # what a draw is for


@dataclass(frozen=True, repr=False)
class Haystack(FixedLengthTask):
    """Tokens BOS, noise.., KEY, value, SEP, noise.., Q of one length; the label, asked for at Q alone, is the value.

    The noise is drawn from the values: only what follows a key counts. Chance is 1 / values. With several needles
    each has a key of its own, and Q is one of as many questions; keys of distractors are never asked for.

    **A gradient truncated to windows of k steps is a control only if min_gap is at least k** (the shipped ones: above
    2 k): where some values fall into the window of their question, a truncated gradient learns to latch from these, and
    carries over to the others.

    Tokens: 0 BOS, 1 the first key, 2 SEP, 3 the first question, then the values, the other needles' keys, their
    questions, and the distractors' keys.

    Args:
        length: L, steps of every sequence.
        values: number of values, at least 2.
        needles: number of key-value pairs that may be asked for, at least 1.
        distractors: number of key-value pairs that are never asked for.
        min_gap: least distance from a needle's value to the question, in steps, at least 2.
        insert_from, insert_to: part of the allowed places that is used, 0 the beginning and 1 the end.

    Raises:
        TypeError, ValueError: for options that leave no sequences, naming the option.
    """

    length: int = 64
    values: int = 4
    needles: int = 1
    distractors: int = 0
    min_gap: int = 33
    insert_from: float = 0.0
    insert_to: float = 1.0

    def __post_init__(self) -> None:
        at_least(2, "values", self.values)
        at_least(1, "needles", self.needles)
        at_least(0, "distractors", self.distractors)
        at_least(2, "min_gap", self.min_gap)
        shortest = 3 * self._pairs + self.min_gap
        at_least(shortest, f"length (for {self._pairs} key-value pairs and min_gap {self.min_gap})", self.length)
        if not 0 <= self.insert_from <= self.insert_to <= 1:
            raise ValueError(
                f"insert_from and insert_to must be 0 <= insert_from <= insert_to <= 1, got {self.insert_from} and "
                f"{self.insert_to}"
            )

    @property
    def _pairs(self) -> int:
        return self.needles + self.distractors

    @property
    def vocabulary_size(self) -> int:
        return VALUES + self.values + 2 * (self.needles - 1) + self.distractors

    @property
    def num_classes(self) -> int:
        return self.values

    def gaps(self, seed: int, index: Tensor) -> Tensor:
        """Distance from the value that is asked for to the question, in steps, of the sequences ``index``."""
        asked = integers(seed, _ASKED, index, low=0, high=self.needles)
        return self.length - 2 - self._places(seed, index).gather(-1, asked[..., None])[..., 0]

    def _places(self, seed: int, index: Tensor) -> Tensor:
        """Where the keys are, [.., pairs]: needles first, in random order, no two pairs in one place."""
        room = self.length - 3 * self._pairs - self.min_gap  # places of the first, with all others close behind it
        low, high = round(self.insert_from * room), round(self.insert_to * room)
        number = torch.arange(self._pairs, device=index.device)
        offset = integers(seed, _PLACE, index[..., None], number, low=low, high=high + 1)
        # two in one place are put in random order
        tie = integers(seed, _TIE, index[..., None], number, low=0, high=1 << 16)
        order = ((offset << 16) + tie) * self._pairs + number
        rank = (order[..., None, :] < order[..., :, None]).sum(-1)
        return 1 + offset + 3 * rank

    def marks(self, tokens: Tensor) -> dict[str, Tensor]:
        """The keys of needles and of distractors, the values behind needles' keys, and the question."""
        others = VALUES + self.values  # needles' keys, their questions, distractors' keys
        number = tokens - others
        key = (tokens == KEY) | ((number >= 0) & (number < self.needles - 1))
        value = functional.pad(key, (1, 0))[..., : tokens.shape[-1]]
        distractor = number >= 2 * (self.needles - 1)
        question = (tokens == QUESTION) | ((number >= self.needles - 1) & ~distractor)
        found = {"key": key, "value": value, "question": question}
        return found | {"distractor": distractor} if self.distractors else found

    def at(self, seed: int, index: Tensor, position: Tensor) -> Steps:
        noise = VALUES + integers(seed, _NOISE, index, position, low=0, high=self.values)
        number = torch.arange(self._pairs, device=index.device)
        values = integers(seed, _VALUE, index[..., None], number, low=0, high=self.values)
        keys = VALUES + self.values + number - 1
        keys = torch.where(number == 0, KEY, torch.where(number < self.needles, keys, keys + self.needles - 1))
        step = position[..., None] - self._places(seed, index)  # 0 at a key, 1 at its value, 2 behind it
        tokens = torch.where(step == 1, VALUES + values, keys).masked_fill(step == 2, SEPARATOR)
        there = (step >= 0) & (step <= 2)
        tokens = torch.where(there.any(-1), (tokens * there).sum(-1), noise)
        asked = integers(seed, _ASKED, index, low=0, high=self.needles)
        question = torch.where(asked == 0, QUESTION, VALUES + self.values + self.needles - 2 + asked)
        last = (position == self.length - 1).expand_as(tokens)
        tokens = torch.where(last, question, tokens).masked_fill(position == 0, BOS)
        label = values.gather(-1, asked[..., None])[..., 0]
        return Steps(tokens, label * last, last.float())
