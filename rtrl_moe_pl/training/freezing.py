"""Parts of a module that are not trained for a while."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from rtrl_moe_pl.cells.base import at_least


class Freeze(Callback):
    """Freezes the parameters whose names begin with ``part`` for the first optimizer steps of a run, or for all.

    Frozen parameters get no gradient and do not decay. Several of these make a schedule.

    Args:
        part: beginning of names, such as "decoder" or "encoder".
        steps: optimizer steps, counted from the first of the run or of the run it resumed from; None: to the end.

    Raises:
        ValueError: if ``steps`` is negative, or no parameter's name begins so.
    """

    def __init__(self, part: str, steps: int | None = None) -> None:
        self.part = part
        self.steps = steps if steps is None else at_least(0, "steps", steps)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not any(name.startswith(self.part) for name, _ in pl_module.named_parameters()):
            parts = sorted({name.partition(".")[0] for name, _ in pl_module.named_parameters()})
            raise ValueError(f"Freeze: no parameter's name begins with part={self.part!r}; the parts are {parts}")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._train(pl_module, self.steps is not None and trainer.global_step >= self.steps)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._train(pl_module, True)

    def _train(self, module: LightningModule, trained: bool) -> None:
        for name, parameter in module.named_parameters():
            if name.startswith(self.part):
                parameter.requires_grad_(trained)
