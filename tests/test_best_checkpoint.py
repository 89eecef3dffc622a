"""The best checkpoint: which figures decide it, and what is said if there is none."""

import json
from pathlib import Path

import pytest
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from rtrl_moe_pl.cli import main
from rtrl_moe_pl.cli.command_line import CommandLine
from rtrl_moe_pl.training.callbacks import BestCheckpoint
from tests.test_cli import CONFIG


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(CONFIG)
    return tmp_path


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--trainer.limit_val_batches=0"],
            ["val/accuracy was never", "=1); logged by the end: nothing of val/"],
        ),
        (["--trainer.limit_val_batches=0", "--checkpoint.monitor=train/los"], ["train/los was never", "train/loss"]),
        (["--checkpoint.every_n_train_steps=2", "--trainer.max_steps=3"], ["(every_n_train_steps=2, ", "val/accuracy"]),
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


def test_nothing_is_lost_for_a_misspelt_figure(here: Path, recwarn: pytest.WarningsRecorder) -> None:
    """It is said after the first validation, once, and a run with the right one goes on."""
    fit = ["fit", "--config", "config.yaml", "--trainer.val_check_interval=2"]
    assert main([*fit, "--trainer.max_steps=9", "--checkpoint.monitor=val/acuracy"]) == 0
    said = [
        text for one in recwarn if (text := str(one.message)).startswith("checkpoint.monitor=val/acuracy: nothing ")
    ]
    assert len(said) == 1
    assert said[0].endswith(
        "; logged: val/accuracy, val/accuracy_2x, val/accuracy_4x, val/loss, val/loss_2x, val/loss_4x"
    )
    assert not list(here.rglob("best*.ckpt"))
    recwarn.clear()
    assert main([*fit, "--trainer.max_steps=12", "--checkpoint.monitor=val/accuracy", "--ckpt_path=last"]) == 0
    assert not [one for one in recwarn if "best" in str(one.message)]
    assert list(here.rglob("best-*.ckpt"))


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


class Scores(Callback):
    """Logs a score after every validation, by the step it comes after."""

    def __init__(self, scores: dict[int, float]) -> None:
        self.scores = scores

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.log("score", self.scores.get(trainer.global_step, 0.0))


def fit(folder: Path, scores: dict[int, float], steps: int, *options: str) -> tuple[str, float | None]:
    """The best checkpoint at the end of a run, of the whole of it, and its score."""
    (folder / "config.yaml").write_text(CONFIG)
    arguments = ["fit", "--config", str(folder / "config.yaml"), "--trainer.default_root_dir", str(folder)]
    arguments += ["--checkpoint.monitor=score", "--checkpoint.mode=max", f"--trainer.max_steps={steps}", *options]
    scorer = {"class_path": "tests.test_best_checkpoint.Scores", "init_args": {"scores": scores}}
    run = CommandLine([*arguments, f"--trainer.callbacks+={json.dumps(scorer)}"])
    [best] = [callback for callback in run.trainer.checkpoint_callbacks if isinstance(callback, BestCheckpoint)]
    score = best.best_model_score
    return best.best_model_path.removeprefix(f"{folder}/lightning_logs/"), None if score is None else float(score)


def best_files(folder: Path) -> list[str]:
    found = sorted((folder / "lightning_logs").rglob("best-*.ckpt"))
    return [f"{path.parts[-3]}/{path.name}" for path in found]


FALLING = {5: 0.5, 10: 0.9, 15: 0.7, 20: 0.8}
RISING = {**FALLING, 20: 0.95}


@pytest.mark.parametrize(
    ("scores", "stops", "best", "files"),
    [
        (FALLING, [20], "version_0/best-step10.ckpt", ["version_0/best-step10.ckpt"]),
        (FALLING, [12, 20], "version_0/best-step10.ckpt", ["version_0/best-step10.ckpt"]),
        (FALLING, [12, 17, 20], "version_0/best-step10.ckpt", ["version_0/best-step10.ckpt"]),
        (
            RISING,
            [12, 17, 20],
            "version_2/best-step20.ckpt",
            ["version_0/best-step10.ckpt", "version_2/best-step20.ckpt"],
        ),
    ],
    ids=["unbroken", "once", "twice", "beaten"],
)
def test_the_best_so_far_is_the_one_to_beat_after_a_resume(
    tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
    scores: dict[int, float],
    stops: list[int],
    best: str,
    files: list[str],
) -> None:
    """Nothing is removed from another run's folder."""
    for run, steps in enumerate(stops):
        path, score = fit(tmp_path, scores, steps, *(["--ckpt_path=last"] if run else []))
    folder, name = best.split("/")
    assert (path, score) == (f"{folder}/checkpoints/{name}", pytest.approx(max(scores.values())))
    assert best_files(tmp_path) == files
    assert not [warning for warning in recwarn if "best checkpoint" in str(warning.message)]


