"""Checkpoints that are damaged, of something else, or none."""

from __future__ import annotations

import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rtrl_moe_pl.cli import main
from tests.bad_input.case import CONFIG, CONFIGS, MOE, contents, refused

OF = ("sequence", "moe", "reasoning")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of every configuration."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "config.yaml").write_text(CONFIG)
        (folder / "moe.yaml").write_text(MOE)
        for name in OF:
            limits = ["--trainer.max_steps=4", "--trainer.limit_val_batches=0", f"--trainer.default_root_dir={name}"]
            assert main(["fit", *CONFIGS[name], *limits]) == 0
    return folder


@pytest.fixture
def there(here: Path, trained: Path) -> Path:
    """A folder with an earlier run, and NAME.ckpt of every configuration."""
    for name in OF:
        [path] = (trained / name).rglob("last.ckpt")
        shutil.copy(path, here / f"{name}.ckpt")
    (here / "lightning_logs/version_0/checkpoints").mkdir(parents=True)
    return here


def changed(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)


def archived(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a", "b")


def flipped(path: Path) -> None:
    """One byte of the largest record; what lies between records is padding, which no checksum covers."""
    with zipfile.ZipFile(path) as file:
        record = max(file.infolist(), key=lambda info: info.file_size)
        contents_of = file.read(record)
    found = bytearray(path.read_bytes())
    found[found.index(contents_of) + len(contents_of) // 2] ^= 255
    path.write_bytes(found)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


CORRUPT, NONE = "is truncated or corrupt", "is no checkpoint of a training: torch.save has not written it"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:-1000]), CORRUPT, id="truncated"),
        pytest.param(flipped, CORRUPT, id="one byte"),
        pytest.param(lambda path: path.write_bytes(b""), "is an empty file", id="empty"),
        pytest.param(lambda path: path.write_text("state_dict" * 1000), NONE, id="text"),
        pytest.param(lambda path: path.write_bytes(pickle.dumps({"state_dict": {}})), NONE, id="pickle"),
        pytest.param(lambda path: torch.save({"state_dict": {}, "at": Path()}, path), CORRUPT, id="objects"),
        pytest.param(archived, CORRUPT, id="archive"),
        pytest.param(folder, "is a folder", id="folder"),
        pytest.param(lambda path: torch.save(torch.ones(3), path), "is no checkpoint", id="tensor"),
        pytest.param(lambda path: torch.save({"model": {}}, path), "is no checkpoint", id="model"),
        pytest.param(lambda path: torch.save({"state_dict": {}}, path), "is no checkpoint", id="weights"),
        pytest.param(lambda path: torch.save({"state_dict": None}, path), "is no checkpoint", id="none"),
    ],
)
def test_damaged_ones(
    there: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object], said: str
) -> None:
    damage(there / "sequence.ckpt")
    before = contents(there)
    for command in ("fit", "validate", "test", "predict"):
        line = refused(capsys, [command, *CONFIGS["sequence"], "--ckpt_path=sequence.ckpt"], [said])
        assert line.startswith("error: --ckpt_path: sequence.ckpt ")
    assert contents(there) == before


