"""What can happen to one process of several."""

from __future__ import annotations

import os
import signal
import time
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback


class Fault(Callback):
    """At the third batch of one rank: it raises, is killed, or (with another rank's fault beside it) never goes on."""

    def __init__(self, rank: int, what: Literal["raise", "kill", "stall"]) -> None:
        self.rank, self.what = rank, what

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == self.rank and batch_idx == 2:
            if self.what == "raise":
                raise ValueError(f"the data of rank {self.rank} cannot be read")
            if self.what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(1000)
