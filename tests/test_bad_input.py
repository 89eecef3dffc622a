"""Bad input: one error line that names the key, a non-zero status, and nothing written over."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rtrl_moe_pl.cells import GRU
from rtrl_moe_pl.cli import main
from tests.test_cli import CONFIG


class NormalisedGRU(GRU):
    """With batch normalisation, which couples the lanes."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        self.norm = nn.BatchNorm1d(hidden_size)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return self.norm(super().forward(x, s))


class WideGRU(GRU):
    """Returns states that are one unit too wide."""

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return nn.functional.pad(super().forward(x, s), (0, 1))


BATCHES_0 = ["--trainer.callbacks.batches", "0"]
CELL, DATA = "--model.cell", "--data"
# name, arguments after `fit --config config.yaml`, what the one line must say
CASES = [
    ("unknown key", ["--trainer.maximum_steps", "3"], ["unknown key trainer.maximum_steps"]),
    ("unknown model key", ["--model.learning_rate", "3"], ["unknown key model.learning_rate", "optimizer"]),
    ("unknown cell key", [f"{CELL}.width", "3"], ["unknown key model.cell.width", "hidden_size"]),
    ("unknown data key", [f"{DATA}.lanes", "3"], ["unknown key data.lanes", "batch_size"]),
    ("unknown class", ["--model.gradient", "RTLR"], ["model.gradient", "no class RTLR"]),
    ("wrong type", [f"{DATA}.batch_size", "many"], ["data.batch_size", "needs int", "many"]),
    ("wrong nested type", [f"{CELL}.hidden_size", "1.5"], ["model.cell.hidden_size", "needs int", "1.5"]),
    ("wrong optional type", ["--model.gradient_clip", "big"], ["model.gradient_clip", "needs float", "big"]),
    (
        "wrong option of a callback",
        ["--trainer.callbacks+", "RoutingPicture", "--trainer.callbacks.steps", "a"],
        ["trainer.callbacks.steps", "needs int, got a"],
    ),
    (
        "second callback",
        [*("--trainer.callbacks+=RoutingPicture", "--trainer.callbacks+=TemperatureAnnealing"), *BATCHES_0],
        ["trainer.callbacks (TemperatureAnnealing).batches must be at least 1, got 0"],
    ),
    (
        "class that is not in its module",
        [CELL, "tests.test_bad_input.Missing"],
        ["model.cell: cannot import tests.test_bad_input.Missing", "no attribute 'Missing'"],
    ),
    (
        "class of no module",
        [CELL, "test_bad.Missing"],
        ["model.cell: cannot import test_bad.Missing", "No module named"],
    ),
    ("not a list", [f"{DATA}.validation_scales", "2"], ["data.validation_scales: needs a list, got 2"]),
    ("a list for a class", [DATA, "[1]"], ["data: needs the name of a class, or class_path and init_args", "got [1]"]),
    ("required key", ["--model.readout", "MLP"], ["model.readout: input_size, hidden_size", "missing", "MLP takes"]),
    (
        "token ids",
        [f"{DATA}.encoding", "ids"],
        ["GRU reads [batch, time, 3] numbers, got [16, ", "data.encoding one_hot"],
    ),
    ("wrong choice", [f"{DATA}.layout", "packed"], ["data.layout", "'stream', 'sequences'", "packed"]),
    ("missing config", ["--config", "gone.yaml"], ["config", "gone.yaml"]),
    ("window 0", ["--model.gradient.window", "0"], ["model.gradient.window", "at least 1", "got 0"]),
    ("negative window", ["--model.gradient.window", "-2"], ["window", "at least 1", "got -2"]),
    (
        "TBPTT window 0",
        ["--model.gradient", '{"class_path": "TBPTT", "init_args": {"window": 0}}'],
        ["window", "got 0"],
    ),
    ("BPTT on a stream", ["--model.gradient", "BPTT"], ["BPTT()", "data.layout", "'stream'", "'sequences'"]),
    ("BatchNorm", [CELL, "tests.test_bad_input.NormalisedGRU", f"{CELL}.hidden_size", "5"], ["BatchNorm1d", "lanes"]),
    (
        "cell output",
        [CELL, "tests.test_bad_input.WideGRU", f"{CELL}.hidden_size", "5"],
        ["WideGRU", "6)", "5)", "[batch, state_size]"],
    ),
    ("gradient_clip_val", ["--trainer.gradient_clip_val", "1"], ["trainer.gradient_clip_val=1", "model.gradient_clip"]),
    (
        "accumulation",
        ["--trainer.accumulate_grad_batches", "2"],
        ["trainer.accumulate_grad_batches=2", "model.update_every"],
    ),
    ("float16", ["--trainer.precision", "16-mixed"], ["trainer.precision=16-mixed", "bf16-mixed"]),
    ("bf16-true", ["--trainer.precision", "bf16-true"], ["trainer.precision=bf16-true", "32-true"]),
    ("gradient_clip 0", ["--model.gradient_clip", "0"], ["gradient_clip must be positive", "got 0"]),
    ("update_every 0", ["--model.update_every", "0"], ["model.update_every must be at least 1", "got 0"]),
    ("influence too large", [f"{CELL}.hidden_size", "5000"], ["RTRL(window=4)", "influence matrix", "free", "TBPTT"]),
    ("empty task", [f"{DATA}.n_max", "1"], ["data.n_max", "at least 2", "got 1"]),
    ("no lanes", [f"{DATA}.batch_size", "0"], ["data.batch_size must be at least 1, got 0"]),
    ("hidden_size 0", [f"{CELL}.hidden_size", "0"], ["model.cell.hidden_size must be at least 1, got 0"]),
    ("no checkpoint", ["--ckpt_path", "gone.ckpt"], ["--ckpt_path", "no file gone.ckpt"]),
    ("no last checkpoint", ["--ckpt_path", "last"], ["--ckpt_path last", "no complete checkpoint"]),
    ("folder", ["--trainer.default_root_dir", "config.yaml/runs"], ["trainer.default_root_dir", "config.yaml/runs"]),
    ("threads", ["--threads", "0"], ["threads must be at least 1", "got 0"]),
    ("device", ["--trainer.devices", "many"], ["trainer.devices", "many"]),
    (
        "unknown callback",
        ["--trainer.callbacks+=Freezes"],
        ["trainer.callbacks: there is no class", "give Accuracy", "Timer"],
    ),
    ("unknown model", ["--model=Sequences"], ["model: there is no class", "give ReasoningModule, SequenceModule, or"]),
    ("unknown data", ["--data=AnBn"], ["data: there is no class", "give AnBnDataModule, ", "SudokuDataModule, or"]),
    ("unknown logger", ["--trainer.logger=TensorBord"], ["trainer.logger: there is no class", "TensorBoardLogger"]),
    (
        "missing option of a scheduler",
        ["--model.lr_scheduler=StepLR"],
        ["model.lr_scheduler: step_size is missing: StepLR takes optimizer, step_size, gamma"],
    ),
    (
        "schedule that is too short",
        ["--model.lr_scheduler=OneCycleLR", "--model.lr_scheduler.max_lr=1", "--model.lr_scheduler.total_steps=9"],
        ["model.lr_scheduler: OneCycleLR ends after total_steps=9, before trainer.max_steps=10"],
    ),
    ("negative lr", ["--model.optimizer.lr=-1"], ["model.optimizer: Invalid learning rate: -1"]),
    ("never a checkpoint", ["--checkpoint.every_n_epochs=0"], ["checkpoint.every_n_epochs must be at least 1, got 0"]),
    (
        "time between checkpoints",
        ["--checkpoint.train_time_interval=00:01:00"],
        ["checkpoint.train_time_interval has no effect", "use every_n_train_steps or every_n_epochs"],
    ),
    ("unknown mode", ["--checkpoint.mode=best"], ["checkpoint: `mode` can be min, max but got best"]),
    ("negative seed", ["--seed_everything=-1"], ["seed_everything must be at least 0 and below 2^32, got -1"]),
    (
        "figure that is not logged",
        ["--checkpoint.monitor=val/acuracy"],
        ["checkpoint.monitor: nothing logs 'val/acuracy': give one of epoch, step, train/accuracy, ", ", val/loss_4x"],
    ),
]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], parts: list[str]) -> None:
    capsys.readouterr()
    assert main(arguments) == 1
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if "error" in line.lower()]
    assert len(errors) == 1, captured.err
    assert errors[0].startswith("error: ")
    assert "Traceback" not in captured.err + captured.out
    for part in parts:
        assert part in errors[0]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RTRL_MOE_PL_DEBUG", raising=False)
    (tmp_path / "config.yaml").write_text(CONFIG)
    return tmp_path


