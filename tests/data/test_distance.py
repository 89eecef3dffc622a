"""Accuracy by distance: counted by a slow reference, drawn where it belongs."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from rtrl_moe_pl.data import AccuracyByDistance, AnBnDataModule, Batch, HaystackDataModule
from rtrl_moe_pl.data.distance import Distances, draw


class NearSighted(LightningModule):
    """Answers right up to a distance, and wrong beyond it."""

    def __init__(self, sight: int = 22) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.sight = sight
        self.gaps: list[int] = []

    def answer(self, split: str, batch: Batch, loader: int) -> Tensor:
        stream = self.trainer.datamodule.evaluation_stream(split, loader)  # type: ignore[union-attr]
        gaps = stream.task.gaps(stream.seed, batch.sequences)
        labels, weights = batch.targets
        self.gaps += gaps[weights.any(1)].tolist()
        given = torch.where(gaps[:, None] <= self.sight, labels, (labels + 1) % 4)
        return torch.nn.functional.one_hot(given, 4).float()

    def training_step(self, batch: Batch) -> Tensor:
        return self.weight * batch.targets[1].sum()

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self.answer("validation", batch, dataloader_idx)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self.answer("test", batch, dataloader_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.0)


def haystack(**options: Any) -> HaystackDataModule:
    sizes = {"validation_size": 300, "validation_batch_size": 128, "batch_size": 2, "batches_per_epoch": 3}
    return HaystackDataModule(length=64, min_gap=5, **{**sizes, **options})


def trainer(folder: Path, callback: AccuracyByDistance, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "default_root_dir": folder,
        "logger": False,
        "accelerator": "cpu",
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
    }
    return Trainer(callbacks=[callback], **{**defaults, **options})


@pytest.mark.parametrize("window", [None, 10])
def test_counts_equal_a_slow_reference(tmp_path: Path, window: int | None):
    callback, model = AccuracyByDistance(), NearSighted()
    data = haystack(validation_window=window)
    trainer(tmp_path, callback).test(model, data, verbose=False)
    assert [answers.name for answers in callback.latest] == ["length 64", "length 128", "length 256"]
    for number, answers in enumerate(callback.latest):
        assert sum(answers.total) == 300
        gaps = model.gaps[300 * number : 300 * (number + 1)]
        for low, high, total, accuracy in zip(*answers[1:], strict=True):
            inside = [gap for gap in gaps if low <= gap <= high]
            assert total == len(inside) > 0
            assert accuracy == pytest.approx(sum(gap <= 22 for gap in inside) / total)
        assert set(answers.accuracy) == {0.0, 1.0}  # 22 is the last distance of its bin


@pytest.mark.parametrize("bins_per_octave", [1, 2, 5])
def test_bins_are_logarithmic_and_join(bins_per_octave: int):
    edges = AccuracyByDistance(bins_per_octave).edges.tolist()
    assert edges[0] == 1
    assert edges == sorted(set(edges))
    wide = [edge for edge in edges if edge > 1000]
    step = 2 ** (1 / bins_per_octave)
    assert all(math.isclose(b / a, step, rel_tol=1e-2) for a, b in itertools.pairwise(wide))
    assert edges[-1] > 1 << 31


def test_figures_are_written_beside_the_logs(tmp_path: Path):
    callback, model, data = AccuracyByDistance(), NearSighted(), haystack()
    logger = TensorBoardLogger(tmp_path)
    run = trainer(tmp_path, callback, logger=logger)
    run.fit(model, datamodule=data)
    run.test(model, data, verbose=False)
    folder = Path(logger.log_dir)
    for name in ("val_accuracy_by_distance.png", "test_accuracy_by_distance.png"):
        image = imread(folder / name)
        assert image.shape[0] > 400
        assert image.std() > 0.05  # not blank
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    assert set(events.Tags()["images"]) == {"val/accuracy_by_distance", "test/accuracy_by_distance"}
    assert [event.step for event in events.Images("val/accuracy_by_distance")] == [2]  # after the third batch


def test_without_a_logger_it_goes_to_the_root(tmp_path: Path):
    trainer(tmp_path, AccuracyByDistance()).validate(NearSighted(), haystack(), verbose=False)
    assert [path.name for path in tmp_path.iterdir()] == ["val_accuracy_by_distance.png"]


def test_nothing_is_written_in_checks(tmp_path: Path):
    """Nor where the Trainer's limits cut all sequences off before they are asked anything."""
    for options in ({"fast_dev_run": True}, {"num_sanity_val_steps": 2, "limit_val_batches": 1, "max_steps": 1}):
        trainer(tmp_path, AccuracyByDistance(), **options).fit(NearSighted(), datamodule=haystack())
        assert list(tmp_path.iterdir()) == []
    run = trainer(tmp_path, AccuracyByDistance(), limit_test_batches=2)
    run.test(NearSighted(), haystack(validation_window=10), verbose=False)
    assert list(tmp_path.iterdir()) == []


def test_lengths_that_were_not_asked_are_left_out(tmp_path: Path):
    callback = AccuracyByDistance()
    data = haystack(validation_window=64)  # one window: the sequences of 128 steps are cut off before their question
    trainer(tmp_path, callback, limit_val_batches=1).validate(NearSighted(), data, verbose=False)
    assert [sum(answers.total) > 0 for answers in callback.latest] == [True, False, False]
    assert imread(tmp_path / "val_accuracy_by_distance.png").shape[2] == 4


def test_what_is_drawn():
    """Axes say what they show, chance is marked, counts are there."""
    figure = draw([Distances("length 64", [5, 8], [7, 15], [10, 40], [1.0, 0.25])], 0.25, "test")
    assert isinstance(figure, Figure)
    accuracy, counts = figure.axes
    assert accuracy.get_title() == "test"
    assert "accuracy" in accuracy.get_ylabel()
    assert "distance" in counts.get_xlabel()
    assert counts.get_xscale() == "log"
    assert [text.get_text() for text in accuracy.get_legend().get_texts()] == ["chance (25%)", "length 64"]  # type: ignore[union-attr]
    chance = [line for line in accuracy.lines if line.get_linestyle() == "--"]
    assert [list(line.get_ydata()) for line in chance] == [[0.25, 0.25]]  # type: ignore[arg-type]
    assert list(counts.lines[0].get_ydata()) == [10, 40]  # type: ignore[arg-type]


def test_another_task_is_refused(tmp_path: Path):
    with pytest.raises(
        TypeError, match="needs a data module whose task has gaps, such as HaystackDataModule, got AnBn"
    ):
        trainer(tmp_path, AccuracyByDistance()).validate(NearSighted(), AnBnDataModule(), verbose=False)
    with pytest.raises(ValueError, match="bins_per_octave must be at least 1, got 0"):
        AccuracyByDistance(0)
