"""The gradients that a ReasoningModule trains with, without training; and what they leave out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rtrl_moe_pl.cells.base import at_least
from rtrl_moe_pl.data.puzzles import PuzzleStream
from rtrl_moe_pl.gradients import Comparison, compare_gradients
from rtrl_moe_pl.modules.reasoning import ReasoningModule
from rtrl_moe_pl.reasoning.carry import Carry
from rtrl_moe_pl.reasoning.etrm import Supervision, encode


@dataclass(frozen=True)
class ReasoningReport:
    """Gradients of supervision steps, summed.

    Args:
        used: those that training uses, beside another computation of the gradient that it says it uses.
        whole: those that training uses, beside those through all rounds of each step, and through the context of every
            lane. Exact if nothing is cut.
    """

    used: Comparison
    whole: Comparison


class TrialRun:
    """Training steps of a copy of a module, whose weights stay as they are.

    Args:
        model: copied; needs no Trainer.
        stream: the puzzles.

    Attributes:
        model: the copy.
        grads: of the last step, by parameter name.
    """

    def __init__(self, model: ReasoningModule, stream: PuzzleStream) -> None:
        self.model, self.stream, self.grads = copy.deepcopy(model).eval(), stream, dict[str, Tensor]()
        replaced: Any = self.model
        replaced.update_parameters, replaced.logs_now = self._take, lambda: False

    def _take(self, grads: Mapping[str, Tensor], weight: Tensor, diagnose: Callable[[], str | None]) -> None:
        self.grads = dict(grads)

    @property
    def carry(self) -> Carry:
        """What the next step begins with."""
        return self.model._renewed(self.stream)

    def step(self) -> None:
        self.model.training_step(self.stream, 0)


def audit_reasoning(model: ReasoningModule, stream: PuzzleStream, steps: int) -> ReasoningReport:
    """Compare the gradients of a module's first ``steps`` training batches, at fixed weights, in float64.

    Carry and halting are those of training; nothing of them has a graph, so that every step is compared alone. Copies
    are in evaluation mode: with dropout no two runs would be comparable.

    Raises:
        TypeError, ValueError: for ``steps`` that is not an integer of at least 1.
    Cost: about 3 + h_cycles / grad_cycles times that of training, in float64.
    """
    at_least(1, "--steps", steps)
    trial = TrialRun(model, stream)
    trial.model.double()
    parameters = {name: p for name, p in trial.model.named_parameters() if p.requires_grad}
    found, cut, whole = ({name: torch.zeros_like(p) for name, p in parameters.items()} for _ in range(3))
    for _ in range(steps):
        carry = trial.carry
        for total, is_cut in ((cut, True), (whole, False)):
            loss = step_loss(trial.model, carry, stream.seed, is_cut)
            grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
            for name, gradient in zip(parameters, grads, strict=True):
                total[name] += gradient
        trial.step()
        for name in parameters:
            found[name] += trial.grads.get(name, 0)
    decoder = trial.model.decoder
    complete = decoder.grad_cycles == decoder.h_cycles and trial.model.mode != "cached"
    return ReasoningReport(compare_gradients(found, cut, True), compare_gradients(found, whole, complete))


def step_loss(model: ReasoningModule, carry: Carry, seed: int, cut: bool) -> Tensor:
    """Summed loss of a supervision step: one value, of which either the whole graph is kept or what training keeps.

    Args:
        carry: what the step begins with.
        seed: of the puzzles.
        cut: let the first rounds be numbers, and in mode "cached" the context of lanes that have begun before; else
            gradients pass through everything that the step computes.
    """
    puzzles, cached, begins = carry.puzzles, model.mode == "cached", carry.steps == 0
    number = torch.zeros_like(carry.steps) if cached else carry.steps  # a cached context has its first step's noise
    encoding = encode(model.encoder, puzzles, carry.index, number, seed, carry.encoder_state)
    context, latents, decoder = encoding.context, carry.latents, copy.copy(model.decoder)
    if cached and cut:
        context = torch.where(begins[:, None, None], context, context.detach())
    if not cut:
        decoder.grad_cycles = decoder.h_cycles
    elif decoder.h_cycles > decoder.grad_cycles:  # first the rounds before, then a model that has no others
        decoder.h_cycles -= decoder.grad_cycles
        decoder.grad_cycles = min(decoder.grad_cycles, decoder.h_cycles)
        with torch.no_grad():
            latents, _ = decoder(latents, puzzles.inputs, context)
        decoder.h_cycles = decoder.grad_cycles = model.decoder.grad_cycles
    after, answer = decoder(latents, puzzles.inputs, context)
    made = replace(carry, latents=after.detach(), steps=carry.steps + 1)
    target = model._go_on_target(Supervision(made, answer, context.detach(), encoding, begins))
    loss = model.loss(answer, puzzles.labels, target).total(model.loss.halt_weight)
    if encoding.kl is None:
        return loss
    return loss + model.kl_weight * (encoding.kl[begins] if cached else encoding.kl).sum()
