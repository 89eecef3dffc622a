"""Options of fit that are wrong, in a configuration of sequences."""

from pathlib import Path

import pytest
from torch import Tensor, nn

from rtrl_moe_pl.cells import GRU
from tests.bad_input.case import Case, run, table


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
CASES = [
    Case("unknown key", ["--trainer.maximum_steps", "3"], ["unknown key trainer.maximum_steps"]),
    Case("unknown model key", ["--model.learning_rate", "3"], ["unknown key model.learning_rate", "optimizer"]),
    Case("unknown cell key", [f"{CELL}.width", "3"], ["unknown key model.cell.width", "hidden_size"]),
    Case("unknown data key", [f"{DATA}.lanes", "3"], ["unknown key data.lanes", "batch_size"]),
    Case(
        "init_args misspelt",
        ["--model.gradient.initargs.window=3"],
        ["unknown key model.gradient.initargs: did you mean init_args?"],
    ),
    Case("unknown class", ["--model.gradient", "RTLR"], ["model.gradient", "no class RTLR"]),
    Case("wrong type", [f"{DATA}.batch_size", "many"], ["data.batch_size", "needs int", "many"]),
    Case("wrong nested type", [f"{CELL}.hidden_size", "1.5"], ["model.cell.hidden_size", "needs int", "1.5"]),
    Case("wrong optional type", ["--model.gradient_clip", "big"], ["model.gradient_clip", "needs float", "big"]),
    Case(
        "wrong option of a callback",
        ["--trainer.callbacks+", "RoutingPicture", "--trainer.callbacks.steps", "a"],
        ["trainer.callbacks.steps", "needs int, got a"],
    ),
    Case(
        "second callback",
        [*("--trainer.callbacks+=RoutingPicture", "--trainer.callbacks+=TemperatureAnnealing"), *BATCHES_0],
        ["trainer.callbacks (TemperatureAnnealing).batches must be at least 1, got 0"],
    ),
    Case(
        "class that is not in its module",
        [CELL, "tests.bad_input.test_options.Missing"],
        ["model.cell: cannot import tests.bad_input.test_options.Missing", "no attribute 'Missing'"],
    ),
    Case(
        "class of no module",
        [CELL, "test_bad.Missing"],
        ["model.cell: cannot import test_bad.Missing", "No module named"],
    ),
    Case("not a list", [f"{DATA}.validation_scales", "2"], ["data.validation_scales: needs a list, got 2"]),
    Case(
        "a list for a class", [DATA, "[1]"], ["data: needs the name of a class, or class_path and init_args", "got [1]"]
    ),
    Case(
        "required key", ["--model.readout", "MLP"], ["model.readout: input_size, hidden_size", "missing", "MLP takes"]
    ),
    Case(
        "token ids",
        [f"{DATA}.encoding", "ids"],
        ["GRU reads [batch, time, 3] numbers, got [16, ", "data.encoding one_hot"],
    ),
    Case("wrong choice", [f"{DATA}.layout", "packed"], ["data.layout", "'stream', 'sequences'", "packed"]),
    Case("missing config", ["--config", "gone.yaml"], ["config", "gone.yaml"]),
    Case("window 0", ["--model.gradient.window", "0"], ["model.gradient.window", "at least 1", "got 0"]),
    Case("negative window", ["--model.gradient.window", "-2"], ["window", "at least 1", "got -2"]),
    Case(
        "TBPTT window 0",
        ["--model.gradient", '{"class_path": "TBPTT", "init_args": {"window": 0}}'],
        ["window", "got 0"],
    ),
    Case("BPTT on a stream", ["--model.gradient", "BPTT"], ["BPTT()", "data.layout", "'stream'", "'sequences'"]),
    Case(
        "BatchNorm",
        [CELL, "tests.bad_input.test_options.NormalisedGRU", f"{CELL}.hidden_size", "5"],
        ["BatchNorm1d", "lanes"],
    ),
    Case(
        "cell output",
        [CELL, "tests.bad_input.test_options.WideGRU", f"{CELL}.hidden_size", "5"],
        ["WideGRU", "6)", "5)", "[batch, state_size]"],
    ),
    Case(
        "gradient_clip_val",
        ["--trainer.gradient_clip_val", "1"],
        ["trainer.gradient_clip_val=1", "model.gradient_clip"],
    ),
    Case(
        "accumulation",
        ["--trainer.accumulate_grad_batches", "2"],
        ["trainer.accumulate_grad_batches=2", "model.update_every"],
    ),
    Case("float16", ["--trainer.precision", "16-mixed"], ["trainer.precision=16-mixed", "bf16-mixed"]),
    Case("bf16-true", ["--trainer.precision", "bf16-true"], ["trainer.precision=bf16-true", "32-true"]),
    Case("gradient_clip 0", ["--model.gradient_clip", "0"], ["gradient_clip must be positive", "got 0"]),
    Case("update_every 0", ["--model.update_every", "0"], ["model.update_every must be at least 1", "got 0"]),
    Case(
        "influence too large", [f"{CELL}.hidden_size", "5000"], ["RTRL(window=4)", "influence matrix", "free", "TBPTT"]
    ),
    Case("empty task", [f"{DATA}.n_max", "1"], ["data.n_max", "at least 2", "got 1"]),
    Case("no lanes", [f"{DATA}.batch_size", "0"], ["data.batch_size must be at least 1, got 0"]),
    Case("hidden_size 0", [f"{CELL}.hidden_size", "0"], ["model.cell.hidden_size must be at least 1, got 0"]),
    Case("no checkpoint", ["--ckpt_path", "gone.ckpt"], ["--ckpt_path", "no file gone.ckpt"]),
    Case("no last checkpoint", ["--ckpt_path", "last"], ["--ckpt_path last", "no complete checkpoint"]),
    Case(
        "folder", ["--trainer.default_root_dir", "config.yaml/runs"], ["trainer.default_root_dir", "config.yaml/runs"]
    ),
    Case("threads", ["--threads", "0"], ["threads must be at least 1", "got 0"]),
    Case("device", ["--trainer.devices", "many"], ["trainer.devices", "many"]),
    Case(
        "unknown callback",
        ["--trainer.callbacks+=Freezes"],
        ["trainer.callbacks: there is no class", "give Accuracy", "Timer"],
    ),
    Case(
        "unknown model", ["--model=Sequences"], ["model: there is no class", "give ReasoningModule, SequenceModule, or"]
    ),
    Case("unknown data", ["--data=AnBn"], ["data: there is no class", "give AnBnDataModule, ", "SudokuDataModule, or"]),
    Case("unknown logger", ["--trainer.logger=TensorBord"], ["trainer.logger: there is no class", "TensorBoardLogger"]),
    Case(
        "missing option of a scheduler",
        ["--model.lr_scheduler=StepLR"],
        ["model.lr_scheduler: step_size is missing: StepLR takes optimizer, step_size, gamma"],
    ),
    Case(
        "schedule that is too short",
        ["--model.lr_scheduler=OneCycleLR", "--model.lr_scheduler.max_lr=1", "--model.lr_scheduler.total_steps=9"],
        ["model.lr_scheduler: OneCycleLR ends after total_steps=9, before trainer.max_steps=10: set it to 11"],
    ),
    Case(
        "negative lr", ["--model.optimizer.lr=-1"], ["model.optimizer.lr must be a finite number of at least 0, got -1"]
    ),
    Case(
        "never a checkpoint", ["--checkpoint.every_n_epochs=0"], ["checkpoint.every_n_epochs must be at least 1, got 0"]
    ),
    Case(
        "time between checkpoints",
        ["--checkpoint.train_time_interval=00:01:00"],
        ["checkpoint.train_time_interval has no effect", "use every_n_train_steps or every_n_epochs"],
    ),
    Case("unknown mode", ["--checkpoint.mode=best"], ["checkpoint: `mode` can be min, max but got best"]),
    Case("negative seed", ["--seed_everything=-1"], ["seed_everything must be at least 0 and below 2^32, got -1"]),
    Case(
        "figure that is not logged, to stop by",
        ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/los"],
        ["callbacks: EarlyStopping.monitor: nothing logs val/los: give one of train/accuracy, ", ", val/loss_4x"],
        begins=True,
    ),
    Case(
        "figure that is not logged, of an own checkpoint",
        ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.monitor=val/los"],
        ["callbacks: ModelCheckpoint.monitor: nothing logs val/los: give one of epoch, step, ", ", val/loss_4x"],
        begins=True,
    ),
]


@table(CASES)
def test_refused(here: Path, capsys: pytest.CaptureFixture[str], case: Case) -> None:
    run(case, here, capsys)
