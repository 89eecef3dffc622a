"""A killed and resumed Trainer run sees the batches that an unbroken run sees."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from rtrl_moe_pl.data import AnBnDataModule, Batch

EPOCHS = 3
# A resumed run saves under another folder, and the next one into the same: intended.
pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:Checkpoint directory")


class Digest(LightningModule):
    """Records the whole batch at each step, and learns nothing."""

    def __init__(self, asks_for_total_steps: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.asks_for_total_steps = asks_for_total_steps
        self.seen: list[bytes] = []

    def training_step(self, batch: Batch) -> torch.Tensor:
        parts = [batch.inputs, *batch.targets, batch.starts]
        self.seen.append(b"".join(part.numpy().tobytes() for part in parts))
        return self.weight * batch.targets[1].sum()

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        pass

    def configure_optimizers(self) -> Any:
        if self.asks_for_total_steps:  # makes Lightning drop the loader's own state on resuming
            assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), 0.0)


class AfterValidation(ModelCheckpoint):
    """Lightning wants another class where only save_on_train_epoch_end differs."""


def run(folder: Path, checkpoint: Path | None = None, asks: bool = False, data: dict | None = None, **options):
    """Train, keeping the checkpoints of every step and every epoch's end; returns what was seen."""
    trainer = Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
        callbacks=[
            ModelCheckpoint(folder / "step", "{step}", every_n_train_steps=1, save_top_k=-1),
            ModelCheckpoint(folder / "epoch", "{step}", save_top_k=-1, save_on_train_epoch_end=True),
            AfterValidation(folder / "validated", "{step}", save_top_k=-1, save_on_train_epoch_end=False),
        ],
        **options,
    )
    layout: dict[str, Any] = {"batch_size": 3, "batches_per_epoch": 4, "validation_size": 4, **(data or {})}
    digest = Digest(asks)
    trainer.fit(digest, datamodule=AnBnDataModule(**layout), ckpt_path=checkpoint)
    return digest.seen


def steps_of(path: Path) -> int:
    return int(path.stem.removeprefix("step="))


@pytest.mark.parametrize(
    ("asks", "data", "options"),
    [
        (False, {}, {}),
        (True, {}, {}),
        (False, {"layout": "sequences"}, {}),
        (False, {"steps_per_batch": 9}, {"limit_train_batches": 3}),  # epochs shorter than the loader
        (True, {"steps_per_batch": 9}, {"limit_train_batches": 3}),
        (False, {"steps_per_batch": 9}, {"val_check_interval": 2}),
        (False, {"steps_per_batch": 9}, {"reload_dataloaders_every_n_epochs": 1}),
    ],
    ids=["stream", "total-steps", "sequences", "limited", "limited-total-steps", "validated-inside", "reloaded"],
)
def test_resumed_run_equals_unbroken_run(tmp_path: Path, asks: bool, data: dict, options: dict):
    unbroken = run(tmp_path, None, asks, data, **options)
    per_epoch = options.get("limit_train_batches", 4)
    total = EPOCHS * per_epoch
    assert len(unbroken) == len(set(unbroken)) == total
    checkpoints = sorted(tmp_path.glob("*/*.ckpt"))
    in_epoch = {steps_of(path) % per_epoch for path in checkpoints}
    assert in_epoch == set(range(per_epoch))  # in mid-epoch and at its end
    assert {path.parent.name for path in checkpoints} == {"step", "epoch", "validated"}
    for path in checkpoints:
        if steps_of(path) < total:
            resumed = run(tmp_path / "resumed", path, asks, data, **options)
            assert resumed == unbroken[steps_of(path) :], path


def test_without_the_saved_position_the_runs_differ(tmp_path: Path):
    """Negative control: the comparison sees a stream that starts over."""
    unbroken = run(tmp_path)
    state = torch.load(tmp_path / "step" / "step=6.ckpt", weights_only=True)  # plain types only
    del state["AnBnDataModule"]
    del state["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    torch.save(state, tmp_path / "stripped.ckpt")
    resumed = run(tmp_path / "resumed", tmp_path / "stripped.ckpt")
    assert resumed != unbroken[6:]
    assert resumed == unbroken[: len(resumed)]


def test_a_changed_stream_starts_over_with_a_warning(tmp_path: Path):
    run(tmp_path)
    with pytest.warns(UserWarning, match="training data have changed since the checkpoint"):
        resumed = run(tmp_path / "resumed", tmp_path / "step" / "step=6.ckpt", data={"seed": 1})
    fresh = run(tmp_path / "fresh", data={"seed": 1})
    assert resumed == fresh[: len(resumed)]


def test_a_second_fit_starts_the_stream_anew(tmp_path: Path):
    module = AnBnDataModule(batch_size=3, batches_per_epoch=4, validation_size=4)
    seen = []
    for _ in range(2):
        digest = Digest(False)
        trainer = Trainer(
            max_epochs=2,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(digest, datamodule=module)
        seen.append(digest.seen)
    assert len(seen[0]) == 8
    assert seen[0] == seen[1]
