"""Figures that are logged: sums while training, torchmetrics while evaluating."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from rtrl_moe_pl.cells import Routing
from rtrl_moe_pl.gradients import WindowResult
from rtrl_moe_pl.modules.usage import usage_figures


def correct(outputs: Tensor, labels: Tensor) -> Tensor:
    """1 where the largest output is the label, else 0: [B, T] from outputs [B, T, O] and labels [B, T]."""
    return (outputs.argmax(-1) == labels).to(outputs.dtype)


class Stopwatch:
    """Seconds since it was cleared, but for pauses."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._began = time.perf_counter()

    def pause(self) -> None:
        """Stop the clock, until ``resume``."""
        self._paused = time.perf_counter()

    def resume(self) -> None:
        self._began += time.perf_counter() - self._paused

    def elapsed(self) -> float:
        return time.perf_counter() - self._began


class TrainingFigures(Stopwatch):
    """Loss, accuracy and speed of the batches since they were last read: this process's, not those of all ranks."""

    def clear(self) -> None:
        super().clear()
        self._loss: Tensor | float = 0.0
        self._correct: Tensor | float = 0.0
        self._weight: Tensor | float = 0.0
        self._tokens = 0
        self._used: Routing | None = None

    def add(self, result: WindowResult, targets: tuple[Tensor, ...], weight: Tensor) -> None:
        labels, weights = targets
        self._loss = self._loss + result.loss
        self._correct = self._correct + (correct(result.outputs, labels) * weights).sum()
        self._weight = self._weight + weight
        self._tokens += labels.numel()

    def add_usage(self, used: Routing) -> None:
        """What a routed cell chose: counts [S], [S] and [E]."""
        self._used = used if self._used is None else Routing(*map(torch.add, self._used, used))

    def read(self) -> dict[str, Any]:
        """Figures by tag; loss and accuracy, means per weight, are missing if there was no weight."""
        figures: dict[str, Any] = {"train/tokens_per_second": self._tokens / self.elapsed()}
        weight = float(self._weight)
        if weight > 0:
            figures["train/loss"] = float(self._loss) / weight
            figures["train/accuracy"] = float(self._correct) / weight
        if self._used is not None:
            figures |= usage_figures(self._used)
        self.clear()
        return figures


class EvaluationFigures(nn.Module):
    """Loss and accuracy of one evaluation loader: means per weight, over all ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MeanMetric()
        self.loss = MeanMetric()
