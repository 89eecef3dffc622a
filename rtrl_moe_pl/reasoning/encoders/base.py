"""What an encoder is: it turns demonstrations into the prefix of a recursive model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from rtrl_moe_pl.tasks.puzzles import Puzzles, PuzzleShape


class Encoding(NamedTuple):
    """What an encoder made of B puzzles."""

    context: Tensor  # [B, prefix, D]
    kl: Tensor | None = None  # [B] divergence from the prior, summed over latent dimensions; None: not variational
    state: Tensor | None = None  # [B, ..] to be given back at the puzzle's next step; None: not recurrent


class Encoder(nn.Module, ABC):
    """Demonstrations to context. Rows are treated alone; demonstrations that are not there are never looked at.

    Args:
        shape: sizes of the puzzles.
        width: D of the recursive model.
        prefix: positions of its prefix.
    """

    def __init__(self, shape: PuzzleShape, width: int, prefix: int) -> None:
        super().__init__()
        self.shape, self.width, self.prefix = shape, width, prefix

    @abstractmethod
    def forward(self, puzzles: Puzzles, noise: Tensor | None = None, state: Tensor | None = None) -> Encoding:
        """Encode B puzzles.

        Args:
            puzzles: whose demonstrations and identity may be used; the query and its answer may not.
            noise: [B, noise_size] standard normal, for encoders that sample; None: their mean.
            state: what was returned at the puzzles' last step, zero at their first; None: zero everywhere.
        """

    recurrent: ClassVar[bool] = False  # whether it returns a state

    def architecture(self) -> dict[str, Any]:
        """What a checkpoint must agree on though no tensor's shape tells it: heads and ways of pooling."""
        options = ((name, getattr(m, name, None)) for m in self.modules() for name in ("heads", "pool"))
        return {name: value for name, value in options if value is not None}

    @property
    def noise_size(self) -> int:
        """Standard normal numbers wanted per row; 0 where nothing is sampled."""
        return 0