def test_a_resumed_run_without_a_validation_keeps_the_best(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    fit(tmp_path, FALLING, 12)
    path, score = fit(tmp_path, FALLING, 14, "--ckpt_path=last")
    assert (path, score) == ("version_0/checkpoints/best-step10.ckpt", pytest.approx(0.9))
    assert not [warning for warning in recwarn if "best checkpoint" in str(warning.message)]


def test_a_best_checkpoint_that_is_gone_is_forgotten_with_a_warning(tmp_path: Path) -> None:
    fit(tmp_path, FALLING, 12)
    (tmp_path / "lightning_logs/version_0/checkpoints/best-step10.ckpt").unlink()
    with pytest.warns(UserWarning, match=r"the best checkpoint so far, .*best-step10\.ckpt, is gone"):
        path, score = fit(tmp_path, FALLING, 20, "--ckpt_path=last")
    assert (path, score) == ("version_1/checkpoints/best-step20.ckpt", pytest.approx(0.8))


@pytest.mark.parametrize(
    ("before", "after", "files"),
    [
        (2, 2, ["version_0/best-step10.ckpt", "version_0/best-step5.ckpt", "version_1/best-step20.ckpt"]),
        (3, 1, ["version_0/best-step10.ckpt", "version_0/best-step5.ckpt"]),
        (1, 2, ["version_0/best-step10.ckpt", "version_1/best-step20.ckpt"]),
    ],
)
def test_several_best_are_gone_on_from(tmp_path: Path, before: int, after: int, files: list[str]) -> None:
    """Of version_1, step 15 is one of the best two until step 20 takes its place."""
    fit(tmp_path, FALLING, 10, f"--checkpoint.save_top_k={before}")
    path, _ = fit(tmp_path, FALLING, 20, "--ckpt_path=last", f"--checkpoint.save_top_k={after}")
    assert path == "version_0/checkpoints/best-step10.ckpt"
    assert best_files(tmp_path) == files


def test_without_a_figure_the_newest_is_the_best(tmp_path: Path) -> None:
    options = ("--checkpoint.monitor=null", "--checkpoint.mode=min")
    fit(tmp_path, FALLING, 10, *options)
    assert fit(tmp_path, FALLING, 15, "--ckpt_path=last", *options)[0] == "version_1/checkpoints/best-step15.ckpt"
    assert best_files(tmp_path) == ["version_0/best-step10.ckpt", "version_1/best-step15.ckpt"]


def test_an_epoch_cut_short_has_no_score(tmp_path: Path) -> None:
    """The score there is then is that of the weights of step 10."""
    fit(tmp_path, FALLING, 12, "--checkpoint.save_top_k=-1")
    assert best_files(tmp_path) == ["version_0/best-step10.ckpt", "version_0/best-step5.ckpt"]


def test_an_epoch_cut_short_is_kept_where_nothing_is_validated(tmp_path: Path) -> None:
    options = ["--checkpoint.save_top_k=-1", "--trainer.limit_val_batches=0", "--checkpoint.monitor=train/loss"]
    fit(tmp_path, FALLING, 7, *options)
    assert best_files(tmp_path) == ["version_0/best-step5.ckpt", "version_0/best-step7.ckpt"]


@pytest.mark.parametrize("monitor", ["train/loss", "null"])
def test_an_epoch_cut_short_is_kept_where_no_validation_decides(tmp_path: Path, monitor: str) -> None:
    fit(tmp_path, FALLING, 3, f"--checkpoint.monitor={monitor}", "--checkpoint.mode=min")
    assert best_files(tmp_path) == ["version_0/best-step3.ckpt"]


@pytest.mark.parametrize(
    ("every", "interval", "stops", "best"),
    [
        (5, 1.0, [20], [5, 10, 15, 20]),  # due with the validations
        (3, 1.0, [20], [5, 10, 15, 20]),  # in between: under the score of the next
        (7, 1.0, [20], [10, 15]),
        (3, 4, [13], [4, 9]),
        (3, 4, [3, 13], [4, 9]),  # stopped between due and kept
        (3, 4, [7, 13], [4, 9]),
    ],
)
def test_steps_that_are_kept_have_the_score_of_the_next_validation(
    tmp_path: Path, every: int, interval: float, stops: list[int], best: list[int]
) -> None:
    """With val_check_interval=4 of 5 batches validations come after steps 4, 9, 14."""
    scores = {step: 0.1 + 0.01 * step for step in range(1, 30)}
    options = [f"--checkpoint.every_n_train_steps={every}", "--checkpoint.save_top_k=-1"]
    for run, steps in enumerate(stops):
        resumed = ["--ckpt_path=last"] if run else []
        fit(tmp_path, scores, steps, f"--trainer.val_check_interval={interval}", *options, *resumed)
    assert sorted(int(path.split("-step")[1].removesuffix(".ckpt")) for path in best_files(tmp_path)) == best


@pytest.mark.parametrize("name", ["save_last", "save_on_exception"])
def test_what_last_checkpoint_does_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be left out: last.ckpt is saved by last_checkpoint"):
        BestCheckpoint(**{name: True})
