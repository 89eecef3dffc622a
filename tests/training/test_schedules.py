"""The schedule by hand, from a configuration, and resumed."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LRSchedulerCallable
from torch import nn
from torch.optim import SGD

from rtrl_moe_pl.training.schedules import Warmup


def sgd() -> SGD:
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 0.01)]
    return SGD(groups)


def rates(schedule: Warmup, steps: int) -> list[float]:
    """The learning rates of the first group at so many optimizer steps; the second has a hundredth."""
    found = []
    for _ in range(steps):
        first, second = (group["lr"] for group in schedule.optimizer.param_groups)
        assert second == pytest.approx(first / 100)
        found.append(first)
        schedule.optimizer.step()
        schedule.step()
    return found


def test_a_linear_warmup_then_a_constant_rate() -> None:
    assert rates(Warmup(sgd(), 4), 7) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1])


def test_a_linear_warmup_then_a_cosine_to_the_final_fraction() -> None:
    found = rates(Warmup(sgd(), 2, total_steps=6, final_fraction=0.2), 9)
    cosine = [0.2 + 0.8 * (1 + math.cos(math.pi * part)) / 2 for part in (0, 0.25, 0.5, 0.75, 1)]
    assert found == pytest.approx([0.5, 1, *cosine, 0.2, 0.2])


@pytest.mark.parametrize("options", [{}, {"total_steps": 1, "final_fraction": 0.0}])
def test_no_warmup_starts_at_the_full_rate(options: dict[str, Any]) -> None:
    assert rates(Warmup(sgd(), 0, **options), 3) == pytest.approx([1, 1, 1] if not options else [1, 0, 0])


def test_a_resumed_schedule_goes_on_and_takes_the_options_of_the_new_run() -> None:
    whole, first = (Warmup(sgd(), 3, total_steps=8, final_fraction=0.1) for _ in range(2))
    expected = rates(whole, 10)[5:]
    rates(first, 5)
    file = io.BytesIO()
    torch.save({"schedule": first.state_dict(), "optimizer": first.optimizer.state_dict()}, file)

    def resumed(**options: Any) -> list[float]:
        schedule = Warmup(sgd(), 3, **options)
        file.seek(0)
        saved = torch.load(file, weights_only=True)  # plain values only
        schedule.load_state_dict(saved["schedule"])
        schedule.optimizer.load_state_dict(saved["optimizer"])
        return rates(schedule, 5)

    assert resumed(total_steps=8, final_fraction=0.1) == expected
    assert resumed() == [expected[0], 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_steps": -1}, "^warmup_steps must be at least 0, got -1$"),
        ({"warmup_steps": 2.5}, "^warmup_steps must be an integer, got 2.5$"),
        ({"warmup_steps": 5, "total_steps": 5, "final_fraction": 0.1}, "^total_steps .* at least 6, got 5$"),
        ({"warmup_steps": 5, "total_steps": 9, "final_fraction": 1.5}, "^final_fraction must be .* got 1.5$"),
        ({"warmup_steps": 5, "total_steps": 9}, "^total_steps=9 and final_fraction=1.0: a cosine needs"),
        ({"warmup_steps": 5, "final_fraction": 0.1}, "^total_steps=None and final_fraction=0.1: a cosine needs"),
    ],
)
def test_a_bad_option_is_named_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Warmup(sgd(), **options)


def test_a_yaml_file_can_name_it() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--lr_scheduler", type=LRSchedulerCallable)
    chosen = {
        "class_path": "rtrl_moe_pl.training.schedules.Warmup",
        "init_args": {"warmup_steps": 2, "total_steps": 4, "final_fraction": 0.5},
    }
    schedule = parser.instantiate(parser.parse_object({"lr_scheduler": chosen})).lr_scheduler(sgd())
    assert rates(schedule, 5) == pytest.approx([0.5, 1, 1, 0.75, 0.5])
