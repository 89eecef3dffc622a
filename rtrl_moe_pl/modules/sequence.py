"""Train a recurrent cell on labelled sequences with any gradient algorithm."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MeanMetric

from rtrl_moe_pl.cells import Cell
from rtrl_moe_pl.data import Batch
from rtrl_moe_pl.gradients import GradientAlgorithm, Memory, WindowResult
from rtrl_moe_pl.modules.base import ManualModule
from rtrl_moe_pl.modules.evaluation import evaluate
from rtrl_moe_pl.modules.losses import WeightedCrossEntropy
from rtrl_moe_pl.training import UpdateResult
from rtrl_moe_pl.training.failure import first_bad


class SequenceModule(ManualModule):
    """A cell and a readout that learn to label the steps of sequences.

    Batches are ``Batch(inputs [B, T, ..], targets=(labels [B, T], weights [B, T]), starts [B, T])``. State and
    influence are carried from batch to batch and reset where ``starts`` says so. A batch in which every lane starts
    at column 0 needs no carry, so it may have any size; in a stream, where lanes go on, the size is fixed. With an
    update after every batch of a stream the carried influence belongs to slightly older parameters (online updates).

    Args:
        cell: module with ``state_size``, ``initial_state(batch_size)`` and ``forward(x, s)``.
        output_size: number of classes; linked to the data on the command line.
        gradient: how gradients are computed. ``BPTT`` needs whole sequences (``layout: sequences``).
        readout: module [N, S] -> [N, output_size]; None is one linear layer.
        loss: module (outputs [B, k, O], (labels, weights)) -> summed loss; None is weighted cross-entropy.
        optimizer, lr_scheduler, gradient_clip, update_every: see ManualModule.

    Raises:
        ValueError: if readout and cell, or algorithm and data, do not fit.
    """

    def __init__(
        self,
        cell: Cell | nn.Module,
        output_size: int,
        gradient: GradientAlgorithm,
        readout: nn.Module | None = None,
        loss: nn.Module | None = None,
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        gradient_clip: float | None = 1.0,
        update_every: int = 1,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, gradient_clip, update_every)
        self.cell = cell
        self.readout = nn.Linear(cell.state_size, output_size) if readout is None else readout  # type: ignore[arg-type]
        self.output_size = output_size
        self.gradient = gradient
        self.loss = WeightedCrossEntropy() if loss is None else loss
        self.train_accuracy = MeanMetric()
        self.evaluations = nn.ModuleList()  # one per evaluation loader
        self._memory: Memory | None = None  # not a buffer: other processes carry other lanes
        self._restored: dict[str, Any] | None = None
        self._last_time: float | None = None
        _check_readout(cell, self.readout, output_size)

    # ---- training

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self._memory = self._restored = None
        layout = getattr(getattr(self.trainer, "datamodule", None), "layout", None)
        if stage == "fit" and self.gradient.window is None and layout not in (None, "sequences"):
            raise ValueError(
                f"{self.gradient!r} differentiates whole sequences, but data.layout is {layout!r}: "
                "set data.layout to 'sequences', or use TBPTT or RTRL"
            )

    def on_train_start(self) -> None:
        super().on_train_start()
        self._last_time = None

    def on_validation_end(self) -> None:
        self._last_time = None  # validation is not counted in tokens per second

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        inputs, (_, weights), starts = batch.inputs, batch.targets, batch.starts
        memory = self._memory_for(inputs, starts)
        with torch.autocast(inputs.device.type, enabled=False):
            result = self.gradient.run(self.cell, self.readout, inputs, batch.targets, self.loss, memory, starts)
        self._memory = result.memory
        weight = weights.sum()
        state_norm = result.memory.state.norm(dim=1).mean()
        influence_norm = result.memory.sensitivity.norm()
        # 0 * infinity is NaN: whatever went bad reaches the update, and every rank, through the weight.
        health = 0 * (result.loss + state_norm + influence_norm)

        def diagnose() -> str | None:
            return first_bad(
                [
                    ("inputs", inputs),
                    ("state", result.memory.state),
                    ("outputs", result.outputs),
                    ("loss", result.loss),
                    ("influence", influence_norm),
                    *((f"gradient of {name}", grad) for name, grad in result.grads.items()),
                ]
            )

        update = self.update_parameters(result.grads, weight + health, diagnose)
        self._log_training(batch, result, weight, state_norm, influence_norm, update)

    def _memory_for(self, inputs: Tensor, starts: Tensor | None) -> Memory:
        """The carry for a batch: the one kept, or a fresh one if every lane starts at column 0 (no starts: it does)."""
        lanes = inputs.shape[0]
        whole = starts is None or bool(starts[:, 0].all())
        if not whole and self.gradient.window is None:
            raise ValueError(f"{self.gradient!r} needs batches of whole sequences: use layout 'sequences'")
        memory = self._memory
        if memory is not None and memory.batch_size != lanes:
            if not whole:
                raise ValueError(
                    f"the batch has {lanes} lanes, but {memory.batch_size} are carried on: keep batch_size (drop a "
                    "smaller last batch), or start all lanes anew"
                )
            memory = None
        if memory is None:
            memory = self.gradient.init(self.cell, lanes)
            if self._restored is not None and not whole:
                memory.load_state_dict(self._restored)
            self._restored = None
        elif whole:
            memory.reset()
        return memory

    def _log_training(
        self,
        batch: Batch,
        result: WindowResult,
        weight: Tensor,
        state_norm: Tensor,
        influence_norm: Tensor,
        update: UpdateResult | None,
    ) -> None:
        """One call a batch. A batch without weight has no loss or accuracy, one between updates no gradient norm."""
        figures: dict[str, Tensor | float] = {"train/state_norm": state_norm, "train/influence_norm": influence_norm}
        if weight > 0:
            figures["train/loss"] = result.loss / weight
            labels, weights = batch.targets
            figures["train/accuracy"] = self.train_accuracy(correct(result.outputs, labels), weights)
        if update is not None and update.stepped:
            figures["train/grad_norm"] = update.grad_norm
        now, before = time.perf_counter(), self._last_time
        self._last_time = now
        if before is not None:
            figures["train/tokens_per_second"] = batch.inputs.shape[0] * batch.inputs.shape[1] / (now - before)
        self.log_dict(figures)

    # ---- evaluation

    def _evaluation_names(self) -> list[str]:
        names = getattr(getattr(self.trainer, "datamodule", None), "validation_names", None)
        return [""] if names is None else list(names)

    def _start_evaluation(self) -> None:
        names = self._evaluation_names()
        self.evaluations = nn.ModuleList(Evaluation() for _ in names).to(self.device)

    def on_validation_start(self) -> None:
        self._start_evaluation()

    def on_test_start(self) -> None:
        self._start_evaluation()

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate("val", batch, dataloader_idx)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate("test", batch, dataloader_idx)

    def _evaluate(self, stage: str, batch: Batch, loader: int) -> None:
        outputs = self(batch.inputs, batch.starts)
        labels, weights = batch.targets
        weight = weights.sum()
        name = self._evaluation_names()[loader]
        evaluation = self.evaluations[loader]
        assert isinstance(evaluation, Evaluation)
        evaluation.accuracy.update(correct(outputs, labels), weights)
        if weight > 0:
            evaluation.loss.update(self.loss(outputs, batch.targets) / weight, weight)
        for figure, metric in (("accuracy", evaluation.accuracy), ("loss", evaluation.loss)):
            self.log(
                f"{stage}/{figure}_{name}".rstrip("_"),
                metric,
                on_epoch=True,
                prog_bar=figure == "accuracy",
                add_dataloader_idx=False,
                metric_attribute=f"evaluations.{loader}.{figure}",
            )

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Outputs [B, T, O]."""
        return self(batch.inputs, batch.starts)

    def forward(self, inputs: Tensor, starts: Tensor | None = None) -> Tensor:
        """Outputs [B, T, O] for inputs [B, T, ..] without gradients; the training carry is left alone."""
        with torch.autocast(inputs.device.type, enabled=False):
            return evaluate(self.cell, self.readout, inputs, starts)

    # ---- checkpoints

    def carry_state(self) -> dict[str, Any] | None:
        if getattr(getattr(self.trainer, "datamodule", None), "layout", None) == "sequences":
            return None  # the next batch starts anew in every lane
        return self._restored if self._memory is None else self._memory.state_dict()

    def restore_carry(self, state: dict[str, Any] | None) -> None:
        self._restored = state

    def carried_tensors(self) -> Iterable[tuple[str, Tensor]]:
        if self._memory is not None:
            yield "state", self._memory.state
            yield "influence norm", self._memory.sensitivity.norm()


class Evaluation(nn.Module):
    """Figures of one evaluation loader: means per weight, over all ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MeanMetric()
        self.loss = MeanMetric()


def correct(outputs: Tensor, labels: Tensor) -> Tensor:
    """1 where the largest output is the label, else 0: [B, T] from outputs [B, T, O] and labels [B, T]."""
    return (outputs.argmax(-1) == labels).to(outputs.dtype)


@torch.no_grad()
def _check_readout(cell: nn.Module, readout: nn.Module, output_size: int) -> None:
    """Refuse a readout that does not fit the cell, in one line and before any data is made."""
    if getattr(readout, "takes_input", False):
        return
    size = cell.state_size
    state = cell.initial_state(1)  # type: ignore[operator]
    try:
        shape = tuple(readout(state).shape)
    except RuntimeError as error:
        raise ValueError(
            f"model.readout ({type(readout).__name__}) does not take states of size {size}: {error}"
        ) from None
    if shape != (1, output_size):
        raise ValueError(
            f"model.readout ({type(readout).__name__}) returns shape {shape} for one state; "
            f"the data needs (1, {output_size})"
        )