@pytest.mark.parametrize(("arguments", "parts"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_refused(here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], parts: list[str]) -> None:
    kept = here / "lightning_logs/version_0/checkpoints/kept.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("an earlier run")
    refused(capsys, ["fit", "--config", "config.yaml", *arguments], parts)
    found = contents(here)
    assert found["config.yaml"].decode() == CONFIG
    assert found["lightning_logs/version_0/checkpoints/kept.txt"] == b"an earlier run"
    assert not [name for name in found if name.endswith(".ckpt")]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (CONFIG + "  nonsense: 1\n", ["unknown key trainer.nonsense"]),
        (CONFIG + "nonsense: 1\n", ["unknown key nonsense"]),
        (CONFIG.replace("{window: 4}", "{window: four}"), ["model.gradient.window", "needs int", "four"]),
        (CONFIG.replace("{window: 4}", "{windows: 4}"), ["unknown key model.gradient.windows", "window"]),
        (CONFIG.replace("max_steps: 10", "max_steps: ten"), ["trainer.max_steps", "needs int", "ten"]),
        (
            CONFIG.replace("GRU, init_args: {hidden_size: 5}", "GRU, hidden_size: 5"),
            ["model.cell: needs the name of a class, or class_path and init_args and no other key", "'hidden_size': 5"],
        ),
        (CONFIG.replace("{class_path: GRU", "{class_pth: GRU"), ["model.cell: needs the name of a class", "class_pth"]),
        (CONFIG.replace("    gradient:", "    gradients:"), ["unknown key model.gradients", "gradient"]),
        ("model: [", ["--config", "not a YAML mapping", "line"]),
        ("", ["--config", "mapping", "empty"]),
        ("[]", ["--config", "mapping", "[]"]),
        ("\xff", ["--config: the file is not a text in UTF-8"]),
    ],
)
def test_bad_configuration_files(here: Path, capsys: pytest.CaptureFixture[str], text: str, parts: list[str]) -> None:
    (here / "config.yaml").write_text(text, encoding="latin1")
    refused(capsys, ["fit", "--config", "config.yaml"], parts)
    assert contents(here) == {"config.yaml": text.encode("latin1")}


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "no data and model given: name a configuration that has them, --config FILE"),
        (["--config", "."], "config: Path is not a file"),
        (["--unknown_option", "x"], "unknown key unknown_option"),
        (["--config", "config.yaml", "--ckpt_path", "."], "--ckpt_path: there is no file ."),
    ],
)
def test_bad_command_lines(here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], part: str) -> None:
    refused(capsys, ["fit", *arguments], [part])


