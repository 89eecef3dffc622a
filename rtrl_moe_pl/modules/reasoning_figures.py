"""What a supervision step says about training: figures to log."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rtrl_moe_pl.modules.figures import Stopwatch
from rtrl_moe_pl.reasoning.etrm import Supervision
from rtrl_moe_pl.reasoning.losses import StepLoss
from rtrl_moe_pl.training import sum_over_ranks

_PER_ROW = ("loss", "answer_loss", "q_halt_loss", "q_continue_loss", "kl", "gradient_coverage")
_SOMETIMES = ("kl", "q_continue_loss")  # not every configuration or step has them
_AT_HALT = ("accuracy", "exact_accuracy", "q_halt_accuracy", "steps")


class ReasoningFigures(Stopwatch):
    """Sums over the supervision steps since they were last read.

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
        # [loss, .., rows, accuracy, .., halts, how many halted after 1, 2, .. steps]
        self._sums: Tensor | float = 0.0
        self._seen: set[str] = set()  # of _SOMETIMES

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
            number = torch.arange(1, self.max_steps + 1, device=steps.device)
            by_steps = ((steps[:, None] == number) & done[:, None]).sum(0)
            sums = torch.stack([*rows, valid.sum(), *((v * done).sum() for v in by_row), done.sum()])
            self._sums = self._sums + torch.cat([sums.double(), by_steps.double()])

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"sums": self._sums, "seen": sorted(self._seen), "max_steps": self.max_steps}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        if state["max_steps"] == self.max_steps:  # else they count what there no longer is
            super().load_state_dict(state, device)
            self._sums, self._seen = torch.as_tensor(state["sums"], device=device), set(state["seen"])

    def read(self) -> tuple[dict[str, float], Tensor]:
        """Figures by tag, and how many puzzles lanes were done with after 1, 2, .. steps, [max_steps]; forgets them.

        Both are of all ranks, which must read at the same batches: one collective. Figures that nothing was counted
        for are missing.
        """
        assert isinstance(self._sums, Tensor), "read comes after add"
        speed = self._sums[-self.max_steps :].sum() / self.elapsed()
        own = torch.cat([self._sums, speed[None], self._sums.new_tensor([name in self._seen for name in _SOMETIMES])])
        sizes = [len(_PER_ROW) + 1, len(_AT_HALT) + 1, self.max_steps, 1, len(_SOMETIMES)]
        *sums, steps, speed, seen = sum_over_ranks(own).split(sizes)
        figures: dict[str, float] = {"train/puzzles_per_second": float(speed)}
        for names, part in zip((_PER_ROW, _AT_HALT), sums, strict=True):
            *values, count = part.tolist()
            if count:
                figures |= {f"train/{name}": value / count for name, value in zip(names, values, strict=True)}
        for name, ranks in zip(_SOMETIMES, seen.tolist(), strict=True):
            if not ranks:
                figures.pop(f"train/{name}", None)
        self.clear()
        return figures, steps.long()


@torch.no_grad()
def context_figures(context: Tensor, identity: Tensor) -> dict[str, Any]:
    """Statistics of what an encoder put out: whether it collapses.

    Args:
        context: [B, prefix, D], or [ranks, B, prefix, D]: the lanes of all ranks are one group.
        identity: [B] or [ranks, B], which rule each row follows.

    Returns:
        mean, standard deviation, norm of a row, variance across rows, and variance across the rows of one rule, which
        is as large where the context says nothing of the rule; each a mean over positions and channels.
    """
    flat = context.flatten(-2).flatten(0, -2)
    rules, group = identity.flatten().unique(return_inverse=True)
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
