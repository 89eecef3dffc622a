"""The tiny recursive model: one small network that rewrites a latent and an answer again and again."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from rtrl_moe_pl.cells.base import at_least
from rtrl_moe_pl.reasoning.layers import Attention, Block, PositionMLP, Rotary, linear, rms_norm, truncated_normal_
from rtrl_moe_pl.tasks.base import one_of
from rtrl_moe_pl.tasks.puzzles import PuzzleShape

INITIAL_HALT_BIAS = -5.0


class Latents(NamedTuple):
    """The two inner states, [B, prefix + S, D] each."""

    high: Tensor  # z_H, from which the answer is read
    low: Tensor  # z_L, the scratchpad

    def to(self, device: torch.device) -> Latents:
        return Latents(self.high.to(device), self.low.to(device))

    def detach(self) -> Latents:
        return Latents(self.high.detach(), self.low.detach())


class Answer(NamedTuple):
    """What one supervision step says."""

    logits: Tensor  # [B, S, V]
    halt: Tensor  # [B] q_halt: positive where the answer is believed to be right
    go_on: Tensor  # [B] q_continue


class TRM(nn.Module):
    """Tiny Recursive Model: ``h_cycles`` rounds of ``l_cycles`` + 1 passes through one network.

    A round is: ``l_cycles`` times low <- net(low + high + input), then high <- net(high + low). Gradients pass through
    the last ``grad_cycles`` rounds only. The input is the prefix [B, prefix, D] (a puzzle embedding, or what an encoder
    made of demonstrations) followed by the query's tokens.

    Args:
        shape: sizes of the puzzles; linked to the data on the command line.
        width: D.
        heads: of the attention; D is a multiple of twice this number.
        layers: blocks of the network.
        h_cycles: rounds per supervision step.
        l_cycles: passes over ``low`` per round.
        grad_cycles: rounds, counted from the last, that gradients pass through.
        prefix: positions before the query's.
        mixer: "attention" (with rotary positions), or "mlp" over positions.
        positions: "rotary", or "learned": a learned vector per position is added (and attention is rotary too).
        expansion: of the SwiGLU layers.

    Shapes: inputs [B, S] int64; states [B, prefix + S, D].
    Cost of a step: h_cycles (l_cycles + 1) layers blocks forward, a share grad_cycles / h_cycles of them backward.
    References: Jolicoeur-Martineau 2025, arXiv 2510.04871.
    """

    initial_high: Tensor
    initial_low: Tensor

    def __init__(
        self,
        shape: PuzzleShape,
        width: int = 128,
        heads: int = 4,
        layers: int = 2,
        h_cycles: int = 3,
        l_cycles: int = 6,
        grad_cycles: int = 1,
        prefix: int = 16,
        mixer: str = "attention",
        positions: str = "rotary",
        expansion: float = 4.0,
    ) -> None:
        super().__init__()
        for name, value in (("layers", layers), ("h_cycles", h_cycles), ("l_cycles", l_cycles), ("prefix", prefix)):
            at_least(1, name, value)
        if not 1 <= at_least(1, "grad_cycles", grad_cycles) <= h_cycles:
            raise ValueError(f"grad_cycles must be at most h_cycles={h_cycles}, got {grad_cycles}")
        one_of(("attention", "mlp"), "mixer", mixer)
        one_of(("rotary", "learned"), "positions", positions)
        self.shape, self.width, self.prefix = shape, at_least(1, "width", width), prefix
        self.h_cycles, self.l_cycles, self.grad_cycles = h_cycles, l_cycles, grad_cycles
        self._options = {"heads": heads, "layers": layers, "mixer": mixer, "positions": positions}
        length = prefix + shape.cells
        self.embedding = nn.Embedding(shape.vocabulary, width)
        truncated_normal_(self.embedding.weight, 1 / math.sqrt(width))
        self.position = nn.Parameter(torch.empty(length, width)) if positions == "learned" else None
        if self.position is not None:
            truncated_normal_(self.position, 1 / math.sqrt(width))
        rotary = Rotary(width // max(heads, 1), length) if mixer == "attention" else None

        def mix() -> nn.Module:
            return Attention(width, heads, rotary) if mixer == "attention" else PositionMLP(length, expansion)

        self.blocks = nn.ModuleList(Block(width, mix(), expansion) for _ in range(layers))
        self.answer_head = linear(width, shape.vocabulary)
        self.halt_head = nn.Linear(width, 2)
        nn.init.zeros_(self.halt_head.weight)
        nn.init.constant_(self.halt_head.bias, INITIAL_HALT_BIAS)
        self.register_buffer("initial_high", truncated_normal_(torch.empty(width), 1.0))
        self.register_buffer("initial_low", truncated_normal_(torch.empty(width), 1.0))

    def architecture(self) -> dict[str, Any]:
        """What a checkpoint must agree on though no tensor's shape tells it."""
        cycles = {"h_cycles": self.h_cycles, "l_cycles": self.l_cycles, "prefix": self.prefix}
        return {**cycles, **self._options, "grid_height": self.shape.height, "grid_width": self.shape.width}

    def initial(self, batch_size: int) -> Latents:
        """States of a puzzle that has just begun."""
        size = (batch_size, self.prefix + self.shape.cells, self.width)
        return Latents(self.initial_high.expand(size), self.initial_low.expand(size))

    def forward(self, latents: Latents, inputs: Tensor, context: Tensor) -> tuple[Latents, Answer]:
        """One supervision step.

        Args:
            latents: where it begins.
            inputs: [B, S] int64.
            context: [B, prefix, D].

        Returns:
            the states afterwards, with their graph, and the answer read from them.
        """
        x = self._embed(inputs, context)
        high, low = latents
        with torch.no_grad():
            for _ in range(self.h_cycles - self.grad_cycles):
                high, low = self._round(high, low, x)
        for _ in range(self.grad_cycles):
            high, low = self._round(high, low, x)
        halt, go_on = self.halt_head(high[:, 0]).unbind(-1)
        return Latents(high, low), Answer(self.answer_head(high[:, self.prefix :]), halt, go_on)

    def _embed(self, inputs: Tensor, context: Tensor) -> Tensor:
        x = torch.cat([context, functional.embedding(inputs, self.embedding.weight)], 1)
        if self.position is not None:
            x = math.sqrt(0.5) * (x + self.position)
        return math.sqrt(self.width) * x

    def _round(self, high: Tensor, low: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        given = high + x
        for _ in range(self.l_cycles):
            low = self._net(low + given)
        return self._net(high + low), low

    def _net(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def at_initial_scale(x: Tensor) -> Tensor:
    """Context of root mean square 1 / sqrt(D), the scale of token embeddings, whatever an encoder put out."""
    return rms_norm(x) / math.sqrt(x.shape[-1])
