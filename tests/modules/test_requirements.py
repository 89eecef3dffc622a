"""Batches of a user's own data that would fail later in other words, or train wrongly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rtrl_moe_pl.data import AnBnDataModule, Batch
from rtrl_moe_pl.gradients import TBPTT
from rtrl_moe_pl.modules.losses import WeightedCrossEntropy
from rtrl_moe_pl.modules.requirements import require_batch
from tests.modules.helpers import data, module, trainer

INPUTS, LABELS, WEIGHTS = torch.zeros(4, 6, 3), torch.zeros(4, 6, dtype=torch.long), torch.ones(4, 6)
STARTS = torch.zeros(4, 6, dtype=torch.bool)


def batch(inputs: Any = INPUTS, labels: Any = LABELS, weights: Any = WEIGHTS, starts: Any = STARTS) -> Batch:
    return Batch(inputs, (labels, weights), starts)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((INPUTS, LABELS), r"batches must be rtrl_moe_pl\.data\.Batch\(inputs .*, got tuple"),
        ("words", "batches must be .*, got str"),
        (batch(INPUTS.double()), r"inputs are torch\.float64, the model is torch\.float32"),
        (batch(labels=LABELS.float()), r"labels of a batch must be int64, got torch\.float32"),
        (batch(labels=LABELS + 2), r"labels of a batch must be 0 to 1 \(data\.output_size is 2\), got 2"),
        (batch(labels=LABELS - 1), "labels of a batch must be 0 to 1 .*, got -1"),
        (batch(labels=LABELS.T), r"labels of a batch must be \[4, 6\] as its inputs, got \[6, 4\]"),
        (batch(weights=WEIGHTS[:, 1:]), r"weights of a batch must be \[4, 6\] as its inputs, got \[4, 5\]"),
        (batch(weights=LABELS), r"weights of a batch must be floating point, got torch\.int64"),
        (batch(weights=-WEIGHTS), "weights of a batch must be at least 0, got -1"),
        (batch(starts=WEIGHTS), r"starts of a batch must be bool, or None, got torch\.float32"),
        (batch(starts=3), "starts of a batch must be bool, or None, got int"),
    ],
)
def test_what_is_no_batch_is_named(given: Any, said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^data: {said}"):
        require_batch(given, 2, torch.float32, WeightedCrossEntropy())


def test_what_is_one_is_taken() -> None:
    for good in (batch(), batch(starts=None), batch(labels=LABELS - 100), batch(torch.zeros(4, 6, dtype=torch.long))):
        require_batch(good, 2, torch.float32, WeightedCrossEntropy())
    require_batch(batch(labels=INPUTS), 2, torch.float32, nn.Identity())  # labels of another loss are its own affair


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_first_batches_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str) -> None:
    given = AnBnDataModule.on_after_batch_transfer

    def wrong(self: AnBnDataModule, request: Any, index: int) -> Any:
        made = given(self, request, index)
        labels, weights = made.targets
        return made._replace(targets=(labels + 7, weights)) if request.split.startswith(split) else made

    monkeypatch.setattr(AnBnDataModule, "on_after_batch_transfer", wrong)
    with pytest.raises(ValueError, match=r"^data: labels of a batch must be 0 to 1 .*, got 7"):
        trainer(tmp_path, limit_val_batches=1, num_sanity_val_steps=1).fit(module(), datamodule=data())


def test_windows_longer_than_a_batch_are_warned_of(tmp_path: Path) -> None:
    """Truncation controls rest on the number."""
    with pytest.warns(UserWarning, match=r"cut after the 6 steps of a batch, and trains as TBPTT\(window=6\)"):
        trainer(tmp_path, max_steps=2).fit(module(gradient=TBPTT(window=8)), datamodule=data(steps_per_batch=6))
    trainer(tmp_path, max_steps=2).fit(module(gradient=TBPTT(window=6)), datamodule=data(steps_per_batch=6))
