"""Configuration files that are wrong: YAML, and what a configuration is made of."""

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from rtrl_moe_pl.cli import CommandLine
from tests.bad_input.case import CONFIG, DENSE, Case, contents, refused, run, table

FILE = "--config config.yaml: "
NO_MAPPING = f"{FILE}not a YAML mapping of keys to values: "
NO_CLASS = "model.cell: needs the name of a class, or class_path and init_args and no other key, got {"
MEANT, INTO = "beside class_path: did you mean init_args?", "beside class_path: options go into init_args"
WITHOUT_TRAINER = CONFIG.split("trainer:")[0]


class Own(nn.Module):
    """No cell."""

    def __init__(self, width: int) -> None:
        super().__init__()


def cell(text: str) -> str:
    return CONFIG.replace(DENSE, text)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (CONFIG + "  nonsense: 1\n", [f"{FILE}unknown key trainer.nonsense: give one of accelerator, "]),
        (CONFIG + "  min_step: {}\n", [f"{FILE}unknown key trainer.min_step: did you mean min_steps or "]),
        (CONFIG + "nonsense: 1\n", [f"{FILE}unknown key nonsense: give one of checkpoint, "]),
        (CONFIG + "modle: {}\n", [f"{FILE}unknown key modle: did you mean model?"]),
        (CONFIG + "checkpoint: {key: {}}\n", [f"{FILE}unknown key checkpoint.key: give one of auto_insert_metric"]),
        (CONFIG + "3: 4\n", [f"{FILE}unknown key 3: give one of "]),
        (
            CONFIG + "checkpoint.monitor.x: 4\n",
            [f"{FILE}unknown key checkpoint.monitor.x: checkpoint.monitor takes"],
        ),
        (CONFIG + "trainer.max_step: 4\n", [f"{FILE}unknown key trainer.max_step: did you mean max_steps or "]),
        (CONFIG.replace("    gradient", "    foo: {}\n    gradient"), [f"{FILE}unknown key model.foo: SequenceModule"]),
        (CONFIG.replace("{window: 4}", "{foo: {}}"), [f"{FILE}unknown key model.gradient.foo: RTRL takes window"]),
        (CONFIG.replace("init_args: {w", "initargs: {w"), [f"{FILE}unknown key model.gradient.initargs {MEANT}"]),
        (CONFIG.replace("  init_args:\n", "  initargs:\n"), [f"{FILE}unknown key model.initargs {MEANT}"]),
        (
            CONFIG + "  callbacks: [{class_path: EMA, decay: 1}]\n",
            [f"{FILE}unknown key trainer.callbacks.decay {INTO}"],
        ),
        (cell("{3: 4}"), [f"{FILE}model.cell: Key must be a string, got: 3"]),
        (CONFIG + "  max_steps: 3\n", [f"{FILE}the key max_steps is given twice, in line 13 and in line 17: leave"]),
        (CONFIG + "trainer: {}\n", [f"{FILE}the key trainer is given twice, in line 12 and in line 17"]),
        (cell('{class_path: GRU, "class_path": LSTM}'), [f"{FILE}the key class_path is given twice, in line 6 and"]),
        (CONFIG + "  callbacks: [{a: 1, a: 2}]\n", [f"{FILE}the key a is given twice, in line 17 and in line 17"]),
        (CONFIG + "checkpoint: &a {dirpath: *a}\n", [f"{FILE}line 17 has an alias of itself within it"]),
        (CONFIG + "  callbacks: &a [*a]\n", [f"{FILE}line 17 has an alias of itself within it"]),
        (CONFIG + "config: config.yaml\n", [f"{FILE}Config file loop detected"]),
        (CONFIG.replace("{window: 4}", "{window: four}"), ["model.gradient.window", "needs int", "four"]),
        (CONFIG.replace("{window: 4}", "{windows: 4}"), ["unknown key model.gradient.windows", "window"]),
        (CONFIG.replace("max_steps: 10", "max_steps: ten"), ["trainer.max_steps", "needs int", "ten"]),
        (CONFIG.replace("    gradient:", "    gradients:"), ["unknown key model.gradients", "gradient"]),
        (cell("{class_path: GRU, hidden_size: 5}"), [f"{FILE}unknown key model.cell.hidden_size {INTO}"]),
        (cell("{class_pth: GRU, init_args: {hidden_size: 5}}"), [NO_CLASS, "class_pth"]),
        (cell("{class_path: GRU, init_args: five}"), [NO_CLASS, "'init_args': 'five'"]),
        (cell("{class_path: 3}"), [NO_CLASS, "'class_path': 3"]),
        (cell("{class_path: null}"), [NO_CLASS, "'class_path': None"]),
        (cell("{class_path: [GRU]}"), [NO_CLASS, "'class_path': ['GRU']"]),
        (cell("{class_path: ''}"), ["model.cell: there is no class '' for it: give GRU, LSTM, "]),
        ("model:\ndata:\ntrainer:\n", ["no data and model given: name a configuration that has them"]),
        (WITHOUT_TRAINER + "trainer: [1, 2]\n", ["trainer: needs keys and values, got [1, 2]"]),
        (WITHOUT_TRAINER + "trainer: fast\n", ["trainer: needs keys and values, got fast"]),
        (CONFIG + "checkpoint: [1]\n", ["checkpoint: needs keys and values, got [1]"]),
        (CONFIG.replace("  max_steps", "\tmax_steps"), [NO_MAPPING, "cannot start any token", "line 13"]),
        (CONFIG.replace("  max_steps", "   max_steps"), [NO_MAPPING, "line 14"]),
        (CONFIG.replace("max_steps: 10", "max_steps 10"), [NO_MAPPING, "line 14"]),
        (CONFIG.replace("max_steps: 10", "max_steps: *ten"), [NO_MAPPING, "undefined alias"]),
        (CONFIG.replace("10", "!!python/object/apply:os.system [ls]"), [NO_MAPPING, "os.system"]),
        (f"{CONFIG}---\n{CONFIG}", [NO_MAPPING, "expected a single document"]),
        (CONFIG + "\0", [NO_MAPPING, "control characters"]),
        ("model: [", [NO_MAPPING, "line"]),
        ("hello", [NO_MAPPING, "hello"]),
        ("", [NO_MAPPING, "empty"]),
        ("[]", [NO_MAPPING, "[]"]),
        ("\xff", [f"{FILE}not a text in UTF-8"]),
    ],
)
def test_bad_configuration_files(here: Path, capsys: pytest.CaptureFixture[str], text: str, parts: list[str]) -> None:
    (here / "config.yaml").write_text(text, encoding="latin1")
    before = contents(here)
    refused(capsys, ["fit", "--config", "config.yaml"], parts)
    assert contents(here) == before


