"""Annealed gates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning import Trainer

from rtrl_moe_pl.cells import GRU, RecurrentMoE
from rtrl_moe_pl.data import AnBnDataModule
from rtrl_moe_pl.gradients import RTRL, LazyExpertRTRL
from rtrl_moe_pl.modules import SequenceModule, SlotAttention, TemperatureAnnealing


def fit(cell: torch.nn.Module, callback: TemperatureAnnealing, folder: Path, batches: int) -> Trainer:
    data = AnBnDataModule(2, 4, batch_size=4, steps_per_batch=8, batches_per_epoch=100, validation_size=8)
    trainer = Trainer(
        max_epochs=1,
        limit_train_batches=batches,
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    gradient = LazyExpertRTRL(window=4) if isinstance(cell, RecurrentMoE) else RTRL(window=4)
    trainer.fit(SequenceModule(cell, 2, gradient), data)
    return trainer


def test_temperature_falls_by_a_factor_a_batch(tmp_path: Path) -> None:
    cell = RecurrentMoE(3, 4, 3, 2)
    annealing = TemperatureAnnealing(1.0, 0.25, batches=4)
    fit(cell, annealing, tmp_path, 3)
    assert cell.temperature == pytest.approx(0.5)  # of the third batch
    assert [annealing.at(batch) for batch in (0, 2, 4, 100)] == pytest.approx([1.0, 0.5, 0.25, 0.25])
    for temperature in (cell.temperature, 0.3):  # 0.3 is no number of float32
        cell.temperature, other = temperature, RecurrentMoE(3, 4, 3, 2)
        other.load_state_dict(cell.state_dict())
        assert other.temperature == temperature


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="end must be a finite number above 0, got 0"):
        TemperatureAnnealing(1.0, 0)
    with pytest.raises(TypeError, match="needs a cell with a temperature, such as RecurrentMoE, got GRU"):
        fit(GRU(3, 4), TemperatureAnnealing(), tmp_path, 1)


def test_attention_over_slots() -> None:
    """Every slot counts, by what it holds and by which it is; the query is the input's."""
    torch.manual_seed(0)
    readout = SlotAttention(3, num_slots=4, slot_size=5, output_size=2)
    state, x = torch.randn(6, 20, requires_grad=True), torch.randn(6, 3)
    outputs = readout(state, x)
    assert outputs.shape == (6, 2)
    (gradient,) = torch.autograd.grad(outputs.sum(), state)
    assert bool((gradient.view(6, 4, 5).abs().sum(-1) > 0).all())
    assert not torch.allclose(readout(state, x.roll(1, 0)), outputs)
    swapped = state.view(6, 4, 5)[:, [1, 0, 2, 3]].flatten(1)
    assert not torch.allclose(readout(swapped, x), outputs)
