"""Warnings and TensorBoard's pages, from the command line; no shipped configuration is warned of."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ProgressBar
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData  # type: ignore[attr-defined]

from rtrl_moe_pl.cli import main
from rtrl_moe_pl.cli.command_line import CommandLine
from rtrl_moe_pl.cli.run_callbacks import WATCHES
from rtrl_moe_pl.modules import ReasoningModule, TrainingWarning
from rtrl_moe_pl.training.last_checkpoint import LastCheckpoint
from tests.test_cli import here, python, run  # noqa: F401  # a fixture
from tests.test_configs import CONFIGS, NAMES, load

# Configurations whose steps take longest, in fewer lanes; 30 looks each.
SMALL = {
    "etrm_arc": ["--data.batch_size", "2", "--data.groups", "4", "--data.max_size", "5"],
    "etrm_flips": ["--data.batch_size", "8"],
    "etrm_color_rules": ["--data.batch_size", "8"],
    "trm_sudoku": ["--data.batch_size", "8", "--data.puzzles", "64", "--data.held_out", "16"],
    "trm_sudoku9": ["--data.batch_size", "2", "--data.puzzles", "16", "--data.held_out", "4"],
    "trm_maze": ["--data.batch_size", "4"],
    "anbn_moe_rtrl": ["--data.batch_size", "4"],
    "haystack_1m": ["--data.length", "64", "--data.batch_size", "8"],
}
SLOW = {"etrm_arc", "etrm_flips", "etrm_color_rules", "trm_sudoku", "trm_sudoku9", "trm_maze", "anbn_moe_rtrl"}


def said(arguments: list[str]) -> list[str]:
    """Early warnings of a command that must succeed."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert main(arguments) == 0
    return [str(one.message) for one in caught if one.category is TrainingWarning]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in NAMES])
