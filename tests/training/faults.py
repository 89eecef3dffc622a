"""What can happen to one process of several, and what each of them draws."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from rtrl_moe_pl.cells import GRU
from rtrl_moe_pl.training.checkpoints import DurableCheckpointIO


class KilledInstead(DurableCheckpointIO):
    """Is killed when it is to write, after the others have written."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        time.sleep(2)
        os.kill(os.getpid(), signal.SIGKILL)


class Fault(Callback):
    """At a batch of one rank, by default the third, it raises, is killed (there, or at the next checkpoint), is
    told to end (by SIGTERM, at a batch of a validation too), reads NaN, or stalls (beside another rank's fault)."""

    def __init__(
        self, rank: int, what: Literal["raise", "kill", "kill_saving", "terminate", "nan", "stall"], batch: int = 2
    ) -> None:
        self.rank, self.what, self.batch = rank, what, batch

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == self.rank and batch_idx == self.batch:
            if self.what == "raise":
                raise ValueError(f"the data of rank {self.rank} cannot be read")
            if self.what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.what == "kill_saving":
                trainer.strategy.checkpoint_io = KilledInstead()
            elif self.what == "terminate":
                os.kill(os.getpid(), signal.SIGTERM)
            elif self.what == "nan":
                batch.inputs.fill_(float("nan"))
            else:
                time.sleep(1000)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        if self.what == "terminate":
            self.on_train_batch_start(trainer, pl_module, batch, batch_idx)


class Draws(Callback):
    """Writes down, per rank, what a batch would draw from torch's generator."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        state = torch.get_rng_state()
        with Path(f"draws_{trainer.global_rank}.txt").open("a") as file:
            file.write(f"{torch.rand(()).item()}\n")
        torch.set_rng_state(state)


class DropoutGRU(GRU):
    """Draws from torch's generator at every step."""

    def forward(self, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(super().forward(x, s), 0.3, self.training)
