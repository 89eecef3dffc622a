"""The best checkpoint: which figures decide it, and what is said if there is none."""

from pathlib import Path

import pytest
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from rtrl_moe_pl.cli import main
from tests.test_cli import CONFIG


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(CONFIG)
    return tmp_path


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--trainer.limit_val_batches=0"], ["val/accuracy was never there", "every_n_epochs=1)", ": epoch, step, "]),
        (["--trainer.limit_val_batches=0", "--checkpoint.monitor=train/los"], ["train/los was never", "train/loss"]),
        (["--checkpoint.every_n_train_steps=2", "--trainer.max_steps=5"], ["(every_n_train_steps=2, ", "val/accuracy"]),
        (["--checkpoint.every_n_epochs=3", "--checkpoint.monitor=null"], ["none was due", "every_n_epochs=3)"]),
    ],
)
def test_no_best_checkpoint_is_said_once_at_the_end(
    here: Path, recwarn: pytest.WarningsRecorder, options: list[str], said: list[str]
) -> None:
    assert main(["fit", "--config", "config.yaml", *options]) == 0
    assert all(path.name.startswith("last") for path in here.rglob("*.ckpt"))
    assert len(list(here.rglob("last.ckpt"))) == 1
    messages = [str(warning.message) for warning in recwarn]
    [message] = [message for message in messages if "best checkpoint" in message]
    assert all(part in message for part in ["only last.ckpt", *said])
    assert not [message for message in messages if "ModelCheckpoint" in message]


class Quality(Callback):
    """Logs figures that are not there in the sanity check."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            pl_module.log("val/accuracy_8x", 1.0)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.log("val/quality", 1.0)


@pytest.mark.parametrize(
    "options",
    [
        ["--checkpoint.monitor=train/loss", "--checkpoint.mode=min"],
        ["--checkpoint.monitor=val/accuracy_8x"],
        ["--checkpoint.monitor=val/quality"],
        ["--checkpoint.every_n_epochs=0", "--checkpoint.every_n_train_steps=2"],
    ],
)
def test_a_figure_that_is_not_logged_in_the_sanity_check_is_no_fault(here: Path, options: list[str]) -> None:
    callback = "--trainer.callbacks+=tests.test_best_checkpoint.Quality"
    assert main(["fit", "--config", "config.yaml", callback, *options]) == 0
    assert list(here.rglob("best-*.ckpt"))
