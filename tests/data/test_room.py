"""Batches that do not fit in the free memory are refused before they are made."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rtrl_moe_pl.data import AnBnDataModule, PuzzleDemoDataModule
from rtrl_moe_pl.gradients import MemoryForecastError

SIZES = {"batch_size": 4, "validation_size": 16, "validation_batch_size": 8}


def with_free(monkeypatch: pytest.MonkeyPatch, free: float) -> None:
    monkeypatch.setattr("rtrl_moe_pl.data.base.free_memory", lambda device: free)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"steps_per_batch": 50}, 4 * 50),
        ({"layout": "sequences", "n_max": 12}, 4 * 25),
        ({"layout": "sequences", "n_max": 12, "validation_window": 2}, 4 * 25),  # of evaluation alone
    ],
)
@pytest.mark.parametrize(("encoding", "step"), [("ids", 100), ("one_hot", 115)])
def test_training_takes_about_100_bytes_a_step_and_five_a_token(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], steps: int, encoding: Any, step: int
) -> None:
    data = AnBnDataModule(**SIZES, **options, encoding=encoding)
    with_free(monkeypatch, steps * step)
    data.train_dataloader()
    with_free(monkeypatch, steps * step - 1)
    with pytest.raises(
        MemoryForecastError, match=r"^data: a training batch of 4 x \d+ steps, of AnBn\(.* are free: lower"
    ):
        data.train_dataloader()


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, 8 * 33),
        ({"validation_scales": [1, 4]}, 8 * 4 * 32 + 8),
        ({"validation_window": 5}, 8 * 5),
        ({"validation_window": 50}, 8 * 33),
        ({"validation_size": 3}, 3 * 33),
    ],
)
def test_evaluation_takes_the_longest_sequences_or_a_window_of_them(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], steps: int
) -> None:
    data = AnBnDataModule(**{**SIZES, "validation_scales": [1], **options}, encoding="ids")
    for loaders in (data.val_dataloader, data.test_dataloader):
        with_free(monkeypatch, steps * 100)
        loaders()
        with_free(monkeypatch, steps * 100 - 1)
        with pytest.raises(MemoryForecastError, match=r"lower data\.validation_batch_size, validation_scales or the"):
            loaders()


def test_puzzles_take_about_30_bytes_a_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    data = PuzzleDemoDataModule(size=3, demos=2, **SIZES)  # type: ignore[arg-type]
    puzzle = 3 * 3 * 2 * (1 + 2) * 30
    for loaders, count, option in (
        (data.train_dataloader, 4, "batch_size"),
        (data.val_dataloader, 8, "validation_bat"),
    ):
        with_free(monkeypatch, count * puzzle)
        loaders()
        with_free(monkeypatch, count * puzzle - 1)
        with pytest.raises(MemoryForecastError, match=rf"batch of {count} puzzles takes .*: lower data\.{option}"):
            loaders()


@pytest.mark.parametrize("kind", [AnBnDataModule, PuzzleDemoDataModule])
def test_an_evaluation_batch_has_no_more_lanes_than_there_are_to_evaluate(kind: Any) -> None:
    whole, more = (kind(**{**SIZES, "validation_batch_size": size}) for size in (16, 10**12))
    [first], [second] = ([*data.val_dataloader()[0]] for data in (whole, more))
    assert len(whole.on_after_batch_transfer(first, 0)[0]) == 16
    assert torch.equal(whole.on_after_batch_transfer(first, 0)[0], more.on_after_batch_transfer(second, 0)[0])
