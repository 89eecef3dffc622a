"""A recurrent encoder: every supervision step reads the demonstrations once more."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from rtrl_moe_pl.reasoning.encoders.base import Encoding
from rtrl_moe_pl.reasoning.encoders.pair_token import PairTokenEncoder
from rtrl_moe_pl.reasoning.trm import at_initial_scale
from rtrl_moe_pl.tasks.puzzles import Puzzles


class IterativeEncoder(PairTokenEncoder):
    """A `PairTokenEncoder` whose queries are what its last call made of them: once per call they read again.

    That is the ``state``, held as the difference from the learned queries: a state of zeros begins anew. Gradients
    pass through a state that has a graph; whoever keeps it detaches it, and every parameter still gets a gradient in
    every call.

    Shapes: state [B, prefix, D].
    Cost: see `PairTokenEncoder`.
    """

    recurrent: ClassVar[bool] = True

    def forward(self, puzzles: Puzzles, noise: Tensor | None = None, state: Tensor | None = None) -> Encoding:
        queries = self.queries.expand(len(puzzles.inputs), -1, -1)
        memory = self.read(puzzles, queries if state is None else queries + state)
        return Encoding(at_initial_scale(memory), state=memory - self.queries)
