"""What is done to the set of a puzzle's demonstrations: N vectors in, the prefixes of B puzzles out."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from rtrl_moe_pl.cells.base import at_least
from rtrl_moe_pl.reasoning.encoders.base import Encoding
from rtrl_moe_pl.reasoning.encoders.trunks import to_slots
from rtrl_moe_pl.reasoning.layers import Attention, Block, CrossAttention, linear, rms_norm, truncated_normal_
from rtrl_moe_pl.reasoning.trm import at_initial_scale

LOGVAR_LIMIT = 10.0


class Reader(nn.Module):
    """Queries attend to a sequence, then to each other."""

    def __init__(self, width: int, heads: int, expansion: float) -> None:
        super().__init__()
        self.read = CrossAttention(width, heads)
        self.block = Block(width, Attention(width, heads), expansion)

    def forward(self, queries: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        """[B, Q, D], [B, T, D], mask [B, T] bool -> [B, Q, D] of root mean square 1."""
        return self.block(rms_norm(queries + self.read(queries, x, mask)))


class Gaussian(nn.Module):
    """A normal posterior with diagonal covariance, its mean and log variance linear in x; the prior is standard.

    The log variance is cut at +-10.
    """

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.posterior = linear(width, 2 * size)

    def forward(self, x: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [.., D], noise [.., size] (None: the mean is returned) -> sample [.., size], KL [..] summed over size."""
        mu, logvar = self.posterior(x).chunk(2, -1)
        logvar = logvar.clamp(-LOGVAR_LIMIT, LOGVAR_LIMIT)
        kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(-1)
        return mu if noise is None else mu + (logvar / 2).exp() * noise, kl


def mean_over_demos(x: Tensor, mask: Tensor) -> Tensor:
    """[N, ..] of real demonstrations -> [B, ..]; no atomic additions, so the same bits in every run."""
    count = mask.sum(1).view(-1, *[1] * (x.dim() - 1))
    return to_slots(x, mask).sum(1) / count


class Head(nn.Module, ABC):
    """Vectors of real demonstrations to an `Encoding`; ``noise_size`` as in `Encoder`."""

    noise_size: int = 0

    @abstractmethod
    def forward(self, x: Tensor, mask: Tensor, noise: Tensor | None) -> Encoding:
        """x [N, D], mask [B, K] bool with N true, noise [B, noise_size] or None."""


class QueryHead(Head):
    """``prefix`` learned queries attend to the vectors of the puzzle's demonstrations."""

    def __init__(self, width: int, prefix: int, heads: int, expansion: float) -> None:
        super().__init__()
        self.queries = nn.Parameter(truncated_normal_(torch.empty(prefix, width), 1.0))
        self.reader = Reader(width, heads, expansion)

    def forward(self, x: Tensor, mask: Tensor, noise: Tensor | None) -> Encoding:
        queries = self.queries.expand(len(mask), -1, -1)
        return Encoding(at_initial_scale(self.reader(queries, to_slots(x, mask), mask)))


class Decoder(nn.Module):
    """A latent vector to the prefix."""

    def __init__(self, size: int, prefix: int, width: int) -> None:
        super().__init__()
        self.prefix = prefix
        self.linear = linear(size, prefix * width)

    def forward(self, z: Tensor) -> Tensor:  # [B, size] -> [B, prefix, D]
        return at_initial_scale(self.linear(z).unflatten(-1, (self.prefix, -1)))


class VariationalHead(Head):
    """One latent of size D per puzzle, its posterior read from the mean of the demonstrations' vectors."""

    def __init__(self, width: int, prefix: int) -> None:
        super().__init__()
        self.noise_size = width
        self.gaussian = Gaussian(width, width)
        self.decoder = Decoder(width, prefix, width)

    def forward(self, x: Tensor, mask: Tensor, noise: Tensor | None) -> Encoding:
        z, kl = self.gaussian(mean_over_demos(x, mask), noise)
        return Encoding(self.decoder(z), kl)


class LatentHead(Head):
    """One latent per demonstration, sampled or not, and their mean per puzzle; KL: the mean of the demonstrations'.

    Args:
        demos: slots that noise is given for.
    """

    def __init__(self, width: int, prefix: int, latent_size: int, variational: bool, demos: int) -> None:
        super().__init__()
        self.latent_size = at_least(1, "latent_size", latent_size)
        self.noise_size = demos * latent_size if variational else 0
        self.latent = Gaussian(width, latent_size) if variational else linear(width, latent_size)
        self.decoder = Decoder(latent_size, prefix, width)

    def forward(self, x: Tensor, mask: Tensor, noise: Tensor | None) -> Encoding:
        if not isinstance(self.latent, Gaussian):
            return Encoding(self.decoder(mean_over_demos(self.latent(x), mask)))
        if noise is not None:
            noise = noise.unflatten(1, (-1, self.latent_size))[:, : mask.shape[1]][mask]  # [N, latent_size]
        z, kl = self.latent(x, noise)
        return Encoding(self.decoder(mean_over_demos(z, mask)), mean_over_demos(kl, mask))
