"""Parts of a module that are not trained for a while."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn

from rtrl_moe_pl.cells.base import at_least


class Freeze(Callback):
    """Freezes the parameters whose names begin with ``part`` for the first optimizer steps of a run, or for all.

    Frozen parameters get no gradient and do not decay. Several of these make a schedule; what any of them holds is
    frozen. Parameters that were frozen otherwise stay so, and all others are trained again after the run.

    Args:
        part: beginning of names, such as "decoder" or "encoder".
        steps: optimizer steps, counted from the first of the run or of the run it resumed from; None: to the end.

    Raises:
        ValueError: if ``steps`` is negative, no parameter's name begins so, or nothing is left to train.
    """

    def __init__(self, part: str, steps: int | None = None) -> None:
        self.part = part
        self.steps = steps if steps is None else at_least(0, "steps", steps)
        self._held: list[nn.Parameter] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not any(name.startswith(self.part) for name, _ in pl_module.named_parameters()):
            parts = sorted({name.partition(".")[0] for name, _ in pl_module.named_parameters()})
            raise ValueError(f"Freeze: no parameter's name begins with part={self.part!r}; the parts are {parts}")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.steps is None or trainer.global_step < self.steps:
            for name, parameter in pl_module.named_parameters():
                if name.startswith(self.part) and parameter.requires_grad:
                    parameter.requires_grad_(False)
                    self._held.append(parameter)
            if not any(parameter.requires_grad for parameter in pl_module.parameters()):
                raise ValueError(f"Freeze: with part={self.part!r} every parameter is frozen: leave one to train")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.steps is not None and trainer.global_step >= self.steps:
            self._release()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        for parameter in self._held:
            parameter.requires_grad_(True)
        self._held = []
