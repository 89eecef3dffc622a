"""The newest states: how many are kept, when they are written, and how a run ends that is told to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from rtrl_moe_pl.cli import main
from rtrl_moe_pl.data import AnBnDataModule
from rtrl_moe_pl.modules import SequenceModule
from rtrl_moe_pl.training.checkpoints import PER_RANK, DurableCheckpointIO, newest_readable
from rtrl_moe_pl.training.last_checkpoint import SIGNALS, Interrupted, LastCheckpoint
from tests.modules.helpers import data, module, trainer
from tests.modules.test_resume import final
from tests.test_cli import CONFIG, ROOT


class At(Callback):
    """Does something at the end of a batch, counted from 1 in this run, or at another hook."""

    def __init__(self, batch: int, action: Any, hook: str = "on_train_batch_end") -> None:
        self.left = batch
        self.action = action
        setattr(self, hook, self._count)

    def _count(self, *_: Any, **__: Any) -> None:
        self.left -= 1
        if self.left == 0:
            self.action()


def tell(number: signal.Signals) -> Any:
    return lambda: os.kill(os.getpid(), number)


def fail(error: Exception | None = None) -> None:
    raise error or RuntimeError("something else")


def fit(folder: Path, *callbacks: Callback, resume: bool = False, **options: Any) -> tuple[Trainer, SequenceModule]:
    """12 steps, 5 an epoch, a validation after 2 and 4 of them."""
    model = module(lr_scheduler=lambda o: torch.optim.lr_scheduler.LinearLR(o))
    options = {"max_steps": 12, "limit_val_batches": 1, "val_check_interval": 2, **options}
    run = trainer(folder, callbacks=list(callbacks), enable_checkpointing=True, **options)
    path = str(newest_readable(folder, resumable=True)) if resume else None
    run.fit(model, datamodule=data(steps_per_batch=12), ckpt_path=path)
    return run, model


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in (folder / "checkpoints").iterdir())


def test_the_newest_few_are_kept_and_last_points_to_the_newest(tmp_path: Path) -> None:
    fit(tmp_path, LastCheckpoint(keep=3))
    assert names(tmp_path) == [*(f"last-step{step}-batch{step}.ckpt" for step in (12, 7, 9)), "last.ckpt"]
    assert os.readlink(tmp_path / "checkpoints" / "last.ckpt") == "last-step12-batch12.ckpt"


def test_the_old_link_stays_until_the_new_one_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed in between has a last.ckpt."""
    there, link = [], os.symlink

    def linked(*arguments: Any, **options: Any) -> None:
        there.append((tmp_path / "checkpoints" / "last.ckpt").exists())
        link(*arguments, **options)

    monkeypatch.setattr(os, "symlink", linked)
    fit(tmp_path, LastCheckpoint(keep=3), max_steps=4)
    assert there == [False, True]


