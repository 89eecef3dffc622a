"""How well puzzles are solved, by every way of deciding when to stop thinking."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics import Metric

from rtrl_moe_pl.reasoning.etrm import Thoughts
from rtrl_moe_pl.reasoning.losses import cell_accuracy, correct_rows
from rtrl_moe_pl.tasks.puzzles import IGNORED


class Curves(NamedTuple):
    """By supervision step, over all processes."""

    exact_accuracy: Tensor  # [N] float64, of the answer at each step
    halted: Tensor  # [max_steps] int64, how many puzzles halt at each step


class PuzzleMetrics(Metric):
    """Accuracies of puzzles that were thought about for N supervision steps; rows of padding count nowhere.

    One pass gives all modes side by side. *q-halt*: the answer at the step at which a lane halts in training (without
    exploration), or at step ``max_steps``. *max steps*: the answer at step ``max_steps``. *best q*: the answer of the
    largest q_halt of all N. *n steps*: the answer at step n.

    Args:
        max_steps: that of halting in training.
        at_steps: the n of "n steps".

    Attributes:
        steps: N, the largest of all these.
    """

    full_state_update = False
    exact_by_step: Tensor
    halted_by_step: Tensor
    sums: Tensor
    count: Tensor

    FIGURES = (
        "exact_accuracy",
        "exact_accuracy_max_steps",
        "exact_accuracy_best_q",
        "accuracy",
        "q_halt_accuracy",
        "q_halt_loss",
    )

    def __init__(self, max_steps: int, at_steps: Sequence[int] = ()) -> None:
        super().__init__()
        self.max_steps, self.at_steps = max_steps, tuple(at_steps)
        self.steps = max(max_steps, *self.at_steps, 1)
        self.add_state("exact_by_step", torch.zeros(self.steps, dtype=torch.float64), "sum")
        self.add_state("halted_by_step", torch.zeros(max_steps, dtype=torch.float64), "sum")
        self.add_state("sums", torch.zeros(len(self.FIGURES), dtype=torch.float64), "sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), "sum")

    def update(self, thoughts: Thoughts, labels: Tensor) -> None:
        """Add B puzzles with labels [B, S]."""
        valid = (labels != IGNORED).any(-1)
        exact = correct_rows(thoughts.predictions, labels)  # [N, B]
        halted = thoughts.halted_at(self.max_steps)
        right = cell_accuracy(thoughts.at(halted), labels)

        def at(step: Tensor) -> Tensor:
            return exact.gather(0, step[None])[0]

        q, found = thoughts.confidence(halted), at(halted)
        loss = functional.binary_cross_entropy_with_logits(q, found.to(q.dtype), reduction="none")
        ways = (found, exact[self.max_steps - 1], at(thoughts.surest()))
        by_figure = (*ways, right, (q >= 0) == found, loss)
        self.sums += torch.stack([(figure * valid).double().sum() for figure in by_figure])
        self.exact_by_step += exact.double().sum(1)
        self.halted_by_step += torch.bincount(halted[valid], minlength=self.max_steps)
        self.count += valid.sum()

    def compute(self) -> dict[str, Tensor]:
        """Figures by name, means over puzzles; ``steps`` is the mean number of steps under q-halt."""
        count = self.count.clamp(min=1)
        figures = dict(zip(self.FIGURES, self.sums / count, strict=True))
        figures |= {f"exact_accuracy_{n}_steps": self.exact_by_step[n - 1] / count for n in self.at_steps}
        number = torch.arange(1, self.max_steps + 1, device=count.device)
        return figures | {"steps": (self.halted_by_step * number).sum() / count}

    def curves(self) -> Curves:
        """On the CPU. With several processes all must call it."""
        with self.sync_context(should_sync=self._to_sync, should_unsync=self._should_unsync):
            exact = self.exact_by_step / self.count.clamp(min=1)
            return Curves(exact.cpu(), self.halted_by_step.round().long().cpu())
