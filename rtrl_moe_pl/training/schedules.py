"""Learning rate schedules that a YAML file can name: torch's own need other schedules as arguments for a warm-up."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from rtrl_moe_pl.cells.base import at_least


class Warmup(LambdaLR):
    """A linear warm-up of the learning rate, then a constant one or a cosine down to a fraction of it.

    The optimizer's step t, from 0, has (t + 1) / warmup_steps of the learning rate until that is 1. The cosine starts
    there and reaches its end after total_steps; then the learning rate stays.

    Args:
        optimizer: whose parameter groups are all scaled alike.
        warmup_steps: optimizer steps of the warm-up; 0 for none.
        total_steps: optimizer steps of warm-up and cosine; None for a constant learning rate.
        final_fraction: of the learning rate after total_steps.

    Raises:
        ValueError: if an option is out of its range, or one of total_steps and final_fraction is given alone.
    """

    def __init__(
        self, optimizer: Optimizer, warmup_steps: int, total_steps: int | None = None, final_fraction: float = 1.0
    ) -> None:
        at_least(0, "warmup_steps", warmup_steps)
        if total_steps is not None:
            at_least(warmup_steps + 1, "total_steps (of which warmup_steps are the first)", total_steps)
        if not 0 <= final_fraction <= 1:
            raise ValueError(f"final_fraction must be between 0 and 1, got {final_fraction}")
        if (total_steps is None) != (final_fraction == 1):
            raise ValueError(
                f"total_steps={total_steps} and final_fraction={final_fraction}: a cosine needs total_steps and a "
                "final_fraction below 1, a constant learning rate neither"
            )

        def fraction(step: int) -> float:  # a function: a checkpoint holds no option, so those of the new run count
            if step < warmup_steps:
                return (step + 1) / warmup_steps
            if total_steps is None:
                return 1.0
            progress = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
            return final_fraction + (1 - final_fraction) * (1 + math.cos(math.pi * progress)) / 2

        super().__init__(optimizer, fraction)
