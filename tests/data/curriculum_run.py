"""A module that learns nothing and says when validation was good, to try a curriculum with."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from rtrl_moe_pl.data import Batch, HaystackDataModule


class Scripted(LightningModule):
    """Says that validation was all right after certain steps, and records what it is given; learns nothing."""

    def __init__(self, good: set[int], figure: str = "val/accuracy") -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.good = good
        self.figure = figure
        self.seen: list[bytes] = []
        self.lengths: list[int] = []  # trained at
        self.starts: list[torch.Tensor] = []  # of column 0
        self.validated: list[tuple[int, int, bytes]] = []  # step, length, content
        self.tested: list[int] = []

    def length(self) -> int:
        return self.trainer.datamodule.training_task.max_length  # type: ignore[union-attr]

    def training_step(self, batch: Batch) -> torch.Tensor:
        self.seen.append(b"".join(part.numpy().tobytes() for part in (batch.inputs, *batch.targets, batch.starts)))
        self.lengths.append(self.length())
        self.starts.append(batch.starts[:, 0])
        return self.weight * batch.targets[1].sum()

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        figure = self.figure if dataloader_idx == 0 else f"{self.figure}_{dataloader_idx}"
        self.log(figure, float(self.trainer.global_step in self.good), add_dataloader_idx=False)
        if not self.trainer.sanity_checking:
            self.validated.append((self.trainer.global_step, self.length(), batch.inputs.numpy().tobytes()))

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.tested.append(batch.inputs.shape[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.0)


def haystack(**options: Any) -> HaystackDataModule:
    defaults: dict[str, Any] = {
        "length": 32,
        "min_gap": 5,
        "curriculum": [8, 16],
        "batch_size": 3,
        "steps_per_batch": 6,
        "batches_per_epoch": 4,
        "validation_size": 4,
        "validation_scales": [1],
    }
    return HaystackDataModule(**{**defaults, **options})


class AfterValidation(ModelCheckpoint):
    """Lightning wants another class where only save_on_train_epoch_end differs."""


def trainer(folder: Path | None = None, **options: Any) -> Trainer:
    """A Trainer that keeps the checkpoints of every step, every epoch's end and every validation in a folder."""
    callbacks: list[Any] = options.pop("callbacks", [])
    if folder is not None:
        callbacks += [
            ModelCheckpoint(folder / "step", "{step}", every_n_train_steps=1, save_top_k=-1),
            ModelCheckpoint(folder / "epoch", "{step}", save_top_k=-1, save_on_train_epoch_end=True),
            AfterValidation(folder / "validated", "{step}", save_top_k=-1, save_on_train_epoch_end=False),
        ]
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 5,
        "callbacks": callbacks,
    }
    return Trainer(**{**defaults, **options})
