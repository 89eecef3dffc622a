"""Errors of objects of a configuration name their options' path in it."""

import pickle
from pathlib import Path

import pytest
from jsonargparse import Namespace
from torch.optim import SGD

from rtrl_moe_pl.cells import GRU
from rtrl_moe_pl.cli import CommandLine
from rtrl_moe_pl.cli.messages import locate
from tests.test_cli import CONFIG as SEQUENCES


def at(class_path: str, **options: object) -> Namespace:
    return Namespace(class_path=class_path, init_args=Namespace(**options))


CONFIG = Namespace(
    trainer=Namespace(callbacks=[at("rtrl_moe_pl.training.EMA", decay=2.0)], max_steps=3),
    model=at(
        "rtrl_moe_pl.modules.ReasoningModule",
        kl_weight=0.0,
        optimizer=at("torch.optim.SGD", lr=0.1),
        embedding_optimizer=at("torch.optim.SGD", lr=float("nan")),
    ),
    checkpoint=Namespace(mode="max", monitor=None),
)


class EMA: ...


class BestCheckpoint: ...


@pytest.mark.parametrize(
    ("made", "given", "message", "located"),
    [
        (EMA, {"decay": 2.0}, "decay must be below 1", "trainer.callbacks.decay must be below 1"),
        (EMA, {"decay": 2.0}, "decays are small", "trainer.callbacks: decays are small"),
        (SGD, {"lr": 0.1, "params": []}, "Invalid learning rate", "model.optimizer: Invalid learning rate"),
        (SGD, {"lr": float("nan")}, "lr must be finite", "model.embedding_optimizer.lr must be finite"),
        (BestCheckpoint, {"mode": "max", "monitor": None}, "mode is unknown", "checkpoint.mode is unknown"),
        (SGD, {"lr": 0.1}, "model.optimizer.lr must be finite", "model.optimizer.lr must be finite"),
        (GRU, {"lr": 0.1}, "lr must be finite", "lr must be finite"),
    ],
)
def test_the_path_of_the_option_or_of_its_class_comes_first(
    made: type, given: dict[str, object], message: str, located: str
) -> None:
    error = ValueError(message)
    locate(error, made, given, CONFIG)
    assert str(error) == located


def test_a_configured_optimizer_is_copied_without_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(SEQUENCES)
    options = ["--config", str(tmp_path / "config.yaml"), "--trainer.default_root_dir", str(tmp_path)]
    line = CommandLine(["fit", *options, "--trainer.max_steps=1"])
    pickle.loads(pickle.dumps(line.model.optimizer))


def test_errors_that_are_no_sentence_stay_as_they_are() -> None:
    error = FileNotFoundError(2, "No such file", "a")
    locate(error, SGD, {"lr": 0.1}, CONFIG)
    assert error.args == (2, "No such file")