def test_no_shipped_configuration_is_warned_of(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quiet = ["enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger"]
    options = [part for option in quiet for part in (f"--trainer.{option}", "false")]
    options += ["--trainer.log_every_n_steps", "1", "--trainer.max_steps", "-1", "--trainer.max_epochs", "1"]
    options += ["--data.batches_per_epoch", "30", "--trainer.check_val_every_n_epoch", "5", *SMALL.get(name, [])]
    options += ["--trainer.num_sanity_val_steps", "0", "--trainer.callbacks", "null"]
    assert said(["fit", "--config", str(CONFIGS / f"{name}.yaml"), *options]) == []


def callbacks(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found: list[Any] = []
    monkeypatch.setattr(CommandLine, "after_fit", lambda self: found.extend(self.trainer.callbacks), raising=False)
    assert run("fit", "--trainer.fast_dev_run", "true", *arguments) == 0
    return found


@pytest.mark.usefixtures("here")
def test_cheap_ones_are_there_unless_switched_off_or_given(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [type(c) for c in callbacks(monkeypatch=monkeypatch) if type(c) in WATCHES] == list(WATCHES)
    found = callbacks("--warnings", "false", monkeypatch=monkeypatch)
    assert not any(isinstance(callback, WATCHES) for callback in found)
    given = '[{"class_path": "StalenessWatch", "init_args": {"decay": 0.9}}, {"class_path": "ProbeWatch"}]'
    found = callbacks("--trainer.callbacks", given, monkeypatch=monkeypatch)
    assert sorted(type(c).__name__ for c in found if isinstance(c, WATCHES)) == sorted(c.__name__ for c in WATCHES)
    assert [c.decay for c in found if type(c).__name__ == "StalenessWatch"] == [0.9]


def test_a_warning_is_one_line(here: Path) -> None:  # noqa: F811
    few = ["--trainer.log_every_n_steps", "1", "--trainer.logger", "false", "--trainer.enable_checkpointing", "false"]
    large = ["--model.optimizer", "SGD", "--model.optimizer.lr", "10000"]
    done = python("-m", "rtrl_moe_pl", "fit", "--config", "config.yaml", *large, *few, folder=here)
    assert done.returncode == 0
    lines = done.stderr.splitlines()
    [number] = [number for number, line in enumerate(lines) if "train/update_size" in line]
    assert lines[number].startswith("warning: step 1: train/update_size was")
    assert lines[number].endswith("try a smaller learning rate, or a warmup of it")
    assert not lines[number + 1].startswith(" ")  # no line of source


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder / "lightning_logs/version_0"))
    found.Reload()
    return found


def text(found: EventAccumulator, number: int) -> str:
    return found.Tensors("summary/text_summary")[number].tensor_proto.string_val[0].decode()


def test_tensorboard_has_hyperparameters_and_a_summary(here: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    assert run("forecast") == 0
    forecast = re.search(r"\* RTRL\(window=4\) +yes +(\S+ \S+) +(\S+ \S+) ", capsys.readouterr().out)
    assert forecast is not None
    assert run("fit", "--trainer.log_every_n_steps", "5") == 0
    found = events(here)
    data = HParamsPluginData.FromString(
        found.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    ).session_start_info.hparams
    assert data["model.cell"].string_value == "GRU"
    assert data["model.cell.hidden_size"].number_value == 5
    assert data["model.optimizer.lr"].number_value == 0.01
    assert data["data"].string_value == "AnBnDataModule"
    experiment = HParamsPluginData.FromString(found.summary_metadata["_hparams_/experiment"].plugin_data.content)
    assert [metric.name.tag for metric in experiment.experiment.metric_infos] == ["val/accuracy"]
    assert [event.step for event in found.Scalars("val/accuracy")] == [4, 9]  # no point but those of validation
    assert "hp_metric" not in found.Tags()["scalars"]
    assert [event.value for event in found.Scalars("train/learning_rate")] == [pytest.approx(0.01)] * 2
    for line in (
        "| model | SequenceModule: cell GRU, readout Linear |",
        "| parameters | 162 |",
        "| gradient | RTRL(window=4), exact |",
        f"| forecast memory | {forecast[1]} for the influence, about {forecast[2]} for a chunk",
        "| forecast cost | ",
    ):
        assert line in text(found, 0)
    assert "measured" not in text(found, 0)
    assert "us a token |" in text(found, 1)
    assert len(found.Tensors("summary/text_summary")) == 2


@pytest.mark.parametrize("logger", ["false", "CSVLogger"])
def test_other_loggers_and_none_are_left_alone(here: Path, logger: str) -> None:  # noqa: F811
    options = [] if logger == "false" else ["--trainer.logger.save_dir", str(here)]
    assert run("fit", "--trainer.logger", logger, *options) == 0
    assert not list(here.rglob("events.*"))
    if options:
        [metrics] = here.rglob("metrics.csv")
        assert {"train/update_size", "train/learning_rate"} <= set(metrics.read_text().splitlines()[0].split(","))
        assert yaml.safe_load(next(here.rglob("lightning_logs/*/config.yaml")).read_text())["warnings"] is True


def test_reasoning_has_a_summary_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial steps that forecast it change nothing."""
    monkeypatch.chdir(tmp_path)
    few = ["--trainer.max_steps", "3", "--trainer.limit_val_batches", "0", *SMALL["trm_sudoku"]]
    few += ["--trainer.enable_progress_bar", "false", "--trainer.log_every_n_steps", "1"]
    few += ["--model.halting.max_steps", "1"]
    assert load("trm_sudoku")["checkpoint"]["monitor"] == "val/held_out/exact_accuracy"
    fit = ["fit", "--config", str(CONFIGS / "trm_sudoku.yaml"), *few, "--trainer.callbacks", "null"]
    for logger in ("true", "false"):
        assert main([*fit, "--trainer.logger", logger]) == 0
    one, other = (torch.load(path, weights_only=True)["state_dict"] for path in tmp_path.rglob("last.ckpt"))
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    found = events(tmp_path)
    for line in (
        "| model | ReasoningModule: decoder TRM, encoder PuzzleEmbedding |",
        "| gradient | re_encode, through 1 of 2 rounds of a supervision step |",
        "| forecast memory | about ",
        " for the way back (",
        " operations a cell, where all puzzles begin |",
    ):
        assert line in text(found, 0)
    assert "us a puzzle |" in text(found, 1)
    assert main([*fit, "--trainer.max_steps", "4", "--ckpt_path", "last"]) == 0  # lanes that go on are no fault of it


def test_a_model_that_cannot_be_copied_has_a_shorter_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a run hangs on it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ReasoningModule, "__deepcopy__", lambda *_: 1 / 0, raising=False)
    few = ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "0", *SMALL["trm_sudoku"]]
    few += ["--trainer.enable_checkpointing", "false", "--trainer.callbacks", "null"]
    assert main(["fit", "--config", str(CONFIGS / "trm_sudoku.yaml"), *few]) == 0
    found = text(events(tmp_path), 0)
    assert "| gradient | re_encode" in found
    assert "forecast" not in found


def test_a_given_callback_replaces_the_one_of_its_class(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    options = ["--trainer.callbacks+", "rtrl_moe_pl.training.last_checkpoint.LastCheckpoint"]
    options += ["--trainer.callbacks.keep", "5", "--trainer.callbacks+", "TQDMProgressBar"]
    options += ["--trainer.enable_progress_bar", "true"]
    found = callbacks(*options, monkeypatch=monkeypatch)
    [last] = [callback for callback in found if isinstance(callback, LastCheckpoint)]
    assert last.save_top_k == 5
    assert [type(callback).__name__ for callback in found if isinstance(callback, ProgressBar)] == ["TQDMProgressBar"]
