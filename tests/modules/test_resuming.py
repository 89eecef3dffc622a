"""What of a configuration's optimizer and schedule does not take effect on resuming is said, or refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, CyclicLR, OneCycleLR, StepLR

from rtrl_moe_pl.modules import SequenceModule
from rtrl_moe_pl.reasoning import PuzzleEmbedding
from rtrl_moe_pl.training import SignSGD, Warmup
from rtrl_moe_pl.training.strategy import PER_RANK
from tests.modules import reasoning_helpers as puzzles
from tests.modules.helpers import data, module, trainer

Made = Callable[..., Any]


def adam(**options: Any) -> Made:
    return lambda parameters: Adam(parameters, **{"lr": 0.01, **options})


def sgd(**options: Any) -> Made:
    return lambda parameters: SGD(parameters, **{"lr": 0.01, "momentum": 0.9, **options})


def step(**options: Any) -> Made:
    return lambda optimizer: StepLR(optimizer, **{"step_size": 2, **options})


def warmup(**options: Any) -> Made:
    return lambda optimizer: Warmup(optimizer, **{"warmup_steps": 3, **options})


def one_cycle(**options: Any) -> Made:
    return lambda optimizer: OneCycleLR(optimizer, **{"max_lr": 0.01, "total_steps": 7, **options})


def resumed(folder: Path, before: dict[str, Any], after: dict[str, Any], steps: int = 6) -> tuple[list[str], Any]:
    """Warnings of a run of 6 steps that goes on after 4 with other options, and its optimizer."""
    first = trainer(folder, max_steps=4)
    first.fit(module(**before), datamodule=data())
    first.save_checkpoint(folder / "a.ckpt")
    second = trainer(folder, max_steps=steps)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        second.fit(module(**after), datamodule=data(), ckpt_path=str(folder / "a.ckpt"))
    assert second.global_step == steps
    return [
        text for text in (str(w.message) for w in found) if "the checkpoint's optimizer" in text
    ], second.optimizers[0]


SAME: dict[str, dict[str, Any]] = {
    "adam": {"optimizer": adam()},
    "capturable": {"optimizer": adam(lr=torch.tensor(0.01))},
    "step": {"optimizer": sgd(), "lr_scheduler": step()},
    "warmup": {"optimizer": adam(), "lr_scheduler": warmup()},
    "one cycle": {"optimizer": adam(), "lr_scheduler": one_cycle()},
    "cyclic": {"optimizer": sgd(), "lr_scheduler": lambda o: CyclicLR(o, 0.01, 0.1, step_size_up=2)},
    "restarts": {"optimizer": sgd(), "lr_scheduler": lambda o: CosineAnnealingWarmRestarts(o, T_0=2)},
}


@pytest.mark.parametrize("options", SAME.values(), ids=SAME)
def test_an_unchanged_run_warns_of_nothing(tmp_path: Path, options: dict[str, Any]) -> None:
    assert resumed(tmp_path, options, options)[0] == []


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ({"optimizer": adam()}, {"optimizer": adam(lr=0.5)}, "lr is 0.01 there and 0.5 here;"),
        ({"optimizer": adam(lr=torch.tensor(0.5))}, {"optimizer": adam(lr=0.25)}, "lr is 0.5 there and 0.25 here;"),
        (
            {"optimizer": adam()},
            {"optimizer": adam(weight_decay=0.1, betas=(0.8, 0.9))},
            "betas is [0.9, 0.999] there and [0.8, 0.9] here, weight_decay is 0 there and 0.1 here;",
        ),
        (
            {"optimizer": adam(), "lr_scheduler": warmup()},
            {"optimizer": adam(lr=0.5), "lr_scheduler": warmup()},
            "lr is 0.01 there and 0.5 here;",
        ),
        (
            {"optimizer": sgd(), "lr_scheduler": step()},
            {"optimizer": sgd(), "lr_scheduler": step(step_size=3, gamma=0.5)},
            "gamma of the schedule is 0.1 there and 0.5 here, step_size of the schedule is 2 there and 3 here;",
        ),
        (
            {"optimizer": adam(), "lr_scheduler": one_cycle()},
            {"optimizer": adam(), "lr_scheduler": one_cycle(pct_start=0.5)},
            "schedule_phases of the schedule differ;",
        ),
    ],
)
def test_what_is_not_used_is_named(tmp_path: Path, before: dict[str, Any], after: dict[str, Any], said: str) -> None:
    [warning], _ = resumed(tmp_path, before, after)
    begin = "the checkpoint's optimizer goes on as it was, not as the configuration says: "
    assert warning == f"{begin}{said} for other options begin a new run"


def test_the_checkpoints_learning_rate_is_used_indeed(tmp_path: Path) -> None:
    _, optimizer = resumed(tmp_path, {"optimizer": adam()}, {"optimizer": adam(lr=0.5)})
    assert optimizer.param_groups[0]["lr"] == 0.01


def test_options_that_a_checkpoint_does_not_hold_take_effect(tmp_path: Path) -> None:
    before = {"optimizer": adam(), "lr_scheduler": warmup()}
    after = {"optimizer": adam(), "lr_scheduler": warmup(warmup_steps=100)}
    warned, optimizer = resumed(tmp_path, before, after)
    assert warned == []
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * 7 / 100)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ({"lr_scheduler": warmup()}, {"lr_scheduler": step()}, "with Warmup, but the configuration says StepLR"),
        ({}, {"lr_scheduler": warmup()}, "with none, but the configuration says Warmup"),
        ({"lr_scheduler": warmup()}, {}, "with Warmup, but the configuration says none"),
    ],
)
def test_a_schedule_of_another_class_is_refused(
    tmp_path: Path, before: dict[str, Any], after: dict[str, Any], said: str
) -> None:
    with pytest.raises(
        ValueError, match=rf"^model\.lr_scheduler: the checkpoint was made {said}: resume with the same"
    ):
        resumed(tmp_path, before, after)


def test_a_cycle_that_ends_before_the_run_is_refused(tmp_path: Path) -> None:
    before = {"optimizer": adam(), "lr_scheduler": one_cycle()}
    after = {"optimizer": adam(), "lr_scheduler": one_cycle(total_steps=20)}
    said = r"^model\.lr_scheduler: the checkpoint's OneCycleLR ends after total_steps=7, before trainer\.max_steps=20"
    with pytest.raises(ValueError, match=said):
        resumed(tmp_path, before, after, steps=20)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ({"encoder_lr": 0.001}, {"encoder_lr": 0.5}, "lr of the encoder is 0.001 there and 0.5 here"),
        ({}, {"encoder_lr": 0.5}, "lr of the encoder is 0.01 there and 0.5 here"),
        (
            {"encoder": PuzzleEmbedding, "embedding_optimizer": lambda p: SignSGD(p, lr=0.1)},
            {"encoder": PuzzleEmbedding, "embedding_optimizer": lambda p: SignSGD(p, lr=0.2)},
            "lr of the encoder is 0.1 there and 0.2 here",
        ),
    ],
)
def test_the_part_whose_options_differ_is_named(
    tmp_path: Path, before: dict[str, Any], after: dict[str, Any], said: str
) -> None:
    options: dict[str, Any] = {"optimizer": lambda parameters: AdamW(parameters, lr=0.01)}
    made, _ = puzzles.run(tmp_path, puzzles.module(**options, **before), 2)
    made.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match=f"says: {said}; for .* begin a new run from these weights: model.pretrained"):
        puzzles.run(tmp_path, puzzles.module(**options, **after), 3, ckpt_path=str(tmp_path / "a.ckpt"))


@pytest.mark.parametrize("key", ["optimizer_states", "lr_schedulers", "loops", PER_RANK])
def test_a_checkpoint_that_lacks_a_part_is_refused(tmp_path: Path, key: str) -> None:
    first = trainer(tmp_path)
    first.fit(module(), datamodule=data())
    first.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    del checkpoint[key]
    torch.save(checkpoint, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=rf"^--ckpt_path: training cannot go on .*, it holds no {key}: give one"):
        trainer(tmp_path, max_steps=9).fit(module(), datamodule=data(), ckpt_path=str(tmp_path / "a.ckpt"))
    trainer(tmp_path).validate(module(), datamodule=data(), ckpt_path=str(tmp_path / "a.ckpt"), verbose=False)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    first = trainer(tmp_path)
    first.fit(module(), datamodule=data())
    first.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    checkpoint["state_dict"]["cell.input.bias"][3] = torch.nan
    torch.save(checkpoint, tmp_path / "a.ckpt")
    for command in ("fit", "validate", "test"):
        with pytest.raises(ValueError, match=r"^--ckpt_path: cell\.input\.bias of this checkpoint holds NaN"):
            getattr(trainer(tmp_path), command)(module(), datamodule=data(), ckpt_path=str(tmp_path / "a.ckpt"))


def fitted(folder: Path, **options: Any) -> SequenceModule:
    model = module(**options)
    trainer(folder).fit(model, datamodule=data())
    return model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": torch.optim.LBFGS}, "model.optimizer cannot be LBFGS: it computes the loss again"),
        ({"optimizer": torch.optim.SparseAdam}, "model.optimizer cannot be SparseAdam: it takes sparse gradients"),
        ({"optimizer": adam(lr=float("inf"))}, "model.optimizer.lr must be finite, got inf"),
        ({"lr_scheduler": step(step_size=0)}, "model.lr_scheduler.step_size must be at least 1, got 0"),
    ],
)
def test_optimizers_and_schedules_that_cannot_be_used_are_refused_before_training(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        fitted(tmp_path, **options)


@pytest.mark.parametrize("update_every", [1, 2])
def test_a_cycle_is_held_against_epochs_too(tmp_path: Path, update_every: int) -> None:
    steps = 3 * 5 // update_every

    def run(total: int) -> None:
        model = module(lr_scheduler=one_cycle(total_steps=total), update_every=update_every)
        trainer(tmp_path, max_steps=-1, max_epochs=3).fit(model, datamodule=data())

    run(steps + 1)
    with pytest.raises(
        ValueError, match=rf"before the {steps} steps of trainer\.max_epochs=3: set it to {steps + 1}, one more"
    ):
        run(steps - 1)
