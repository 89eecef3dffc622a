"""What a puzzle is: a query grid, its answer, and demonstrations of the rule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rtrl_moe_pl.tasks.puzzles.colors import Look
from rtrl_moe_pl.tasks.puzzles.grids import COLOR

IGNORED = -100  # the label of a cell that is not asked for


class Puzzles(NamedTuple):
    """B puzzles; grids are flattened row by row to S = height x width tokens.

    A row whose labels are all `IGNORED` is padding: it weighs nothing anywhere.
    """

    inputs: Tensor  # [B, S] int64, the query
    labels: Tensor  # [B, S] int64, its answer; IGNORED where nothing is asked
    demo_inputs: Tensor  # [B, K, S] int64, K = max_demos
    demo_labels: Tensor  # [B, K, S] int64
    demo_mask: Tensor  # [B, K] bool: which demonstrations there are; at least one per row if K > 0
    identity: Tensor  # [B] int64: which rule or puzzle, a row of a `PuzzleEmbedding`

    @property
    def valid(self) -> Tensor:
        """[B] bool: which rows are puzzles, not padding."""
        return (self.labels != IGNORED).any(-1)

    def to(self, device: torch.device | str) -> Puzzles:
        """The same on another device."""
        return Puzzles(*(tensor.to(device) for tensor in self))

    def rows(self, index: Tensor) -> Puzzles:
        """The rows ``index`` ([n] int64 or [B] bool)."""
        return Puzzles(*(tensor[index] for tensor in self))


class PuzzleShape(NamedTuple):
    """The sizes that a model must know.

    Args:
        vocabulary: V, number of tokens.
        height, width: of a grid, in cells; S = height x width.
        max_demos: K, 0 where puzzles come without demonstrations.
        identities: number of rules or puzzles that are told apart.
    """

    vocabulary: int
    height: int
    width: int
    max_demos: int = 0
    identities: int = 1

    @property
    def cells(self) -> int:
        """S."""
        return self.height * self.width


def dropout_rate(name: str, value: float) -> float:
    """Return the value if it is a probability below 1; say in one line what is wrong if not."""
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be a probability below 1, got {value}")
    return value


class PuzzleTask(ABC):
    """Indexed sets of puzzles: configuration only, no state.

    Puzzle i of (split, seed) is the same whatever the batch, the device or the process. A subclass is best a frozen
    dataclass: its repr identifies the data in checkpoints.
    """

    @property
    @abstractmethod
    def shape(self) -> PuzzleShape:
        """Sizes."""

    @property
    def look(self) -> Look:
        """Of its tokens, for pictures."""
        return Look.of_grids(self.shape.vocabulary)

    @property
    @abstractmethod
    def evaluation_splits(self) -> tuple[str, ...]:
        """Names of the sets to evaluate on, beside "train"; the first is the one to select checkpoints by."""

    @abstractmethod
    def sample(self, split: str, seed: int, index: Tensor) -> Puzzles:
        """The puzzles ``index`` [B] int64, not negative, of a set, on the device of ``index``."""

    first_token = COLOR  # what the number 0 of a grid becomes

    def to_tokens(self, grid: np.ndarray) -> Tensor:
        """Tokens [S] of a grid of numbers, here of exactly height x width.

        Raises:
            ValueError: for a grid of another size, or a number without a token.
        """
        height, width = self.shape.height, self.shape.width
        if grid.shape != (height, width):
            raise ValueError(
                f"the grid has {grid.shape[0]} x {grid.shape[1]} cells, but puzzles are {height} x {width}"
            )
        largest = self.shape.vocabulary - self.first_token - 1
        if grid.max() > largest:
            raise ValueError(f"the grid has a {grid.max()}, but the largest number of these puzzles is {largest}")
        return torch.from_numpy(grid.astype(np.int64)).flatten() + self.first_token

    def to_grid(self, tokens: Tensor) -> list[list[int]]:
        """The grid of numbers that tokens [S] stand for; -1 for a token that is no number."""
        grid = (tokens - self.first_token).clamp(min=-1).view(self.shape.height, self.shape.width)
        return grid.tolist()

    def count(self, split: str) -> int | None:
        """Number of puzzles of a set; None: endless."""
        return None

    def draw(self, split: str, seed: int, index: Tensor) -> Puzzles:
        """As `sample`, and padding where the index is negative."""
        puzzles = self.sample(split, seed, index.clamp(min=0))
        return puzzles._replace(labels=puzzles.labels.masked_fill((index < 0)[:, None], IGNORED))
