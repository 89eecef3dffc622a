"""Puzzles generated from a rule: what is done to every grid, shown by demonstrations."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rtrl_moe_pl.cells.base import at_least
from rtrl_moe_pl.randomness import bits, integers, uniform
from rtrl_moe_pl.tasks.base import one_of
from rtrl_moe_pl.tasks.puzzles.base import Puzzles, PuzzleShape, PuzzleTask, dropout_rate
from rtrl_moe_pl.tasks.puzzles.grids import COLOR, DIHEDRAL, dihedral

FAMILIES = ("colors", "flips", "colors_and_flips", "pattern")
_RULE, _CELL, _DROP, _KEPT, _OTHER = range(5)  # what a draw is for
SPLITS = ("held_out", "train_rules", "shuffled_demos")


@dataclass(frozen=True)
class RulePuzzles(PuzzleTask):
    """Grids of random colours, and one rule that all of a puzzle's answers follow.

    Rules of training and held-out rules are disjoint. Evaluation sets: *held_out*: held-out rules. *train_rules*:
    rules of training, other grids. *shuffled_demos*: held_out with the demonstrations of another rule, the control:
    what is right there was not read from the demonstrations.

    Families: *colors*: a permutation of the colours (``colors``! rules). *flips*: one of the eight symmetries of the
    square. *colors_and_flips*: both. *pattern*: the grid is black but for one cell, and the answer has a 2 x 2 pattern
    of colours with its upper left corner there (``colors``^4 rules), the PATTERN task of Latent Program Networks.

    Args:
        family: what rules do.
        size: n, height and width of the grids.
        colors: number of colours, at most 9 (pattern: beside black).
        train_rules, held_out_rules: how many of each; together at most as many as there are.
        demos: demonstrations of a puzzle.
        demo_dropout: probability that a training demonstration is left out; one, drawn at random, always stays.

    Raises:
        TypeError, ValueError: for options out of range, naming the option.
    References: Bonnet & Macfarlane 2024, arXiv 2411.08706 (PATTERN).
    """

    family: str = "colors"
    size: int = 4
    colors: int = 5
    train_rules: int = 96
    held_out_rules: int = 24
    demos: int = 3
    demo_dropout: float = 0.0

    def __post_init__(self) -> None:
        one_of(FAMILIES, "family", self.family)
        at_least(2, "size", self.size)
        at_least(2, "colors", self.colors)
        if self.colors > 9:
            raise ValueError(f"colors must be at most 9, got {self.colors}")
        at_least(1, "demos", self.demos)
        at_least(1, "train_rules", self.train_rules)
        at_least(1, "held_out_rules", self.held_out_rules)
        if self.train_rules + self.held_out_rules > self.rules:
            raise ValueError(
                f"train_rules + held_out_rules must be at most {self.rules}, the number of rules of family "
                f"{self.family!r} with {self.colors} colors, got {self.train_rules} + {self.held_out_rules}"
            )
        dropout_rate("demo_dropout", self.demo_dropout)

    @property
    def rules(self) -> int:
        """How many rules the family has."""
        return {
            "colors": math.factorial(self.colors),
            "flips": DIHEDRAL,
            "colors_and_flips": math.factorial(self.colors) * DIHEDRAL,
            "pattern": self.colors**4,
        }[self.family]

    @property
    def shape(self) -> PuzzleShape:
        colors = self.colors + (self.family == "pattern")  # black
        return PuzzleShape(
            COLOR + colors, self.size, self.size, self.demos, identities=self.train_rules + self.held_out_rules
        )

    @property
    def evaluation_splits(self) -> tuple[str, ...]:
        return SPLITS

    @cached_property
    def _shuffled(self) -> Tensor:
        """Rules in an order that no seed changes: training's first, then those held out."""
        return bits(0, torch.arange(self.rules)).argsort(stable=True)

    @cached_property
    def _permutations(self) -> Tensor:  # [colors!, colors]
        return torch.tensor(list(itertools.permutations(range(self.colors))))

    def sample(self, split: str, seed: int, index: Tensor) -> Puzzles:
        one_of(("train", *SPLITS), "split", split)
        of_training = split in ("train", "train_rules")
        count, first = (self.train_rules, 0) if of_training else (self.held_out_rules, self.train_rules)
        identity = first + integers(seed, _RULE, index, low=0, high=count)  # [B]
        demo_identity = identity
        if split == "shuffled_demos":
            other = integers(seed, _OTHER, index, low=1, high=self.train_rules + self.held_out_rules)
            demo_identity = (identity + other) % (self.train_rules + self.held_out_rules)
        grids = self._grids(seed, index)  # [B, K + 1, n, n]
        query, demos = grids[:, :1], grids[:, 1:]
        answer, answers = self._apply(identity, query), self._apply(demo_identity, demos)
        tokens = [(COLOR + g).flatten(2) for g in (query, answer, demos, answers)]
        mask = self._kept(seed, index) if split == "train" else torch.ones_like(demos[:, :, 0, 0], dtype=torch.bool)
        return Puzzles(tokens[0][:, 0], tokens[1][:, 0], tokens[2], tokens[3], mask, identity)

    def _grids(self, seed: int, index: Tensor) -> Tensor:
        number = torch.arange((self.demos + 1) * self.size**2, device=index.device)
        if self.family == "pattern":  # where the one cell is: the pattern fits in
            number = torch.arange(self.demos + 1, device=index.device)
            place = integers(seed, _CELL, index[:, None], number, low=0, high=(self.size - 1) ** 2)
            place = place // (self.size - 1) * self.size + place % (self.size - 1)
            return torch.nn.functional.one_hot(place, self.size**2).unflatten(-1, (self.size, self.size))
        cells = integers(seed, _CELL, index[:, None], number, low=0, high=self.colors)
        return cells.view(len(index), self.demos + 1, self.size, self.size)

    def _kept(self, seed: int, index: Tensor) -> Tensor:
        number = torch.arange(self.demos, device=index.device)
        kept = uniform(seed, _DROP, index[:, None], number) >= self.demo_dropout
        one = integers(seed, _KEPT, index[:, None], low=0, high=self.demos)
        return kept | (number == one)

    def _apply(self, identity: Tensor, grids: Tensor) -> Tensor:
        """Grids [B, N, n, n] after the rule of each row."""
        rule = self._shuffled.to(grids.device)[identity]
        if self.family == "pattern":
            row, column = torch.ones_like(grids).cumsum(2) - 1, torch.ones_like(grids).cumsum(3) - 1
            corner = grids.flatten(2).argmax(-1)[..., None, None]
            down, right = row - corner // self.size, column - corner % self.size
            inside = (down >= 0) & (down < 2) & (right >= 0) & (right < 2)
            digit = self.colors ** (2 * down + right).clamp(0, 3)
            return (1 + rule[:, None, None, None] // digit % self.colors) * inside
        flip, colouring = rule % DIHEDRAL, rule // DIHEDRAL
        if self.family == "colors":
            flip, colouring = torch.zeros_like(rule), rule
        permutation = self._permutations.to(grids.device)[colouring]  # [B, colors]
        recoloured = permutation.gather(1, grids.flatten(1)).view_as(grids)
        return dihedral(recoloured, flip[:, None].expand(grids.shape[:2]))
