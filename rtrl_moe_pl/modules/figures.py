"""Figures that are logged: sums while training, torchmetrics while evaluating."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from rtrl_moe_pl.cells import Routing
from rtrl_moe_pl.gradients import WindowResult
from rtrl_moe_pl.modules.usage import usage_figures
from rtrl_moe_pl.training import sum_over_ranks


def correct(outputs: Tensor, labels: Tensor) -> Tensor:
    """1 where the largest output is the label, else 0: [B, T] from outputs [B, T, O] and labels [B, T]."""
    return (outputs.argmax(-1) == labels).to(outputs.dtype)


def log_figures(module: Any, figures: dict[str, Any], **options: Any) -> None:
    """Log a ManualModule's figures by tag, the loss in the progress bar too, and the next update's learning rate."""
    results = module.trainer._results  # of this epoch: what is not logged now would be logged as it was
    for key in [key for key in results if key.partition(".")[2].startswith("train/")]:
        del results[key]
    rate = module.trainer.optimizers[0].param_groups[0].get("lr")  # of the first group
    module.figures = figures if rate is None else {**figures, "train/learning_rate": float(rate)}
    module.log_dict({tag: value for tag, value in module.figures.items() if tag != "train/loss"}, **options)
    if "train/loss" in figures:
        module.log("train/loss", figures["train/loss"], prog_bar=True, **options)


class Stopwatch:
    """Seconds since it was cleared, but for pauses."""

    _began: float | None  # None: it stands

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._seconds, self._began = 0.0, time.perf_counter()

    def pause(self) -> None:
        self._seconds, self._began = self.elapsed(), None

    def resume(self) -> None:
        if self._began is None:
            self._began = time.perf_counter()

    def elapsed(self) -> float:
        return self._seconds + (0.0 if self._began is None else time.perf_counter() - self._began)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {"seconds": self.elapsed()}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Take up what ``state_dict`` gave, and stand until ``resume``."""
        self._seconds, self._began = state["seconds"], None


class TrainingFigures(Stopwatch):
    """Loss, accuracy and speed of the batches since they were last read.

    Attributes:
        used: what a routed cell chose in the batches that were read last, see ``add_usage``; None if nothing.
    """

    used: Routing | None = None

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

    def state_dict(self) -> dict[str, Any]:
        sums = {"loss": self._loss, "correct": self._correct, "weight": self._weight, "tokens": self._tokens}
        return super().state_dict() | sums | {"used": None if self._used is None else list(self._used)}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        super().load_state_dict(state, device)
        self._loss, self._correct, self._weight = (
            torch.as_tensor(state[name], device=device) for name in ("loss", "correct", "weight")
        )
        self._tokens, used = state["tokens"], state["used"]
        self._used = None if used is None else Routing(*(counts.to(device) for counts in used))

    def read(self, state_norms: Tensor, influence_norm: Tensor) -> dict[str, Any]:
        """Figures by tag, of all ranks; loss and accuracy, means per weight, are missing if there was no weight.

        Every rank must read at the same batches: one collective.

        Args:
            state_norms: [B], of this rank's lanes; the figure is their mean.
            influence_norm: of this rank's lanes together, 0-dim.
        """
        speed, lanes = self._tokens / self.elapsed(), len(state_norms)
        sums = (self._loss, self._correct, self._weight, speed, state_norms.sum(), lanes, influence_norm.square())
        summed = sum_over_ranks(torch.stack([torch.as_tensor(value).to(state_norms) for value in sums]))
        loss, correct, weight, speed, norms, lanes, square = summed.tolist()
        figures: dict[str, Any] = {"train/tokens_per_second": speed}
        figures |= {"train/state_norm": norms / lanes, "train/influence_norm": math.sqrt(square)}
        if weight > 0:
            figures |= {"train/loss": loss / weight, "train/accuracy": correct / weight}
        self.used = self._used
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