CASES = [
    Case("no command", [], ["to be one of ", "fit,validate,test,predict,audit"], "", "none"),
    Case(
        "unknown command",
        ["train"],
        ["invalid choice: 'train'", "'fit', 'validate', 'test', 'predict', "],
        "",
        "none",
    ),
    Case(
        "nothing given",
        [],
        ["no data and model given: name a configuration that has them, --config FILE"],
        config="none",
    ),
    Case("folder", ["--config", "."], ["--config: Path is not a file"], config="none"),
    Case(
        "no such file",
        ["--config", "k\u00e4se.yaml"],
        ["--config: File does not exist", "k\u00e4se.yaml"],
        config="none",
    ),
    Case(
        "of two files the second",
        ["--config", "{trainer: {max_steps: 3}}", "--config", "bad.yaml"],
        ["--config bad.yaml: trainer.max_steps: needs int, got ten"],
    ),
    Case("no file", ["--config", "[]"], ["--config: not a YAML mapping of keys to values: []"]),
    Case(
        "before the command",
        ["--config", "config.yaml", "fit"],
        ["--config config.yaml: unknown key seed_everything before the command: give one of audit, config, fit, "],
        "",
        "none",
    ),
    Case("no name", ["--config"], ["--config: expected one argument"], config="none"),
    Case("unknown option", ["--unknown_option", "x"], ["unknown key unknown_option: give one of "], config="none"),
    Case("unknown option of a command", ["--memory"], ["unknown key memory: ", ", steps, tf32"], "audit"),
    Case("unknown section", ["--dta.n_min", "3"], ["unknown key dta: did you mean data?"]),
    Case("letter missing", ["--checkpoint.monitr=x"], ["unknown key checkpoint.monitr: did you mean monitor?"]),
    Case(
        "letter missing in a list",
        ["--trainer.callback+=EMA"],
        ["unknown key trainer.callback: did you mean callbacks"],
    ),
    Case("one dash", ["-trainer.max_steps", "3"], ["-trainer.max_steps is no option: give --trainer.max_steps"]),
    Case("one dash before a class", ["-model.gradient.window=3"], ["is no option: give --model.gradient.window"]),
    Case("no list", ["--seed_everything+=3"], ["--seed_everything+ is no option: give --seed_everything"]),
    Case("hyphen", ["--trainer.max-steps", "3"], ["unknown key trainer.max-steps: did you mean max_steps or "]),
    Case("empty option of a class", ["--model.gradient.foo={}"], ["unknown key model.gradient.foo: RTRL takes window"]),
    Case("no option", ["10"], ["10 is no option: options begin with --"]),
    Case("several words", ["more", "words", "--trainer.max_steps=3"], ["more is no option: options begin with --"]),
    Case("no model", ["--model=null"], ["no model given"]),
    Case("no data", ["--data=null"], ["no data given"], "validate"),
    Case("no cell", ["--model.cell=null"], ["model: cell is missing: SequenceModule takes cell, "]),
    Case("no optimizer", ["--model.optimizer=null"], ["model.optimizer must be an optimizer, got null"]),
    Case(
        "a list for a class",
        ["--data", "[1]"],
        ["data: needs the name of a class, or class_path and init_args", "got [1]"],
    ),
    Case("gradient for a cell", ["--model.cell=RTRL"], ["model.cell: there is no class RTRL for it: give GRU, LSTM, "]),
    Case(
        "cell for a gradient", ["--model.gradient=GRU"], ["model.gradient: there is no class GRU for it: give BPTT, "]
    ),
    Case(
        "optimizer for a cell",
        ["--model.cell=torch.optim.Adam"],
        ["model.cell: there is no class torch.optim.Adam for it: "],
    ),
    Case(
        "function for a cell",
        ["--model.cell=os.getcwd"],
        ["model.cell: there is no class os.getcwd for it: give GRU, "],
    ),
    Case(
        "data for a model",
        ["--model=AnBnDataModule"],
        ["model: there is no class AnBnDataModule for it: give Reasoning"],
    ),
    Case(
        "model for data",
        ["--data=SequenceModule"],
        ["data: there is no class SequenceModule for it: give AnBnDataModule, "],
    ),
    Case(
        "cell for an optimizer",
        ["--model.optimizer=GRU"],
        ["model.optimizer: there is no class GRU for it: give AdamATan2, "],
    ),
    Case(
        "torch's GRU for a cell",
        ["--model.cell=torch.nn.GRU"],
        ["model.cell: there is no class torch.nn.GRU for it: give GRU, LSTM, ", "TorchCell, "],
    ),
    Case(
        "a layer without options for a cell",
        ["--model.cell=torch.nn.Linear"],
        ["model.cell: there is no class torch.nn.Linear for it: give GRU, LSTM, "],
    ),
    Case(
        "a module without options for a cell",
        ["--model.cell=tests.bad_input.test_configurations.Own"],
        ["model.cell: width is missing: Own takes width"],
    ),
    Case(
        "a module for a cell",
        ["--model.cell=tests.bad_input.test_configurations.Own", "--model.cell.width=3"],
        ["model: Own is no cell: it has no state_size and no initial_state; a cell has state_size, "],
    ),
    Case(
        "a layer for an optimizer",
        ["--model.optimizer=torch.nn.Linear", "--model.optimizer.in_features=3"],
        ["model.optimizer: there is no class torch.nn.Linear for it: give AdamATan2, SignSGD, "],
    ),
    Case(
        "a layer for a schedule",
        ["--model.lr_scheduler=torch.nn.Linear"],
        ["model.lr_scheduler: there is no class torch.nn.Linear for it: give Warmup, ConstantLR, "],
    ),
    Case(
        "a schedule by figures",
        ["--model.lr_scheduler=ReduceLROnPlateau"],
        ["model.lr_scheduler: there is no class ReduceLROnPlateau for it: give Warmup, ConstantLR, "],
    ),
    Case(
        "no readout",
        ["--model.readout=Nope"],
        ["model.readout: there is no class Nope for it: give MLP, SlotAttention, or"],
    ),
    Case(
        "no loss",
        ["--model.loss=Nope"],
        ["model.loss: there is no class Nope for it: give WeightedCrossEntropy, or the"],
    ),
    Case(
        "a layer for a cell",
        ["--model.cell=torch.nn.Linear", "--model.cell.in_features=3", "--model.cell.out_features=5"],
        ["model.cell: there is no class torch.nn.Linear for it: give GRU, LSTM, "],
    ),
    Case(
        "options of another class",
        ["--model.cell=LSTM", "--model.cell.num_experts=5"],
        ["unknown key model.cell.num_experts: LSTM takes"],
    ),
    Case(
        "puzzles for sequences",
        ["--data=MazeDataModule"],
        ["data: SequenceModule reads sequences, got puzzles of MazeDataModule"],
    ),
    Case(
        "sequences for puzzles",
        ["--data=AnBnDataModule"],
        ["data: ReasoningModule needs a PuzzleDataModule, got AnBnDataModule"],
        config="bare",
    ),
    Case(
        "readout",
        ["--model.readout=torch.nn.Identity"],
        ["model.readout (Identity) returns (5,) values for a state; the data needs (2,)"],
    ),
]


