"""One token per cell of a demonstration: what was there before and after, and where."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rtrl_moe_pl.reasoning.encoders.base import Encoder, Encoding
from rtrl_moe_pl.reasoning.encoders.heads import Reader
from rtrl_moe_pl.reasoning.encoders.trunks import TokenTrunk, to_slots
from rtrl_moe_pl.reasoning.layers import truncated_normal_
from rtrl_moe_pl.reasoning.trm import at_initial_scale
from rtrl_moe_pl.tasks.puzzles import Puzzles, PuzzleShape


class PairTokenEncoder(Encoder):
    """Learned queries read all demonstrations' cells at once; nothing is pooled before.

    A token is embedding(cell before) + embedding(cell after) + position. Blocks of attention run within each
    demonstration; then ``prefix`` queries attend to the tokens of all.

    Args:
        shape, width, prefix: see `Encoder`; given by the module.
        layers: post-norm blocks over a demonstration's tokens; 0: the queries read the pairs themselves, enough where a
            rule treats every cell alone, and then learned sooner.
        heads: of every attention.
        expansion: of the SwiGLU layers.

    Cost: layers blocks over S tokens per real demonstration, and one attention of prefix x K S.
    """

    def __init__(
        self, shape: PuzzleShape, width: int, prefix: int, layers: int = 1, heads: int = 4, expansion: float = 4.0
    ) -> None:
        super().__init__(shape, width, prefix)
        self.trunk = TokenTrunk(shape, width, layers, heads, expansion, paired=True)
        self.queries = nn.Parameter(truncated_normal_(torch.empty(prefix, width), 1.0))
        self.reader = Reader(width, heads, expansion)

    def forward(self, puzzles: Puzzles, noise: Tensor | None = None, state: Tensor | None = None) -> Encoding:
        return Encoding(at_initial_scale(self.read(puzzles, self.queries.expand(len(puzzles.inputs), -1, -1))))

    def read(self, puzzles: Puzzles, queries: Tensor) -> Tensor:
        """What queries [B, prefix, D] are after they have read the demonstrations, of root mean square 1."""
        mask = puzzles.demo_mask
        x = to_slots(self.trunk(puzzles.demo_inputs[mask], puzzles.demo_labels[mask]), mask)  # [B, K, S, D]
        return self.reader(queries, x.flatten(1, 2), mask.repeat_interleave(x.shape[2], 1))
