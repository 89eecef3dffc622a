"""A user's own data: rows of a map-style DataLoader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from rtrl_moe_pl.data import Batch


def collate(rows: list[tuple[Tensor]]) -> Batch:
    inputs = torch.stack([row for (row,) in rows])  # [B, T, 3]
    starts = torch.zeros(inputs.shape[:2], dtype=torch.bool)
    starts[:, 0] = True
    labels = (inputs[..., 0].cumsum(1) > 0).long()
    return Batch(inputs, (labels, torch.ones(labels.shape)), starts)


class Rows(LightningDataModule):
    """24 sequences of 6 steps, 4 to a batch."""

    input_size, output_size = 3, 2

    def train_dataloader(self) -> DataLoader:
        rows = torch.randn(24, 6, 3, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(rows), batch_size=4, collate_fn=collate)

    def val_dataloader(self) -> DataLoader:
        return self.train_dataloader()


class Seen(Callback):
    """Writes down, per rank, the first number of every row that is trained on."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        with Path(f"seen_{trainer.global_rank}.txt").open("a") as file:
            file.writelines(f"{value}\n" for value in batch.inputs[:, 0, 0].tolist())