@table(CASES)
def test_refused(here: Path, capsys: pytest.CaptureFixture[str], case: Case) -> None:
    (here / "bad.yaml").write_text("trainer: {max_steps: ten}\n")
    run(case, here, capsys)


def test_an_alias_a_merge_and_names_with_dots_are_taken(here: Path) -> None:
    parts = "data: &same {class_path: AnBnDataModule}\n", "trainer: {<<: {max_steps: 2}}\n", "$schema: a\n"
    (here / "more.yaml").write_text("".join([*parts, "model.gradient.init_args: {window: 2}\n"]))
    line = CommandLine(["fit", "--config", "config.yaml", "--config", "more.yaml"])
    assert (line.trainer.max_steps, line.model.gradient.window) == (2, 2)


def test_of_an_option_that_is_given_twice_the_last_counts(here: Path) -> None:
    callbacks = ["--trainer.callbacks=RoutingPicture", "--trainer.callbacks=EMA", "--trainer.callbacks+=IdleWatch"]
    options = ["--config=config.yaml", "--trainer.max_steps=3", "--trainer.max_steps=2", *callbacks]
    trainer: Any = CommandLine(["fit", *options]).trainer
    assert trainer.max_steps == 2
    assert [type(callback).__name__ for callback in trainer.callbacks][:2] == ["EMA", "IdleWatch"]


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