def test_of_the_newest_that_is_damaged_the_one_before_is_taken(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("moe", "reasoning"):
        (there / f"{name}.ckpt").unlink()
    shutil.copy(there / "sequence.ckpt", there / "torn.ckpt")  # of two of the same time, the later name is taken
    flipped(there / "torn.ckpt")
    with pytest.warns(UserWarning, match=r"torn.ckpt is truncated or corrupt .*: passed over, an older one is taken"):
        assert main(["validate", *CONFIGS["sequence"], "--ckpt_path", "last"]) == 0
    assert "sequence.ckpt" in capsys.readouterr().out


OTHER = "--ckpt_path: the checkpoint is of another architecture than the model configured here: "
MORE = "--trainer.max_steps=6"


@pytest.mark.parametrize(
    ("commands", "config", "arguments", "parts"),
    [
        (
            "fit validate predict",
            "sequence",
            ["--ckpt_path=sequence.ckpt", "--model.cell.hidden_size=6"],
            [OTHER, "cell.input.bias is [15] there and [18] here"],
        ),
        (
            "fit validate",
            "sequence",
            ["--ckpt_path=sequence.ckpt", "--model.cell=LSTM"],
            [OTHER, "cell is GRU there and LSTM here"],
        ),
        (
            "fit test",
            "sequence",
            ["--ckpt_path=sequence.ckpt", "--data=DelayedCopyDataModule"],
            [OTHER, "readout.bias is [2] there and [4] here"],
        ),
        (
            "fit validate",
            "sequence",
            ["--ckpt_path=moe.ckpt"],
            [OTHER, "cell is RecurrentMoE there and GRU here", "and 27 more"],
        ),
        (
            "fit predict",
            "sequence",
            ["--ckpt_path=reasoning.ckpt"],
            [OTHER, "cell.input.bias is missing there and [15] here"],
        ),
        (
            "fit validate test predict",
            "reasoning",
            ["--ckpt_path=sequence.ckpt"],
            [OTHER, "cell.input.bias is [15] there and missing here"],
        ),
        (
            "predict",
            "reasoning",
            ["--ckpt_path=reasoning.ckpt", "--data.colors=4"],
            [OTHER, "decoder.answer_head.weight is [5, 8] there and [6, 8]"],
        ),
        (
            "fit",
            "sequence",
            ["--ckpt_path=sequence.ckpt", "--model.optimizer=SGD", MORE],
            ["model.optimizer: the checkpoint was made with Adam, but the configuration says SGD: resume with"],
        ),
        (
            "fit",
            "sequence",
            ["--ckpt_path=sequence.ckpt", "--model.lr_scheduler=Warmup", "--model.lr_scheduler.warmup_steps=2", MORE],
            ["model.lr_scheduler: the checkpoint was made with none, but the configuration says Warmup"],
        ),
        (
            "fit",
            "moe",
            ["--ckpt_path=moe.ckpt", "--model.gradient=RTRL", MORE],
            ["--ckpt_path: the saved influence is that of LazyExpertRTRL, the one configured is of RTRL: resume with"],
        ),
        (
            "fit validate test predict",
            "sequence",
            ["--ckpt_path=gone.ckpt"],
            ["--ckpt_path: there is no file gone.ckpt: name one, or give last for the newest"],
        ),
        (
            "fit validate test predict",
            "sequence",
            ["--ckpt_path=last", "--trainer.default_root_dir=lightning_logs"],
            ["--ckpt_path last: no complete checkpoint below lightning_logs"],
        ),
        (
            "fit validate",
            "reasoning",
            ["--model.pretrained=gone.ckpt"],
            ["model.pretrained: there is no file gone.ckpt"],
        ),
        (
            "fit validate",
            "reasoning",
            ["--model.pretrained=sequence.ckpt"],
            ["model.pretrained: sequence.ckpt is not a checkpoint of a ReasoningModule: name one, or leave it out"],
        ),
        (
            "fit validate",
            "reasoning",
            ["--model.pretrained=config.yaml"],
            [f"model.pretrained: config.yaml {NONE}; the newest whole one beside it is "],
        ),
        (
            "predict",
            "sequence",
            [],
            ["predict needs trained weights, and those of the model are not: give --ckpt_path PATH, or last"],
        ),
    ],
)
def test_of_something_else(
    there: Path, capsys: pytest.CaptureFixture[str], commands: str, config: str, arguments: list[str], parts: list[str]
) -> None:
    before = contents(there)
    for command in commands.split():
        refused(capsys, [command, *CONFIGS[config], *arguments], parts)
    assert contents(there) == before


@pytest.mark.parametrize(
    ("change", "commands", "said"),
    [
        (
            lambda found: found.pop("optimizer_states"),
            "fit",
            "training cannot go on from this checkpoint, it holds no optimizer",
        ),
        (lambda found: found.pop("loops"), "fit", "training cannot go on from this checkpoint, it holds no loops"),
        (
            lambda found: found["state_dict"]["readout.bias"].fill_(torch.inf),
            "fit validate predict",
            "readout.bias of this checkpoint holds NaN",
        ),
    ],
)
def test_incomplete_ones(
    there: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[dict[str, Any]], object],
    commands: str,
    said: str,
) -> None:
    changed(there / "sequence.ckpt", change)
    before = contents(there)
    for command in commands.split():
        refused(capsys, [command, *CONFIGS["sequence"], "--ckpt_path=sequence.ckpt"], [f"--ckpt_path: {said}"])
    assert contents(there) == before


@pytest.mark.parametrize("options", ["predict", "fit --model.optimizer.lr=-1", "fit --ckpt_path=moe.ckpt"])
def test_a_new_root_folder_of_a_refused_run_is_not_there(
    there: Path, capsys: pytest.CaptureFixture[str], options: str
) -> None:
    (there / "mine").mkdir()
    for root in ("new/folder", "mine"):
        command, *more = options.split()
        refused(capsys, [command, *CONFIGS["sequence"], f"--trainer.default_root_dir={root}", *more], [])
    assert not (there / "new").exists()
    assert list((there / "mine").iterdir()) == []


@pytest.mark.parametrize("steps", [3, 4])
def test_a_run_that_is_complete_is_said_to_be(there: Path, steps: int) -> None:
    with pytest.warns(UserWarning, match=f"nothing was trained: the weights are those of step 4, .*max_steps={steps},"):
        assert main(["fit", *CONFIGS["sequence"], "--ckpt_path=sequence.ckpt", f"--trainer.max_steps={steps}"]) == 0


@pytest.mark.parametrize(
    ("command", "option"), [("fit", "--model.optimizer.lr=.nan"), ("validate", "--model.cell.hidden_size=6")]
)
def test_the_folder_of_another_logger_and_one_with_other_files_are_kept(
    there: Path, capsys: pytest.CaptureFixture[str], command: str, option: str
) -> None:
    """Only what this run has made goes, whatever is refused."""
    mine = there / "mine/lightning_logs/run"
    mine.mkdir(parents=True)
    (mine / "notes.txt").write_text("mine")
    logger = ["--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=mine", "--trainer.logger.version=run"]
    refused(capsys, [command, *CONFIGS["sequence"], "--ckpt_path=sequence.ckpt", *logger, option], [])
    assert (mine / "notes.txt").read_text() == "mine"
    assert list(mine.glob("events*"))


def test_a_numerical_failure_keeps_its_logs_and_saves_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["fit", "--config", "config.yaml", "--model.optimizer.lr", "1e30", "--model.gradient_clip", "null"]
    refused(capsys, arguments, ["training stopped at step", "try a smaller learning rate"])
    assert list(here.rglob("events*"))
    for path in here.rglob("*.ckpt"):
        values = torch.load(path, weights_only=True)["state_dict"].values()
        assert all(torch.isfinite(value).all() for value in values)
