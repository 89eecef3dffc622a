"""What a lane carries from one supervision step to the next, and when it takes up another puzzle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from rtrl_moe_pl.cells.base import at_least
from rtrl_moe_pl.randomness import integers, uniform
from rtrl_moe_pl.reasoning.trm import TRM, Answer, Latents
from rtrl_moe_pl.tasks.puzzles import Puzzles

_EXPLORES, _AT_LEAST = 1000, 1001  # what a draw is for: numbers that no task uses, of the same seed and index


@dataclass(frozen=True)
class Carry:
    """B lanes between two supervision steps; nothing in it has a graph.

    Attributes:
        latents: inner states, [B, prefix + S, D] each.
        steps: [B] int64, supervision steps that the lane's puzzle has had.
        halted: [B] bool, whether the lane is done with its puzzle: it takes up another before the next step.
        index: [B] int64, which puzzle of the training stream the lane holds.
        puzzles: the puzzles themselves.
        context: [B, prefix, D] of the puzzles, where it is cached; None where demonstrations are encoded anew.
        encoder_state: [B, ..] of an encoder that is recurrent; None for others.
    """

    latents: Latents
    steps: Tensor
    halted: Tensor
    index: Tensor
    puzzles: Puzzles
    context: Tensor | None = None
    encoder_state: Tensor | None = None

    @staticmethod
    def first(model: TRM, index: Tensor, puzzles: Puzzles) -> Carry:
        """Lanes that begin with the puzzles ``index`` [B]."""
        zero = torch.zeros_like(index)
        return Carry(model.initial(len(index)), zero, torch.zeros_like(index, dtype=torch.bool), index, puzzles)

    def renew(self, model: TRM, stride: int, draw: Callable[[Tensor], Puzzles]) -> Carry:
        """Lanes that have halted go on to their next puzzle: index + stride, initial states, no steps.

        Only what halted lanes need is drawn; the others keep everything.

        Args:
            stride: number of lanes of all processes.
            draw: makes the puzzles of an index [n].
        """
        rows = self.halted.nonzero()[:, 0]
        if not len(rows):
            return self
        index = self.index.index_add(0, rows, torch.full_like(rows, stride))
        drawn = draw(index[rows])
        puzzles = Puzzles(*(old.index_copy(0, rows, new) for old, new in zip(self.puzzles, drawn, strict=True)))
        reset = self.halted[:, None, None]
        first = model.initial(len(index))
        latents = Latents(*(torch.where(reset, new, old) for new, old in zip(first, self.latents, strict=True)))
        state = self.encoder_state
        if state is not None:
            state = state.masked_fill(self.halted.view(-1, *[1] * (state.dim() - 1)), 0)
        return replace(
            self, latents=latents, steps=self.steps * ~self.halted, index=index, puzzles=puzzles, encoder_state=state
        )

    def state_dict(self) -> dict[str, Any]:
        """Tensors alone, in dicts and lists."""
        state = {field.name: getattr(self, field.name) for field in fields(self)}
        return state | {"latents": list(self.latents), "puzzles": list(self.puzzles)}

    @staticmethod
    def from_state_dict(state: dict[str, Any]) -> Carry:
        return Carry(**{**state, "latents": Latents(*state["latents"]), "puzzles": Puzzles(*state["puzzles"])})

    def to(self, device: torch.device) -> Carry:
        """The same on another device."""

        def moved(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(device)

        rest = {name: moved(getattr(self, name)) for name in ("steps", "halted", "index", "context", "encoder_state")}
        return replace(self, latents=self.latents.to(device), puzzles=self.puzzles.to(device), **rest)


class Halting:
    """When a lane is done with its puzzle.

    In training: after ``max_steps`` supervision steps, or once q_halt is positive (with ``q_continue``: above
    q_continue). With probability ``exploration`` a step may not halt before a number of steps drawn from
    2..max_steps, so that longer thinking is seen too.

    Args:
        max_steps: at least 1.
        exploration: probability, drawn for every lane and step.
        q_continue: train q_continue by Q-learning as well, at the price of one more pass without gradient per step.

    Raises:
        TypeError, ValueError: for options out of range, naming the option.
    """

    def __init__(self, max_steps: int = 16, exploration: float = 0.1, q_continue: bool = False) -> None:
        self.max_steps = at_least(1, "max_steps", max_steps)
        if not 0 <= exploration <= 1:
            raise ValueError(f"exploration must be a probability, got {exploration}")
        self.exploration = exploration
        self.q_continue = q_continue

    def __call__(self, answer: Answer, steps: Tensor, index: Tensor, seed: int) -> Tensor:
        """Which lanes are done, [B] bool.

        Args:
            answer: of this step.
            steps: [B], including this one.
            index: [B], which puzzles; draws are a function of (seed, index, steps).
        """
        wants = answer.halt > (answer.go_on if self.q_continue else 0)
        if self.exploration and self.max_steps > 1:
            explores = uniform(seed, _EXPLORES, index, steps) < self.exploration
            least = integers(seed, _AT_LEAST, index, steps, low=2, high=self.max_steps + 1)
            wants = wants & (steps >= torch.where(explores, least, 0))
        return wants | (steps >= self.max_steps)
