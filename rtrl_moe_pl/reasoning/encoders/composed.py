"""Encoders that make one vector per demonstration, by a trunk, and a prefix of the set of these, by a head."""

from __future__ import annotations

from torch import Tensor

from rtrl_moe_pl.reasoning.encoders.base import Encoder, Encoding
from rtrl_moe_pl.reasoning.encoders.heads import Head, LatentHead, QueryHead, VariationalHead
from rtrl_moe_pl.reasoning.encoders.trunks import CLSTrunk, PooledTrunk
from rtrl_moe_pl.tasks.puzzles import Puzzles, PuzzleShape


class _ComposedEncoder(Encoder):
    """A trunk, then a head. The order of demonstrations does not matter.

    Cost: the trunk's blocks over 2 S tokens per real demonstration; the head's is small beside it.
    """

    def __init__(self, shape: PuzzleShape, width: int, prefix: int, trunk: PooledTrunk | CLSTrunk, head: Head) -> None:
        super().__init__(shape, width, prefix)
        self.trunk, self.head = trunk, head

    @staticmethod
    def _head(width: int, prefix: int, heads: int, expansion: float) -> Head:
        return QueryHead(width, prefix, heads, expansion)

    @property
    def noise_size(self) -> int:
        return self.head.noise_size

    def forward(self, puzzles: Puzzles, noise: Tensor | None = None, state: Tensor | None = None) -> Encoding:
        mask = puzzles.demo_mask
        return self.head(self.trunk(puzzles.demo_inputs[mask], puzzles.demo_labels[mask]), mask, noise)


class StandardEncoder(_ComposedEncoder):
    """Demonstrations are pooled to a vector each; learned queries attend to these.

    Args:
        shape, width, prefix: see `Encoder`; given by the module.
        layers: post-norm blocks over a demonstration's cells before and after.
        heads: of every attention.
        pool: of tokens to a vector: "mean", "attention" of a learned query, or "weighted" by a learned score.
        expansion: of the SwiGLU layers.

    Raises:
        TypeError, ValueError: for options out of range, naming the option.
    """

    def __init__(
        self,
        shape: PuzzleShape,
        width: int,
        prefix: int,
        layers: int = 2,
        heads: int = 4,
        pool: str = "mean",
        expansion: float = 4.0,
    ) -> None:
        trunk = PooledTrunk(shape, width, layers, heads, expansion, pool)
        super().__init__(shape, width, prefix, trunk, self._head(width, prefix, heads, expansion))


class HybridEncoder(_ComposedEncoder):
    """A deep pre-norm encoder with a CLS token makes the demonstrations' vectors; learned queries attend to these.

    Args:
        shape, width, prefix, heads, expansion: see `StandardEncoder`.
        layers: pre-norm blocks.
    """

    def __init__(
        self, shape: PuzzleShape, width: int, prefix: int, layers: int = 4, heads: int = 4, expansion: float = 4.0
    ) -> None:
        trunk = CLSTrunk(shape, width, layers, heads, expansion)
        super().__init__(shape, width, prefix, trunk, self._head(width, prefix, heads, expansion))


class VariationalEncoder(StandardEncoder):
    """As `StandardEncoder`, but the mean over demonstrations gives a normal posterior; its sample, the prefix.

    z = mu + exp(logvar / 2) noise has size D; without noise z = mu.

    Args:
        shape, width, prefix, layers, heads, pool, expansion: see `StandardEncoder`.

    References: Kingma & Welling 2014, arXiv 1312.6114.
    """

    @staticmethod
    def _head(width: int, prefix: int, heads: int, expansion: float) -> Head:
        return VariationalHead(width, prefix)


class HybridVariationalEncoder(HybridEncoder):
    """`VariationalEncoder` behind the deep encoder of `HybridEncoder`.

    Args:
        shape, width, prefix, layers, heads, expansion: see `HybridEncoder`.
    """

    _head = staticmethod(VariationalEncoder._head)


class LPNEncoder(_ComposedEncoder):
    """Latent Program Network: each demonstration gives a small latent, and their mean is the program.

    Args:
        shape, width, prefix, layers, heads, expansion: see `HybridEncoder`.
        latent_size: numbers that all of a rule must go through.
        variational: each demonstration gives a normal posterior, and a sample of it with noise of its own.

    References: Bonnet & Macfarlane 2024, arXiv 2411.08706.
    """

    def __init__(
        self,
        shape: PuzzleShape,
        width: int,
        prefix: int,
        layers: int = 2,
        heads: int = 4,
        latent_size: int = 32,
        variational: bool = False,
        expansion: float = 4.0,
    ) -> None:
        trunk = CLSTrunk(shape, width, layers, heads, expansion)
        head = LatentHead(width, prefix, latent_size, variational, shape.max_demos)
        super().__init__(shape, width, prefix, trunk, head)
