"""Sums between two logs, without the time that validation takes."""

import pytest
import torch

from rtrl_moe_pl.gradients import WindowResult
from rtrl_moe_pl.modules import figures


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that shows its last entry."""
    times = [100.0]
    monkeypatch.setattr(figures.time, "perf_counter", lambda: times[-1])
    return times


def result(loss: float, outputs: list[list[float]]) -> WindowResult:
    return WindowResult(torch.tensor(loss), torch.tensor([outputs]), {}, None)  # type: ignore[arg-type]


def test_means_per_weight_and_speed(clock: list[float]) -> None:
    training = figures.TrainingFigures()
    labels, weights = torch.tensor([[0, 1]]), torch.tensor([[1.0, 3.0]])
    training.add(result(2.0, [[1.0, 0.0], [1.0, 0.0]]), (labels, weights), weights.sum())  # right, wrong
    clock.append(101.0)
    training.pause()
    clock.append(150.0)
    training.resume()
    training.add(result(6.0, [[0.0, 1.0], [0.0, 1.0]]), (labels, weights), weights.sum())  # wrong, right
    clock.append(151.0)
    assert training.read(torch.tensor([1.0, 3.0]), torch.tensor(4.0)) == {
        "train/tokens_per_second": 4 / 2,
        "train/state_norm": (1 + 3) / 2,
        "train/influence_norm": 4.0,
        "train/loss": (2 + 6) / 8,
        "train/accuracy": (1 + 3) / 8,
    }


def test_no_loss_without_weight(clock: list[float]) -> None:
    training = figures.TrainingFigures()
    labels, weights = torch.tensor([[0]]), torch.tensor([[0.0]])
    training.add(result(0.0, [[1.0, 0.0]]), (labels, weights), weights.sum())
    clock.append(102.0)
    assert "train/loss" not in training.read(torch.ones(1), torch.ones(()))