def test_an_error_beside_a_class_of_the_users_own_module_is_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "my_callbacks.py").write_text(
        "from lightning.pytorch.callbacks import Callback\n\n\nclass MyOwn(Callback): ...\n"
    )
    monkeypatch.syspath_prepend(here)
    callbacks = ["--trainer.callbacks+=my_callbacks.MyOwn", "--trainer.callbacks+=Freez"]
    refused(capsys, ["fit", "--config", "config.yaml", *callbacks], ["there is no class Freez", ", MyOwn, "])


def test_an_error_that_is_not_understood_is_one_line_too(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(error: BaseException) -> str:
        raise KeyError(str(error))

    monkeypatch.setattr("rtrl_moe_pl.cli.command_line.one_line", fails)
    refused(capsys, ["fit", "--config", "config.yaml", "--trainer.max_steps=ten"], ["trainer.max_steps", "ten"])


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def no_checkpoint(path: Path) -> None:
    path.write_bytes(b"state_dict" * 1000)


@pytest.mark.parametrize("command", ["fit", "validate"])
@pytest.mark.parametrize("damage", [truncated, emptied, no_checkpoint])
def test_damaged_checkpoints(here: Path, capsys: pytest.CaptureFixture[str], damage, command: str) -> None:
    arguments = ["--config", "config.yaml"]
    assert main(["fit", *arguments]) == 0
    last = here / "lightning_logs/version_0/checkpoints/last.ckpt"
    damage(last)
    before = contents(here)
    refused(
        capsys, [command, *arguments, "--ckpt_path", str(last)], ["--ckpt_path", "last.ckpt", "truncated or corrupt"]
    )
    assert contents(here) == before
    os.utime(last, (2e9, 2e9))  # the newest, and still passed over
    with pytest.warns(UserWarning, match="last.ckpt is truncated or corrupt .*: passed over, an older one is taken"):
        assert main(["validate", *arguments, "--ckpt_path", "last"]) == 0
    assert "best-step" in capsys.readouterr().out


def test_checkpoint_of_another_architecture(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", "config.yaml"]
    assert main(["fit", *arguments]) == 0
    before = contents(here / "lightning_logs/version_0")
    for command in ("fit", "validate", "predict"):
        other = [command, *arguments, "--ckpt_path", "last", "--model.cell.hidden_size", "6"]
        refused(capsys, other, ["another architecture", "cell.input.bias is [15] there and [18] here"])
    assert contents(here / "lightning_logs/version_0") == before


def test_numerical_failure(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["fit", "--config", "config.yaml", "--model.optimizer.lr", "1e30", "--model.gradient_clip", "null"]
    refused(capsys, arguments, ["training stopped at step", "try a smaller learning rate"])
    for path in here.rglob("*.ckpt"):
        values = torch.load(path, weights_only=True)["state_dict"].values()
        assert all(torch.isfinite(value).all() for value in values)
