"""What is done to each demonstration alone: N real demonstrations in, N vectors (or sequences of tokens) out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rtrl_moe_pl.cells.base import at_least
from rtrl_moe_pl.reasoning.layers import Attention, Block, CrossAttention, SwiGLU, linear, rms_norm, truncated_normal_
from rtrl_moe_pl.tasks.base import one_of
from rtrl_moe_pl.tasks.puzzles import PuzzleShape


def to_slots(x: Tensor, mask: Tensor) -> Tensor:
    """Rows of real demonstrations [N, ..] back to their slots, [B, K, ..]; zero where ``mask`` [B, K] is false."""
    where = mask.view(*mask.shape, *[1] * (x.dim() - 1))
    return x.new_zeros(*mask.shape, *x.shape[1:]).masked_scatter(where, x)


class DemoTokens(nn.Module):
    """Embeddings of the cells before and after, each with the position of its cell.

    Args:
        paired: one token per cell, the sum of before and after (T = S), instead of one for each (T = 2 S).

    Raises:
        ValueError: if puzzles come without demonstrations.
    """

    def __init__(self, shape: PuzzleShape, width: int, paired: bool = False) -> None:
        super().__init__()
        if shape.max_demos < 1:
            raise ValueError(
                "the data have no demonstrations to encode (nor have SudokuDataModule and MazeDataModule): use "
                "PuzzleEmbedding"
            )
        self.paired = paired
        self.before = nn.Embedding(shape.vocabulary, width)
        self.after = nn.Embedding(shape.vocabulary, width)
        self.position = nn.Parameter(torch.empty(shape.cells, width))
        for tensor in (self.before.weight, self.after.weight, self.position):
            truncated_normal_(tensor, 1.0)

    def forward(self, before: Tensor, after: Tensor) -> Tensor:  # [N, S], [N, S] -> [N, T, D]
        x, y = self.before(before), self.after(after)
        return rms_norm(x + y + self.position if self.paired else torch.cat([x + self.position, y + self.position], 1))


class TokenTrunk(nn.Module):
    """Post-norm blocks over the `DemoTokens` of a demonstration; nothing is pooled."""

    def __init__(
        self, shape: PuzzleShape, width: int, layers: int, heads: int, expansion: float, paired: bool = False
    ) -> None:
        super().__init__()
        self.tokens = DemoTokens(shape, width, paired)
        self.blocks = nn.ModuleList(
            Block(width, Attention(width, heads), expansion) for _ in range(at_least(0, "layers", layers))
        )

    def forward(self, before: Tensor, after: Tensor) -> Tensor:  # [N, S], [N, S] -> [N, T, D]
        x = self.tokens(before, after)
        for block in self.blocks:
            x = block(x)
        return x


class PooledTrunk(nn.Module):
    """A `TokenTrunk`, and its tokens pooled to one vector of root mean square 1.

    Args:
        pool: "mean"; "attention": of one learned query; "weighted": mean with the softmax of a linear score.
    """

    def __init__(self, shape: PuzzleShape, width: int, layers: int, heads: int, expansion: float, pool: str) -> None:
        super().__init__()
        self.pool = one_of(("mean", "attention", "weighted"), "pool", pool)
        self.trunk = TokenTrunk(shape, width, at_least(1, "layers", layers), heads, expansion)
        if pool == "attention":
            self.query = nn.Parameter(truncated_normal_(torch.empty(1, width), 1.0))
            self.read = CrossAttention(width, heads)
        elif pool == "weighted":
            self.score = linear(width, 1)

    def forward(self, before: Tensor, after: Tensor) -> Tensor:  # [N, S], [N, S] -> [N, D]
        x = self.trunk(before, after)
        if self.pool == "attention":
            x = self.read(self.query.expand(len(x), -1, -1), x)[:, 0]
        elif self.pool == "weighted":
            x = (self.score(x).softmax(1) * x).sum(1)
        else:
            x = x.mean(1)
        return rms_norm(x)


class PreNormBlock(nn.Module):
    """Normalise, mix over positions, add; normalise, mix over channels, add: for deep stacks."""

    def __init__(self, width: int, mixer: nn.Module, expansion: float) -> None:
        super().__init__()
        self.mixer = mixer
        self.mlp = SwiGLU(width, expansion)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, D] -> [B, T, D]
        x = x + self.mixer(rms_norm(x))
        return x + self.mlp(rms_norm(x))


class CLSTrunk(nn.Module):
    """Pre-norm blocks over a learned CLS token and the tokens of a demonstration; CLS is its vector."""

    def __init__(self, shape: PuzzleShape, width: int, layers: int, heads: int, expansion: float) -> None:
        super().__init__()
        self.tokens = DemoTokens(shape, width)
        self.cls = nn.Parameter(truncated_normal_(torch.empty(1, width), 1.0))
        self.blocks = nn.ModuleList(
            PreNormBlock(width, Attention(width, heads), expansion) for _ in range(at_least(1, "layers", layers))
        )

    def forward(self, before: Tensor, after: Tensor) -> Tensor:  # [N, S], [N, S] -> [N, D]
        x = torch.cat([self.cls.expand(len(before), -1, -1), self.tokens(before, after)], 1)
        for block in self.blocks:
            x = block(x)
        return rms_norm(x[:, 0])
