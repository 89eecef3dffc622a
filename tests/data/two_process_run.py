"""Run by test_two_processes: train on the processes asked for, and write down what each of them saw.

Usage: two_process_run.py FOLDER PROCESSES BATCH_SIZE [CHECKPOINT]
"""

import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from rtrl_moe_pl.data import Batch, DelayedRecallDataModule


class Recorder(LightningModule):
    """Learns nothing, so that gradients need no synchronising."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.seen: dict[str, list[torch.Tensor]] = {"train": [], "validation": [], "weights": []}

    def training_step(self, batch: Batch) -> torch.Tensor:
        self.seen["train"].append(batch.inputs)
        return self.weight * batch.targets[1].sum()

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int) -> None:
        self.seen["validation"].append(batch.inputs)
        self.seen["weights"].append(batch.targets[1].sum())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def main(folder: Path, processes: int, batch_size: int, checkpoint: str | None = None) -> None:
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        logger=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=2,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, "{step}", every_n_train_steps=3, save_top_k=-1)],
    )
    data = DelayedRecallDataModule(
        batch_size=batch_size,
        encoding="ids",
        steps_per_batch=16,
        batches_per_epoch=4,
        validation_size=5,
        validation_batch_size=batch_size,
    )
    recorder = Recorder()
    trainer.fit(recorder, datamodule=data, ckpt_path=checkpoint)
    torch.save(recorder.seen, folder / f"rank_{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