def test_the_clock_saves_too_except_where_a_validation_is_due(tmp_path: Path) -> None:
    """Where one is due it is saved after it, since a run that resumes before it would leave it out."""
    fit(tmp_path, LastCheckpoint(keep=20, minutes=1e-9))
    assert {f"last-step{step}-batch{step}.ckpt" for step in range(1, 13)} | {"last.ckpt"} == set(names(tmp_path))
    states = [torch.load(tmp_path / "checkpoints" / f"last-step{step}-batch{step}.ckpt") for step in (1, 2, 3)]
    validated = [s["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]["total"]["completed"] for s in states]
    assert validated == [0, 3, 3]


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("batch", [3, 4, 5, 6])
def test_a_run_that_is_told_to_stop_goes_on_from_there(tmp_path: Path, batch: int, number: signal.Signals) -> None:
    """In mid-epoch, before a validation, at the end of an epoch, and after it."""
    whole = final(*fit(tmp_path / "unbroken", LastCheckpoint()))
    before = [signal.getsignal(each) for each in SIGNALS]
    name = rf"last-step{batch}-batch{batch}\.ckpt"
    with pytest.raises(Interrupted, match=f"stopped by {number.name} at step {batch}; .*{name}"):
        fit(tmp_path, At(batch, tell(number)), LastCheckpoint())
    assert [signal.getsignal(each) for each in SIGNALS] == before
    resumed = final(*fit(tmp_path, LastCheckpoint(), resume=True))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_a_signal_in_a_validation_waits_for_its_end(tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="at step 2"):
        fit(tmp_path, At(2, tell(signal.SIGTERM), "on_validation_batch_start"), LastCheckpoint())
    assert names(tmp_path) == ["last-step2-batch2.ckpt", "last.ckpt"]
    progress = torch.load(tmp_path / "checkpoints" / "last.ckpt")["loops"]["fit_loop"]
    assert progress["epoch_loop.val_loop.batch_progress"]["total"]["completed"] == 3  # one of every length


def test_a_second_ctrl_c_ends_it_at_once(tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

    with pytest.raises(SystemExit):  # of Lightning, which takes KeyboardInterrupt
        fit(tmp_path, At(3, twice), LastCheckpoint())
    assert names(tmp_path) == ["last-step2-batch2.ckpt", "last.ckpt"]


@pytest.mark.parametrize(("hook", "batch", "saved"), [("on_train_batch_end", 3, 3), ("on_train_batch_start", 4, 2)])
def test_after_an_exception_the_last_whole_batch_is_kept(tmp_path: Path, hook: str, batch: int, saved: int) -> None:
    """One within a batch may have left half an update: there the one before stays."""
    with pytest.raises(RuntimeError, match="something else"):
        fit(tmp_path, At(batch, fail, hook), LastCheckpoint())
    assert os.readlink(tmp_path / "checkpoints" / "last.ckpt") == f"last-step{saved}-batch{saved}.ckpt"


def test_an_error_of_a_connection_is_none_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is saved; where that fails too, the first error is the one that is told."""
    with pytest.raises(ConnectionError, match="logger"):
        fit(tmp_path, At(3, partial(fail, ConnectionError("the logger's server"))), LastCheckpoint())
    assert os.readlink(tmp_path / "checkpoints" / "last.ckpt") == "last-step3-batch3.ckpt"

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no room for a checkpoint")

    def then_full() -> None:
        monkeypatch.setattr(DurableCheckpointIO, "save_checkpoint", full)
        fail()

    with pytest.raises(RuntimeError, match="something else"):
        fit(tmp_path / "full", At(3, then_full), LastCheckpoint())


def test_an_error_while_a_batch_is_made_leaves_no_batch_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader has counted it, and training has not: a run that went on from there would never see it."""
    _, unbroken = fit(tmp_path / "unbroken")
    given = AnBnDataModule.on_after_batch_transfer
    asked = []

    def broken(self: AnBnDataModule, batch: Any, index: int) -> Any:
        asked.append(batch.split)
        if asked.count("train") == 4:
            fail()
        return given(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(AnBnDataModule, "on_after_batch_transfer", broken)
        with pytest.raises(RuntimeError, match="something else"):
            fit(tmp_path, LastCheckpoint())
    _, resumed = fit(tmp_path, LastCheckpoint(), resume=True)
    assert all(torch.equal(a, b) for a, b in zip(unbroken.parameters(), resumed.parameters(), strict=True))


def test_last_is_the_newest_where_a_run_goes_on_in_its_folder(tmp_path: Path) -> None:
    fit(tmp_path, LastCheckpoint(), max_steps=3)
    fit(tmp_path, LastCheckpoint(), resume=True, max_steps=9)
    [link] = [path for path in (tmp_path / "checkpoints").iterdir() if path.is_symlink()]
    assert (link.name, link.resolve()) == ("last.ckpt", newest_readable(tmp_path))


def test_batches_that_make_no_optimizer_step_are_saved_too(tmp_path: Path) -> None:
    """What they summed and carried would be lost: three batches, and an update after every ten."""
    model = module(update_every=10)
    run = trainer(tmp_path, callbacks=[LastCheckpoint()], enable_checkpointing=True, max_steps=-1, max_epochs=1)
    run.fit(model, datamodule=data(batches_per_epoch=3))
    saved = torch.load(newest_readable(tmp_path))
    assert saved["global_step"] == 0
    assert saved[PER_RANK]["sums"]["batches"] == 3


def test_options_out_of_range() -> None:
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        LastCheckpoint(keep=0)
    with pytest.raises(ValueError, match="minutes must be a finite number above 0"):
        LastCheckpoint(minutes=0.0)


# ---- the command


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "config.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


COMMAND = [sys.executable, "-m", "rtrl_moe_pl", "fit", "--config", "config.yaml"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_and_gives_its_status(here: Path, number: signal.Signals, processes: int) -> None:
    command = [*COMMAND, "--trainer.max_steps", "1000000", "--trainer.devices", str(processes)]
    with subprocess.Popen(command, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as run:
        for _ in range(600):
            if list(here.rglob("last.ckpt")) or run.poll() is not None:
                break
            time.sleep(0.1)
        run.send_signal(number)
        said = run.communicate(timeout=60)[0]
    assert run.returncode == 128 + number, said
    assert f"stopped by {number.name} at step " in said
    assert "Traceback" not in said
    assert not list(here.rglob("*.unfinished"))
    newest = newest_readable(here, resumable=True)
    assert len(list(newest.parent.glob(f"{newest.name}.rank*"))) == processes - 1
    assert main(["validate", "--config", "config.yaml", "--ckpt_path", "last"]) == 0


@pytest.mark.parametrize("command", ["fit", "predict"])
def test_ctrl_c_outside_training_has_its_status_too(here: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    assert main(["fit", "--config", "config.yaml", "--trainer.max_steps", "1"]) == 0
    step = {"fit": "validation_step", "predict": "predict_step"}[command]  # the check before training
    monkeypatch.setattr(SequenceModule, step, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    before = signal.getsignal(signal.SIGINT)
    assert main([command, "--config", "config.yaml", "--ckpt_path", "last"][: 3 if command == "fit" else 5]) == 130
    signal.signal(signal.SIGINT, before)  # Lightning ignores it from then on


@pytest.mark.slow
def test_two_runs_that_begin_at_once_have_a_folder_each(here: Path) -> None:
    runs = [subprocess.Popen(COMMAND, env=ENVIRONMENT, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [run.wait(timeout=120) for run in runs] == [0, 0]
    folders = sorted((here / "lightning_logs").iterdir())
    assert [folder.name for folder in folders] == ["version_0", "version_1"]
    for folder in folders:
        assert len(list(folder.glob("events.out.tfevents.*"))) == 1
        assert (folder / "config.yaml").is_file()
        assert (folder / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.slow
def test_a_full_disk_ends_the_run_in_one_line_and_loses_nothing(here: Path) -> None:
    """Files of more than 20 kB cannot be written from the second run on; its checkpoints are larger."""
    assert main(["fit", "--config", "config.yaml", "--trainer.max_steps", "3"]) == 0
    before = {path: path.read_bytes() for path in here.rglob("*.ckpt")}
    shell = f"ulimit -f 20; exec {' '.join(COMMAND)} --ckpt_path last --model.cell.hidden_size 5"
    done = subprocess.run(["bash", "-c", shell], env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    [error] = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "cannot write the checkpoint" in error
    assert "Traceback" not in done.stderr
    assert {path: path.read_bytes() for path in here.rglob("*.ckpt")} == before


def test_a_checkpoint_holds_the_configuration_and_plain_types(here: Path) -> None:
    assert main(["fit", "--config", "config.yaml", "--trainer.max_steps", "3"]) == 0
    checkpoint = torch.load(newest_readable(here), weights_only=True)
    (here / "again.yaml").write_text(checkpoint["rtrl_moe_pl_config"])
    assert "batches_per_epoch: 5" in checkpoint["rtrl_moe_pl_config"]
    assert main(["fit", "--config", "again.yaml", "--ckpt_path", "last", "--trainer.max_steps", "6"]) == 0
