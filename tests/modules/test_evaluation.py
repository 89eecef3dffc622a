"""Evaluation in windows equals evaluation of whole sequences, in memory that does not grow with their length."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from rtrl_moe_pl.cells import GRU
from rtrl_moe_pl.data import Batch, DelayedCopyDataModule, HaystackDataModule
from rtrl_moe_pl.gradients import RTRL
from rtrl_moe_pl.modules import SequenceModule, sequence
from rtrl_moe_pl.training.callbacks import PredictionWriter
from tests.modules.helpers import data, module, trainer

WINDOWS = [1, 4, 7, 100]  # sequences of a^n b^n have 5 to 9, 11 to 17 and 19 to 33 tokens


def figures(folder: Path, stage: str, window: int | None, **options: Any) -> dict[str, float]:
    """What validation or test reports: three sets of 8 sequences, in batches of 3, 3 and 2."""
    run, source = trainer(folder, limit_val_batches=1.0), data(validation_batch_size=3, validation_window=window)
    evaluate = run.validate if stage == "val" else run.test
    return {name: value for loader in evaluate(module(), source, verbose=False) for name, value in loader.items()}


@pytest.mark.parametrize("stage", ["val", "test"])
@pytest.mark.parametrize("window", WINDOWS)
def test_windows_equal_whole_sequences(tmp_path: Path, stage: str, window: int) -> None:
    whole, windows = figures(tmp_path, stage, None), figures(tmp_path, stage, window)
    assert {f"{stage}/accuracy", f"{stage}/accuracy_2x", f"{stage}/loss_4x"} <= whole.keys() == windows.keys()
    for name, value in whole.items():
        assert windows[name] == (value if "accuracy" in name else pytest.approx(value, rel=1e-6)), name


def test_every_step_equals_whole_sequences(tmp_path: Path) -> None:
    """Of a task that asks at every step."""
    torch.manual_seed(0)
    model = SequenceModule(GRU(4, 5), 4, RTRL(window=4))
    got = []
    for window in (None, 7):
        source = DelayedCopyDataModule(delay=2, length=30, validation_size=5, validation_window=window)
        got.append(trainer(tmp_path, limit_val_batches=1.0).validate(model, source, verbose=False)[0])
    assert got[0]["val/accuracy"] == got[1]["val/accuracy"]
    assert got[0]["val/loss"] == pytest.approx(got[1]["val/loss"], rel=1e-6)


def test_without_the_carried_state_they_would_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the comparison sees windows that each begin at the initial state."""
    whole, go_on = figures(tmp_path, "val", None), sequence.go_on
    monkeypatch.setattr(sequence, "go_on", lambda cell, readout, x, starts, _: go_on(cell, readout, x, starts, None))
    windows = figures(tmp_path, "val", 4)
    assert windows["val/loss"] != pytest.approx(whole["val/loss"], rel=1e-4)


def test_predictions_equal_those_of_whole_sequences(tmp_path: Path) -> None:
    """Outputs, and the rows of predictions.csv, which number batches of sequences and their steps."""
    outputs, rows = [], []
    for window in (None, 4):
        folder = tmp_path / str(window)
        source = data(validation_size=5, validation_batch_size=3, validation_window=window)
        predicted = trainer(folder, callbacks=[PredictionWriter()]).predict(module(), datamodule=source)
        assert predicted is not None
        outputs.append(predicted)
        rows.append(sorted(csv.reader((folder / "predictions.csv").open())))  # windows write early ends first
    whole, windows = outputs
    assert [part.shape[1] for part in windows] == [4, 4, 1] * 2
    torch.testing.assert_close(torch.cat(windows[:3], 1), whole[0])
    torch.testing.assert_close(torch.cat(windows[3:], 1), whole[1])
    assert rows[0] == rows[1]
    assert {row[0] for row in rows[0]} == {"0", "1", "batch"}


def test_evaluation_leaves_the_training_carry_alone(tmp_path: Path) -> None:
    """Windows in mid-epoch, between windows of a stream: the same weights as without any validation."""
    results = []
    for limit in (0, 1.0):
        model = module()
        options = {"limit_val_batches": limit, "val_check_interval": 2 if limit else 1.0}
        trainer(tmp_path, max_steps=9, **options).fit(model, datamodule=data(validation_window=4))
        results.append(torch.cat([p.flatten() for p in model.parameters()]).detach())
    assert torch.equal(*results)


class Shapes(Callback):
    """Records how much one evaluation batch holds, and what is carried to the next."""

    def __init__(self) -> None:
        self.largest = 0
        self.count = 0

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        assert isinstance(outputs, torch.Tensor)
        assert isinstance(pl_module, SequenceModule)
        assert pl_module._evaluated is not None
        tensors = (batch.inputs, outputs, *batch.targets, pl_module._evaluated[1])
        self.largest = max(self.largest, *(tensor.numel() for tensor in tensors))
        self.count += 1


def test_memory_does_not_grow_with_the_length(tmp_path: Path) -> None:
    """Nor does what comes before the first batch: a million tokens begin at once."""
    torch.manual_seed(0)
    largest = []
    for length in (100, 3000, 1 << 20):
        shapes = Shapes()
        source = HaystackDataModule(
            length=length, validation_size=3, validation_scales=[1], validation_window=100, batch_size=2
        )
        run = trainer(tmp_path, limit_test_batches=30, callbacks=[shapes])
        run.test(SequenceModule(GRU(8, 5), 4, RTRL(window=4)), source, verbose=False)
        assert shapes.count == min(30, length // 100)
        largest.append(shapes.largest)
    assert largest == [3 * 100 * 8] * 3


def loader(*batches: tuple[int, bool]) -> DataLoader:
    """Batches of (lanes, whether they start at column 0)."""
    made = []
    for lanes, start in batches:
        starts = torch.zeros(lanes, 6, dtype=torch.bool)
        starts[:, 0] = start
        made.append(Batch(torch.randn(lanes, 6, 3), (torch.zeros(lanes, 6).long(), torch.ones(lanes, 6)), starts))
    return DataLoader(made, batch_size=None)  # type: ignore[arg-type]


def test_lanes_that_go_on_keep_their_number(tmp_path: Path) -> None:
    run = trainer(tmp_path, limit_val_batches=1.0)
    with pytest.raises(ValueError, match="the evaluation batch has 2 lanes, but 3 go on from the last one"):
        run.validate(module(), loader((3, True), (2, False)), verbose=False)
    run.validate(module(), loader((3, True), (2, True)), verbose=False)


def test_nothing_goes_on_from_one_loader_or_validation_to_the_next(tmp_path: Path) -> None:
    model, first, again = module(), loader((3, True)), loader((3, False))
    [alone] = trainer(tmp_path, limit_val_batches=1.0).validate(model, again, verbose=False)
    # begun at the initial state, as a first batch without starts always was
    run = trainer(tmp_path, limit_val_batches=1.0)
    assert run.validate(model, [first, again], verbose=False)[1]["val/loss_1"] == alone["val/loss"]
    run = trainer(tmp_path, limit_val_batches=1.0)
    for _ in range(2):
        assert run.validate(model, again, verbose=False)[0]["val/loss"] == alone["val/loss"]
