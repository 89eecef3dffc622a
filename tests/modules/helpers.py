"""Small runs of SequenceModule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from rtrl_moe_pl.cells import GRU
from rtrl_moe_pl.data import AnBnDataModule
from rtrl_moe_pl.gradients import RTRL, GradientAlgorithm
from rtrl_moe_pl.modules import SequenceModule


def module(gradient: GradientAlgorithm | None = None, lr: float = 0.01, **options: Any) -> SequenceModule:
    """A GRU of 5 units with the same weights every time."""
    torch.manual_seed(1)
    options.setdefault("optimizer", lambda parameters: torch.optim.Adam(parameters, lr=lr))
    return SequenceModule(GRU(3, 5), 2, gradient or RTRL(window=4), **options)


def data(**options: Any) -> AnBnDataModule:
    defaults: dict[str, Any] = {"batch_size": 3, "steps_per_batch": 6, "batches_per_epoch": 5, "validation_size": 8}
    return AnBnDataModule(n_max=4, **{**defaults, **options})


def trainer(folder: Path, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "log_every_n_steps": 1,
        "max_steps": 6,
    }
    return Trainer(**{**defaults, **options})


class Figures(Callback):
    """Keeps what was logged after every batch, and the gradients that were written."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.grads: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.logged.append({name: float(value) for name, value in trainer.logged_metrics.items()})
        grads = {name: p.grad for name, p in pl_module.named_parameters()}
        self.grads.append({name: grad.clone() for name, grad in grads.items() if grad is not None})
