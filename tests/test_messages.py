"""Errors of objects of a configuration name their options' path in it."""

import pickle
from pathlib import Path

import pytest
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelSummary
from torch import optim
from torch.nn import Identity
from torch.optim import AdamW, RMSprop

from rtrl_moe_pl.cells import GRU
from rtrl_moe_pl.cli import CommandLine
from rtrl_moe_pl.cli.messages import locate
from rtrl_moe_pl.training import EMA
from rtrl_moe_pl.training.callbacks import BestCheckpoint
from tests.test_cli import CONFIG as SEQUENCES


def at(class_path: str, **options: object) -> Namespace:
    return Namespace(class_path=class_path, init_args=Namespace(**options))


CONFIG = Namespace(
    trainer=Namespace(
        callbacks=[
            at("rtrl_moe_pl.training.EMA", decay=2.0),
            at("lightning.pytorch.callbacks.ModelSummary", max_depth=-2),
        ],
        plugins=[at("torch.nn.Identity")],
        max_steps=3,
    ),
    model=at(
        "rtrl_moe_pl.modules.ReasoningModule",
        loss=Namespace(),
        optimizer=at("torch.optim.AdamW", lr=0.1, betas=[0.9, 2.0], foreach=None),
        embedding_optimizer=at("torch.optim.AdamW", lr=0.1, betas=(0.9, 0.9), foreach=True),
        encoder=at("torch.optim.SGD", lr=float("nan"), momentum=0.5, groups=[at("torch.nn.Identity")]),
        halting=at("torch.optim.RMSprop", lr=0.1),
        decoder=at("torch.optim.RMSprop", lr=0.1),
    ),
    checkpoint=Namespace(mode="max", monitor=None),
)


class SGD:
    """Not torch's."""


@pytest.mark.parametrize(
    ("made", "given", "message", "located"),
    [
        (EMA, {"decay": 2.0}, "decay must be below 1", "trainer.callbacks (EMA).decay must be below 1"),
        (ModelSummary, {"max_depth": -2}, "`max_depth` is", "trainer.callbacks (ModelSummary): `max_depth` is"),
        (Identity, {}, "no input", "Identity: no input"),
        (EMA, {"decay": 2.0}, "decay of precision", "trainer.callbacks (EMA): decay of precision"),
        (EMA, {"decay": 2.0}, "decay: too large", "trainer.callbacks (EMA).decay: too large"),
        (EMA, {"decay": 2.0}, "decay (of 1) must be", "trainer.callbacks (EMA).decay (of 1) must be"),
        (EMA, {"decay": 2.0}, "decay + a must be", "trainer.callbacks (EMA).decay + a must be"),
        (EMA, {"decay": 2.0}, "decay=2.0 is", "trainer.callbacks (EMA).decay=2.0 is"),
        (
            AdamW,
            {"lr": 0.1, "betas": (0.9, 2.0), "foreach": None, "params": []},
            "Invalid beta",
            "model.optimizer: Invalid beta",
        ),
        (
            AdamW,
            {"lr": 0.1, "betas": [0.9, 0.9], "foreach": True},
            "betas must differ",
            "model.embedding_optimizer.betas must differ",
        ),
        (AdamW, {"lr": 0.1, "betas": (0.9, 2.0), "foreach": True}, "Invalid beta", "Invalid beta"),
        (
            optim.SGD,
            {"lr": float("nan"), "momentum": 0.5, "groups": [Identity()]},
            "lr must be finite",
            "model.encoder.lr must be finite",
        ),
        (SGD, {"lr": float("nan"), "momentum": 0.5}, "lr must be finite", "lr must be finite"),
        (RMSprop, {"lr": 0.1}, "lr must be finite", "RMSprop.lr must be finite"),
        (dict, {}, "empty", "empty"),
        (BestCheckpoint, {"mode": "max", "monitor": None}, "mode has no", "checkpoint.mode has no"),
        (BestCheckpoint, {"mode": "max", "monitor": "a"}, "mode has no", "mode has no"),
        (AdamW, {"lr": 0.1}, "model.optimizer.lr must be finite", "model.optimizer.lr must be finite"),
        (GRU, {"lr": 0.1}, "lr must be finite", "lr must be finite"),
    ],
)
def test_the_path_of_the_option_or_of_its_class_comes_first(
    made: type, given: dict[str, object], message: str, located: str
) -> None:
    error = ValueError(message)
    locate(error, made, given, CONFIG)
    assert str(error) == located


def test_a_package_that_is_missing_is_said_with_its_option() -> None:
    error = ModuleNotFoundError("Requirement 'wandb' not met")  # shows its msg, not its arguments
    locate(error, ModelSummary, {"max_depth": -2}, CONFIG)
    assert str(error) == "trainer.callbacks (ModelSummary): Requirement 'wandb' not met"


def test_a_configured_optimizer_is_copied_without_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(SEQUENCES)
    options = ["--config", str(tmp_path / "config.yaml"), "--trainer.default_root_dir", str(tmp_path)]
    line = CommandLine(["fit", *options, "--trainer.max_steps=1"])
    pickle.loads(pickle.dumps(line.model.optimizer))


def test_errors_that_are_no_sentence_stay_as_they_are() -> None:
    error = FileNotFoundError(2, "No such file", "a")
    locate(error, SGD, {"lr": 0.1}, CONFIG)
    assert error.args == (2, "No such file")
