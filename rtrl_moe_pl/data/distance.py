"""How far back an answer may lie: accuracy by the distance between a value and the question about it."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch import Tensor

from rtrl_moe_pl.data.batch import Batch
from rtrl_moe_pl.training.pictures import picture_folder, show, when

_OCTAVES = 40  # distances of 10^12 steps will do


class Distances(NamedTuple):
    """Answers to one set of sequences, by distance in logarithmic bins; bins nobody fell into are left out."""

    name: str
    low: list[int]  # the least distance of each bin
    high: list[int]  # the largest
    total: list[int]
    accuracy: list[float]


class AccuracyByDistance(Callback):
    """Draws accuracy over the distance from value to question after every validation and test.

    The figure goes to loggers that take figures (TensorBoard), as ``val/accuracy_by_distance`` or
    ``test/accuracy_by_distance``, and beside the logs as ``val_accuracy_by_distance.png`` (of the latest validation)
    or ``test_accuracy_by_distance.png``. Needs a data module whose task has ``gaps`` (`HaystackDataModule`) and a
    module whose validation and test steps return outputs [B, T, O] (`SequenceModule`). Nothing is drawn in sanity
    checks, under ``fast_dev_run``, and where nothing was asked.

    Args:
        bins_per_octave: bins between a distance and its double, at least 1.

    Attributes:
        latest: what was drawn last, one entry per evaluation loader.

    Cost: about 0.4 s a figure; memory does not grow with the number or length of the sequences.
    """

    def __init__(self, bins_per_octave: int = 2) -> None:
        if bins_per_octave < 1:
            raise ValueError(f"bins_per_octave must be at least 1, got {bins_per_octave}")
        edges = {round(2 ** (bin / bins_per_octave)) for bin in range(_OCTAVES * bins_per_octave + 1)}
        self.edges = torch.tensor(sorted(edges))  # the least distance of each bin
        self.latest: list[Distances] = []
        self._counts: dict[int, Tensor] = {}  # by loader: right and all answers [2, bins]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(getattr(data, "task", None), "gaps"):
            raise TypeError(
                "AccuracyByDistance needs a data module whose task has gaps, such as HaystackDataModule, got "
                f"{type(data).__name__}"
            )

    # ---- counting

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._counts = {}

    on_test_start = on_validation_start

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        labels, weights = batch.targets
        lanes, steps = weights.nonzero().unbind(1)
        assert batch.sequences is not None
        stream = data.evaluation_stream("test" if trainer.testing else "validation", dataloader_idx)
        gaps = stream.task.gaps(stream.seed, batch.sequences[lanes])  # type: ignore[attr-defined]
        right = outputs[lanes, steps].argmax(-1) == labels[lanes, steps]
        bins = torch.bucketize(gaps, self.edges.to(gaps.device), right=True) - 1
        counts = self._counts.setdefault(dataloader_idx, gaps.new_zeros(2, len(self.edges)))
        counts[0].index_add_(0, bins, right.long())
        counts[1].index_add_(0, bins, torch.ones_like(bins))

    on_test_batch_end = on_validation_batch_end

    # ---- drawing

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._show(trainer, "val", "validation")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show(trainer, "test", "test")

    def _show(self, trainer: Trainer, stage: str, split: str) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self.latest = []
        for loader, counts in sorted(self._counts.items()):
            right, total = trainer.strategy.reduce(counts, reduce_op="sum").cpu()  # type: ignore[union-attr]
            length = data.evaluation_stream(split, loader).task.max_length
            self.latest.append(self._table(f"length {length:,}", right, total))
        folder = picture_folder(trainer)
        asked = [answers for answers in self.latest if answers.total]
        if not asked or trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        title = f"validation {when(trainer)}" if stage == "val" else split
        figure = partial(draw, asked, 1 / data.task.num_classes, title)
        show(figure, trainer, folder, stage, "accuracy_by_distance", dpi=120)

    def _table(self, name: str, right: Tensor, total: Tensor) -> Distances:
        [used] = total.nonzero(as_tuple=True)
        low, high = self.edges[used], self.edges[used + 1] - 1
        return Distances(name, low.tolist(), high.tolist(), total[used].tolist(), (right / total)[used].tolist())


def draw(sets: list[Distances], chance: float, title: str) -> Figure:
    """Accuracy over distance, and how many answers it is a mean of."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    accuracy, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for answers, marker in zip(sets, "os^Dv<>Pp*" * len(sets), strict=False):
        middle = [(low * (high + 1)) ** 0.5 for low, high in zip(answers.low, answers.high, strict=True)]
        share, total = torch.tensor(answers.accuracy), torch.tensor(answers.total)
        error = (share * (1 - share) / total) ** 0.5
        accuracy.errorbar(middle, answers.accuracy, error.tolist(), marker=marker, capsize=3, label=answers.name)
        counts.plot(middle, answers.total, marker=marker)
    accuracy.axhline(chance, color="0.4", linestyle="--", label=f"chance ({chance:.0%})")
    accuracy.set(ylabel="accuracy (bars: standard error)", ylim=(-0.03, 1.05), title=title)
    accuracy.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    counts.set_xscale("log", base=2)
    edges = sorted({edge for answers in sets for edge in (answers.low[0], answers.high[-1] + 1)})
    if edges[-1] < 4 * edges[0]:  # hardly a power of two between them
        counts.set_xticks(edges)
    counts.set_yscale("log")
    counts.set(ylabel="answers", xlabel="distance from the value to the question (steps, log scale)")
    largest = max(total for answers in sets for total in answers.total)
    counts.set_ylim(0.7, 3 * largest)  # so that a power of ten is in sight, and every marker whole
    counts.yaxis.set_minor_formatter(NullFormatter())
    for axis in (counts.xaxis, counts.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    for axes in (accuracy, counts):
        axes.grid(alpha=0.3)
    return figure
