"""Optimizers and schedules of a run: what has no effect is said."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR, StepLR

from rtrl_moe_pl.training import Warmup
from tests.modules.helpers import data, module, trainer


def one_cycle(optimizer: Any) -> OneCycleLR:
    return OneCycleLR(optimizer, max_lr=0.01, total_steps=7)


def cyclic(optimizer: Any) -> CyclicLR:
    return CyclicLR(optimizer, base_lr=0.01, max_lr=0.1)


@pytest.mark.parametrize(
    ("rate", "schedule", "said"),
    [
        (0.3, one_cycle, "model.lr_scheduler sets it, a OneCycleLR with max_lr=0.01: change it there"),
        (
            0.3,
            cyclic,
            "model.lr_scheduler sets it, a CyclicLR with base_lr=0.01 and max_lr=0.1: change it there",
        ),
        (0.01, one_cycle, None),  # the same
        (0.1, cyclic, None),
        (None, one_cycle, None),  # the optimizer's default: nobody gave it
        (None, cyclic, None),
        (0.3, lambda optimizer: Warmup(optimizer, 2), None),  # of this rate
        (0.3, lambda optimizer: StepLR(optimizer, 2), None),
    ],
)
def test_a_learning_rate_that_a_schedule_sets_otherwise_is_warned_of(
    tmp_path: Path, rate: float | None, schedule: Any, said: str | None
) -> None:
    made = partial(SGD, momentum=0.9) if schedule is cyclic else Adam
    options: Any = {} if rate is None else {"lr": rate}
    model = module(optimizer=lambda parameters: made(parameters, **options), lr_scheduler=schedule)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer(tmp_path, max_steps=2).fit(model, datamodule=data())
    texts = [str(one.message) for one in found if "learning rate" in str(one.message)]
    assert texts == ([] if said is None else [f"the learning rate {rate} of an optimizer is not used: {said}"])
