"""Losses of a supervision step: the answer, and whether to halt."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from rtrl_moe_pl.cells.base import not_negative
from rtrl_moe_pl.reasoning.trm import Answer
from rtrl_moe_pl.tasks.base import one_of
from rtrl_moe_pl.tasks.puzzles import IGNORED


class StepLoss(NamedTuple):
    """Losses of each row, [B], zero in rows of padding; not averaged over rows anywhere here."""

    answer: Tensor  # mean over the row's asked cells
    halt: Tensor  # of q_halt
    go_on: Tensor | None  # of q_continue; None: it is not trained
    accuracy: Tensor  # share of the row's asked cells that are right
    correct: Tensor  # bool: every asked cell is right, and there is one

    def total(self, halt_weight: float) -> Tensor:
        """Summed over rows, 0-dim."""
        halting = self.halt if self.go_on is None else self.halt + self.go_on
        return (self.answer + halt_weight * halting).sum()


def log_stablemax(logits: Tensor) -> Tensor:
    """log s(x) / sum s(x) over the last axis, s(x) = x + 1 for x >= 0 and 1 / (1 - x) below.

    Computed in float64, as its gradients need.

    References: Prieto et al. 2025, arXiv 2501.04697.
    """
    x = logits.double()
    log_s = torch.where(x >= 0, torch.log1p(x.clamp(min=0)), -torch.log1p(-x.clamp(max=0)))
    return log_s - torch.logsumexp(log_s, -1, keepdim=True)


def correct_rows(predictions: Tensor, labels: Tensor) -> Tensor:
    """[.., B] bool: rows in which every asked cell is right; rows without an asked cell are padding, and not right."""
    asked = labels != IGNORED
    return ((predictions == labels) | ~asked).all(-1) & asked.any(-1)


def cell_accuracy(predictions: Tensor, labels: Tensor) -> Tensor:
    """[B]: the share of each row's asked cells that are right; 0 for padding."""
    asked = labels != IGNORED
    return ((predictions == labels) & asked).sum(-1) / asked.sum(-1).clamp(min=1)


class ReasoningLoss(nn.Module):
    """Cross-entropy of the answer, and binary cross-entropy of q_halt against "this answer is right".

    Per row: mean over its asked cells of the cross-entropy + halt_weight x (halt loss). Summed over rows: the module
    that updates divides by the number of rows that are puzzles, over all processes.

    Args:
        cross_entropy: "stablemax" or "softmax".
        halt_weight: of the halt loss.
    """

    def __init__(self, cross_entropy: str = "stablemax", halt_weight: float = 0.5) -> None:
        super().__init__()
        self.cross_entropy = one_of(("stablemax", "softmax"), "cross_entropy", cross_entropy)
        self.halt_weight = not_negative("halt_weight", halt_weight)

    def forward(self, answer: Answer, labels: Tensor, go_on_target: Tensor | None = None) -> StepLoss:
        """Losses of an answer.

        Args:
            answer: logits [B, S, V], halt [B], go_on [B].
            labels: [B, S], those of the puzzles that were answered.
            go_on_target: [B] in 0..1, what q_continue should be; None: it is not trained.
        """
        asked = labels != IGNORED
        valid = asked.any(-1)
        log = log_stablemax(answer.logits) if self.cross_entropy == "stablemax" else answer.logits.log_softmax(-1)
        nll = -log.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * asked
        per_row = (nll.sum(-1) / asked.sum(-1).clamp(min=1)).to(answer.logits.dtype)
        predictions = answer.logits.argmax(-1)
        correct = correct_rows(predictions, labels)
        halt = functional.binary_cross_entropy_with_logits(answer.halt, correct.to(answer.halt.dtype), reduction="none")
        go_on = None
        if go_on_target is not None:
            go_on = valid * functional.binary_cross_entropy_with_logits(answer.go_on, go_on_target, reduction="none")
        return StepLoss(per_row, halt * valid, go_on, cell_accuracy(predictions, labels), correct)
