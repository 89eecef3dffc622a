"""What a supervision step says about training: figures to log."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rtrl_moe_pl.modules.figures import Stopwatch
from rtrl_moe_pl.reasoning.etrm import Supervision
from rtrl_moe_pl.reasoning.losses import StepLoss

_PER_ROW = ("loss", "answer_loss", "q_halt_loss", "q_continue_loss", "kl", "gradient_coverage")
_AT_HALT = ("accuracy", "exact_accuracy", "q_halt_accuracy", "steps")


class ReasoningFigures(Stopwatch):
    """Sums over the supervision steps since they were last read: this process's, not those of all ranks.

    Losses and gradient coverage are means over all lanes; accuracies and steps over the puzzles that lanes were done
    with.

    Args:
        max_steps: largest number of supervision steps of a puzzle.
    """

    def __init__(self, max_steps: int) -> None:
        self.max_steps = max_steps
        super().__init__()

    def clear(self) -> None:
        super().clear()
        self._rows: Tensor | float = 0.0  # [loss, .., number of rows]
        self._halts: Tensor | float = 0.0  # [accuracy, .., number of halts]
        self._steps: Tensor | int = 0  # [max_steps], how many halted after 1, 2, .. steps
        self._seen: set[str] = set()  # losses that not every configuration or step has

    def add(self, made: Supervision, loss: StepLoss, total: Tensor, reached: Tensor, halted: Tensor) -> None:
        """Add a step.

        Args:
            made: what the step made.
            loss: of each row.
            total: loss summed over rows.
            reached: how many rows' loss reached the encoder, 0-dim.
            halted: [B] bool, which lanes are done after it.
        """
        valid, steps = made.carry.puzzles.valid, made.carry.steps
        some = {"kl": made.encoding.kl, "q_continue_loss": loss.go_on}
        self._seen |= {name for name, values in some.items() if values is not None}
        sums = {name: total.new_zeros(()) if values is None else values.sum() for name, values in some.items()}
        rows = (total, loss.answer.sum(), loss.halt.sum(), sums["q_continue_loss"], sums["kl"], reached)
        done = halted & valid
        by_row = (loss.accuracy, loss.correct, (made.answer.halt >= 0) == loss.correct, steps)
        with torch.no_grad():
            self._rows = self._rows + torch.stack([*rows, valid.sum()]).double()
            self._halts = self._halts + torch.stack([*((v * done).sum() for v in by_row), done.sum()]).double()
            number = torch.arange(1, self.max_steps + 1, device=steps.device)
            self._steps = self._steps + ((steps[:, None] == number) & done[:, None]).sum(0)

    def read(self) -> tuple[dict[str, float], Tensor]:
        """Figures by tag, and how many puzzles lanes were done with after 1, 2, .. steps, [max_steps]; forgets them.

        Figures that nothing was counted for are missing.
        """
        figures: dict[str, float] = {}
        for names, sums in ((_PER_ROW, self._rows), (_AT_HALT, self._halts)):
            if isinstance(sums, Tensor):
                *values, count = sums.tolist()
                if count:
                    figures |= {f"train/{name}": value / count for name, value in zip(names, values, strict=True)}
        for name in {"kl", "q_continue_loss"} - self._seen:
            figures.pop(f"train/{name}", None)
        steps = self._steps if isinstance(self._steps, Tensor) else torch.zeros(self.max_steps, dtype=torch.int64)
        figures["train/puzzles_per_second"] = int(steps.sum()) / self.elapsed()
        self.clear()
        return figures, steps


@torch.no_grad()
def context_figures(context: Tensor, identity: Tensor) -> dict[str, Any]:
    """Statistics of what an encoder put out: whether it collapses.

    Args:
        context: [B, prefix, D].
        identity: [B], which rule each row follows.

    Returns:
        mean, standard deviation, norm of a row, variance across rows, and variance across the rows of one rule, which
        is as large where the context says nothing of the rule; each a mean over positions and channels.
    """
    flat = context.flatten(1)
    rules, group = identity.unique(return_inverse=True)
    size = torch.bincount(group)
    centre = flat.new_zeros(len(rules), flat.shape[1]).index_add(0, group, flat) / size[:, None]
    freedom = int((size - 1).sum())  # unbiased: most rules have two rows or so
    within = (flat - centre[group]).square().sum() / max(1, freedom) / flat.shape[1]
    return {
        "train/context_mean": flat.mean(),
        "train/context_std": flat.std(),
        "train/context_norm": flat.norm(dim=1).mean(),
        "train/context_cross_sample_variance": flat.var(0, unbiased=len(flat) > 1).mean(),
        "train/context_within_group_variance": within,
    }


@torch.no_grad()
def grad_norms(module: nn.Module, total: float) -> dict[str, Any]:
    """L2 norms of the mean gradient over all ranks, before clipping, of all parameters and of the module's parts.

    Args:
        total: that of all, see `UpdateResult`; what was written to ``p.grad`` may be clipped.
    """
    parts = {
        part: torch.nn.utils.get_total_norm([p.grad for p in child.parameters() if p.grad is not None])
        for part, child in module.named_children()
        if any(p.grad is not None for p in child.parameters())
    }
    scale = total / torch.stack(list(parts.values())).norm().clamp(min=torch.finfo(torch.float32).tiny)
    return {"train/grad_norm": total} | {f"train/{part}_grad_norm": scale * value for part, value in parts.items()}
