"""A resumed run has the epochs, validations and early stopping of an unbroken one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping

from rtrl_moe_pl.training.callbacks import BestCheckpoint
from rtrl_moe_pl.training.last_checkpoint import LastCheckpoint
from tests.modules.helpers import data, module, trainer


class Batches(Callback):
    """Keeps the epoch and the number in it of every batch, and the epochs that began."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []
        self.begun: list[int] = []

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        self.begun.append(trainer.current_epoch)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.seen.append((trainer.current_epoch, batch_idx))


@pytest.mark.parametrize("limit", [{}, {"max_steps": 1000}, {"max_steps": 20, "max_epochs": -1}], ids=str)
@pytest.mark.parametrize("stop", [{"max_epochs": 2}, {"max_steps": 10}, {"max_steps": 7}, {"max_steps": 2}], ids=str)
@pytest.mark.parametrize("after", [False, True])
def test_epochs_are_counted_as_in_an_unbroken_run(
    tmp_path: Path, limit: dict[str, int], stop: dict[str, int], after: bool
) -> None:
    """Whatever ended the run before, at the end of an epoch or within one, and ends this one."""
    batches, run = Batches(), {"max_steps": -1, "max_epochs": 4, **limit}
    before = trainer(tmp_path, **{**run, **stop}, callbacks=[batches, LastCheckpoint()], enable_checkpointing=True)
    before.fit(module(), datamodule=data(steps_per_batch=12))
    saved = tmp_path / "checkpoints" / "last.ckpt"
    if after:
        before.save_checkpoint(saved := tmp_path / "after.ckpt")
    resumed = trainer(tmp_path, **run, callbacks=[batches])
    resumed.fit(module(), datamodule=data(steps_per_batch=12), ckpt_path=str(saved))
    assert batches.seen == [(epoch, batch) for epoch in range(4) for batch in range(5)]
    assert batches.begun == [0, 1, 2, 3]
    assert (resumed.global_step, resumed.current_epoch) == (20, 4)


def test_an_epoch_that_has_not_begun_is_not_counted(tmp_path: Path) -> None:
    class Early(Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            trainer.save_checkpoint(tmp_path / "early.ckpt")

    trainer(tmp_path, callbacks=[Early()]).fit(module(), datamodule=data())
    batches = Batches()
    resumed = trainer(tmp_path, max_steps=-1, max_epochs=2, callbacks=[batches])
    resumed.fit(module(), datamodule=data(), ckpt_path=str(tmp_path / "early.ckpt"))
    assert batches.seen == [(epoch, batch) for epoch in range(2) for batch in range(5)]


class Judge(EarlyStopping):
    """Keeps when it judged."""

    def __init__(self, **options: Any) -> None:
        super().__init__("val/loss", **options)
        self.judged: list[int] = []

    def _run_early_stopping_check(self, trainer) -> None:
        self.judged.append(trainer.global_step)
        super()._run_early_stopping_check(trainer)


def test_early_stopping_judges_validations_alone(tmp_path: Path) -> None:
    """Not an old one at the end of an epoch that max_steps cut short, nor where there is none yet."""
    options = {"limit_val_batches": 1, "max_epochs": 3}
    judge = Judge(patience=9)
    stopped = trainer(tmp_path, **{**options, "max_steps": 7}, callbacks=[judge])
    stopped.fit(module(), datamodule=data(steps_per_batch=12))
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    again = Judge(patience=9)
    trainer(tmp_path, **options, max_steps=-1, callbacks=[again]).fit(
        module(), datamodule=data(steps_per_batch=12), ckpt_path=str(tmp_path / "stopped.ckpt")
    )
    assert (judge.judged, again.judged) == ([5], [10, 15])
    trainer(tmp_path, **options, callbacks=[Judge()]).fit(module(), datamodule=data())


@pytest.mark.parametrize(
    ("criterion", "steps"), [({"patience": 1, "min_delta": 100.0}, 10), ({"stopping_threshold": 100.0}, 5)]
)
def test_a_run_that_stopped_early_stops_again(tmp_path: Path, criterion: dict[str, Any], steps: int) -> None:
    """Until early stopping is left out."""
    options: dict[str, Any] = {"max_epochs": 4, "max_steps": -1, "limit_val_batches": 1}
    made = data(steps_per_batch=12)
    stopped = trainer(tmp_path, **options, callbacks=[Judge(**criterion), LastCheckpoint()], enable_checkpointing=True)
    stopped.fit(module(), datamodule=made)
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    again = trainer(tmp_path, **options, callbacks=[Judge(**criterion)])
    with pytest.warns(UserWarning, match="Judge on val/loss has ended the run that the checkpoint is of"):
        again.fit(module(), datamodule=made, ckpt_path=last)
    assert stopped.global_step == again.global_step == steps
    on = trainer(tmp_path, **options)
    on.fit(module(), datamodule=made, ckpt_path=last)
    assert on.global_step == 20


def test_what_is_saved_every_few_steps_is_saved_after_the_validation(tmp_path: Path) -> None:
    """A run that resumed between a batch and its validation would leave the validation out."""
    best = BestCheckpoint(dirpath=tmp_path / "best", filename="{step}", every_n_train_steps=5, save_top_k=-1)
    options: dict[str, Any] = {"limit_val_batches": 1, "val_check_interval": 2, "enable_checkpointing": True}
    fit = trainer(tmp_path, max_steps=11, callbacks=[best], **options)
    fit.fit(module(), datamodule=data(steps_per_batch=12, batches_per_epoch=10))
    for path in (tmp_path / "best").iterdir():
        progress = torch.load(path, weights_only=True)["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
        assert progress["ready"] % 2 or progress["completed"] == progress["ready"], path
    assert len(list((tmp_path / "best").iterdir())) == 2
