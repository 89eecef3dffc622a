"""One supervision step of a recursive model whose prefix is made from demonstrations, in training and in evaluation."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rtrl_moe_pl.randomness import normal
from rtrl_moe_pl.reasoning.carry import Carry
from rtrl_moe_pl.reasoning.encoders import Encoder, Encoding
from rtrl_moe_pl.reasoning.trm import TRM, Answer
from rtrl_moe_pl.tasks.puzzles import Puzzles

Mode = Literal["re_encode", "fixed_time", "cached"]
_NOISE = 1002  # what a draw is for: see `reasoning.carry`


class Supervision(NamedTuple):
    """What one supervision step of B lanes made."""

    carry: Carry  # with the new states, cut from the graph; halting is not decided yet
    answer: Answer
    context: Tensor  # [B, prefix, D] that was used
    encoding: Encoding  # of the n lanes that were encoded in this step
    encoded: Tensor  # [B] bool: which


def supervise(decoder: TRM, encoder: Encoder, carry: Carry, mode: Mode, seed: int) -> Supervision:
    """Encode demonstrations, think for one supervision step, answer.

    Modes: *re_encode* and *fixed_time* encode all lanes, so that every lane's loss reaches the encoder. *cached*
    encodes a puzzle at its first step only and keeps its context without a graph: the encoder then learns from no
    more than the lanes that have just begun.

    Args:
        carry: lanes that hold a puzzle each, halted ones renewed.
        seed: of the noise, a function of (seed, puzzle, step).
    """
    puzzles, state = carry.puzzles, carry.encoder_state
    if mode == "cached":
        encoded = torch.ones_like(carry.halted) if carry.context is None else carry.steps == 0
        if bool(encoded.any()):
            encoding = encode(encoder, puzzles.rows(encoded), carry.index[encoded], carry.steps[encoded], seed, None)
            context = (
                encoding.context if carry.context is None else carry.context.index_put((encoded,), encoding.context)
            )
        else:
            assert carry.context is not None
            encoding, context = Encoding(carry.context[:0]), carry.context
        carry = replace(carry, context=context.detach())
    else:
        encoded = torch.ones_like(carry.halted)
        encoding = encode(encoder, puzzles, carry.index, carry.steps, seed, state)
        context = encoding.context
        carry = replace(carry, encoder_state=None if encoding.state is None else encoding.state.detach())
    latents, answer = decoder(carry.latents, puzzles.inputs, context)
    carry = replace(carry, latents=latents.detach(), steps=carry.steps + 1)
    return Supervision(carry, answer, context, encoding, encoded)


def encode(
    encoder: Encoder, puzzles: Puzzles, index: Tensor, steps: Tensor, seed: int, state: Tensor | None
) -> Encoding:
    """The encoding of some puzzles in training: variational encoders sample."""
    noise = None
    if encoder.noise_size:
        number = torch.arange(encoder.noise_size, device=index.device)
        noise = normal(seed, _NOISE, index[:, None], steps[:, None], number)
    return encoder(puzzles, noise, state)


class Thoughts(NamedTuple):
    """What N supervision steps say of B puzzles."""

    predictions: Tensor  # [N, B, S] int64
    halt: Tensor  # [N, B] q_halt
    margin: Tensor  # [N, B] by which q_halt is above what it takes to halt: 0, or q_continue

    def rows(self, index: Tensor) -> Thoughts:
        """Those of the puzzles ``index`` [n]."""
        return Thoughts(*(tensor[:, index] for tensor in self))

    def cpu(self) -> Thoughts:
        return Thoughts(*(tensor.cpu() for tensor in self))

    def halted_at(self, max_steps: int) -> Tensor:
        """[B]: the step, from 0, at which each puzzle halts, as in training; at the last allowed one if not before."""
        wants = self.margin[:max_steps] > 0
        wants[-1] = True
        return wants.int().argmax(0)

    def surest(self) -> Tensor:
        """[B]: the step, from 0, of the largest q_halt."""
        return self.halt.argmax(0)

    def at(self, step: Tensor) -> Tensor:
        """Predictions [B, S] of a step [B] per puzzle."""
        return self.predictions.gather(0, step[None, :, None].expand(1, -1, self.predictions.shape[2]))[0]

    def confidence(self, step: Tensor) -> Tensor:
        """q_halt [B] of a step [B] per puzzle."""
        return self.halt.gather(0, step[None])[0]


@torch.no_grad()
def think(decoder: TRM, encoder: Encoder, puzzles: Puzzles, steps: int, q_continue: bool = False) -> Thoughts:
    """Answers of ``steps`` supervision steps, from the initial states on, without sampling."""
    latents, state, context = decoder.initial(len(puzzles.inputs)), None, None
    predictions, halt, margin = [], [], []
    for _ in range(steps):
        if context is None or state is not None:
            context, _, state = encoder(puzzles, None, state)
        latents, answer = decoder(latents, puzzles.inputs, context)
        predictions.append(answer.logits.argmax(-1))
        halt.append(answer.halt)
        margin.append(answer.halt - answer.go_on if q_continue else answer.halt)
    return Thoughts(torch.stack(predictions), torch.stack(halt), torch.stack(margin))
