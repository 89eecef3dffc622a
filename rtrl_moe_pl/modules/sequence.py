"""Train a recurrent cell on labelled sequences with any gradient algorithm."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from rtrl_moe_pl.cells import Cell, RoutedCell, Routing
from rtrl_moe_pl.data import Batch
from rtrl_moe_pl.gradients import GradientAlgorithm, Memory
from rtrl_moe_pl.gradients.base import require_cell
from rtrl_moe_pl.modules.base import ManualModule
from rtrl_moe_pl.modules.evaluation import evaluate, go_on
from rtrl_moe_pl.modules.figures import EvaluationFigures, TrainingFigures, correct, log_figures
from rtrl_moe_pl.modules.losses import WeightedCrossEntropy
from rtrl_moe_pl.modules.requirements import require_batch, require_readout, warn_of_shorter_windows
from rtrl_moe_pl.training import sum_over_ranks
from rtrl_moe_pl.training.failure import first_bad


class SequenceModule(ManualModule):
    """A cell and a readout that learn to label the steps of sequences.

    Batches are ``Batch(inputs [B, T, ..], targets=(labels [B, T], weights [B, T]), starts [B, T])``. State and
    influence are carried from batch to batch and reset where ``starts`` says so. A batch in which every lane starts
    at column 0 needs no carry, so it may have any size; in a stream, where lanes go on, the size is fixed. With an
    update after every batch of a stream the carried influence belongs to slightly older parameters (online updates).
    Evaluation carries a state of its own from batch to batch of a loader, by the same rule, and leaves that of
    training alone.

    Figures are logged every ``trainer.log_every_n_steps`` batches: loss and accuracy per weight and tokens per second
    over the batches since the last time; gradient norm before clipping, state norm (mean over lanes) and norm of the
    influence matrix after the last of them. All are those of all processes together.

    Args:
        cell: module with ``state_size``, ``initial_state(batch_size)`` and ``forward(x, s)``.
        output_size: number of classes; linked to the data on the command line.
        gradient: how gradients are computed. ``BPTT`` needs whole sequences (``layout: sequences``).
        readout: module [N, S] -> [N, output_size]; None is one linear layer.
        loss: module (outputs [B, k, O], (labels, weights)) -> summed loss; None is weighted cross-entropy.
        compile: run training windows by torch.compile (``gradient.compile``), where it supports the cell.
        optimizer, lr_scheduler, gradient_clip, update_every: see ManualModule.

    Raises:
        ValueError: if the cell is none, or readout and cell, or algorithm and data, do not fit.
    """

    advice = f"{ManualModule.advice}, or a shorter sequence"
    _figures: TrainingFigures

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
        compile: bool = False,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, gradient_clip, update_every)
        require_cell(cell)
        self.cell = cell
        self.readout = nn.Linear(cell.state_size, output_size) if readout is None else readout  # type: ignore[arg-type]
        self.output_size = output_size
        self.gradient = gradient
        if compile:
            gradient.compile()
        self.loss = WeightedCrossEntropy() if loss is None else loss
        self.evaluations = nn.ModuleList()  # one per evaluation loader
        self._evaluation_names: list[str] = []
        self._evaluated: tuple[int, Tensor] | None = None  # loader and state where its last batch ended
        self._memory: Memory | None = None  # not a buffer: other processes carry other lanes
        self._restored: dict[str, Any] | None = None
        self._goes_on = False  # whether lanes went on from a batch in this fit
        self._figures = TrainingFigures()
        require_readout(cell, self.readout, output_size)

    # ---- training

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self._memory = self._restored = None
        self._goes_on = False
        layout = getattr(getattr(self.trainer, "datamodule", None), "layout", None)
        if stage == "fit" and self.gradient.window is None and layout not in (None, "sequences"):
            raise ValueError(
                f"{self.gradient!r} differentiates whole sequences, but data.layout is {layout!r}: "
                "set data.layout to 'sequences', or use TBPTT or RTRL"
            )

    def on_fit_start(self) -> None:
        lanes = getattr(getattr(self.trainer, "datamodule", None), "batch_size", None)
        if isinstance(lanes, int):  # before a batch of so many is made
            self.gradient.require_room(self.cell, lanes, self.dtype, self.device)  # type: ignore[arg-type]

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        if self._memory is None:  # the first
            require_batch(batch, self.output_size, self.dtype, self.loss)  # type: ignore[arg-type]
        inputs, targets, starts = batch.inputs, tuple(batch.targets), batch.starts  # a DataLoader makes lists of tuples
        memory = self._memory_for(inputs, starts)
        weight = targets[1].sum()
        per_step = weight / targets[1].numel()
        if hasattr(self.cell, "auxiliary"):  # penalties: their mean over the steps of all ranks beside the mean loss
            labelled, steps = sum_over_ranks(torch.stack([weight, torch.full_like(weight, targets[1].numel())]))
            per_step = labelled / steps
        with torch.autocast(inputs.device.type, enabled=False):
            result = self.gradient.run(self.cell, self.readout, inputs, targets, self.loss, memory, starts, per_step)
        self._memory = result.memory
        state_norms = result.memory.state.norm(dim=1)

        def diagnose() -> str | None:
            tensors = {"inputs": inputs, "state": result.memory.state, "outputs": result.outputs, "loss": result.loss}
            tensors["influence norm"] = result.memory.base.norm()
            return first_bad([*tensors.items(), *((f"gradient of {name}", g) for name, g in result.grads.items())])

        used, result.memory.used = result.memory.used, None
        counts = None if used is None else torch.cat(used)
        # 0 * infinity is NaN: what is bad in this batch reaches the update, and so every rank, through the weight.
        update = self.update_parameters(result.grads, weight + 0 * (result.loss + state_norms.sum()), diagnose, counts)
        self._figures.add(result, targets, weight)
        if update is not None and update.counts is not None:
            assert isinstance(self.cell, RoutedCell)
            slots, experts = self.cell.num_slots, self.cell.num_experts
            used = Routing(*update.counts.split([slots, slots, experts]))
            self.cell.balance(used)
            self._figures.add_usage(used)
        if self.logs_now():
            # Lightning takes 0.3 ms for a figure, and the influence norm reads all of P: not after every batch.
            figures = self._figures.read(state_norms, result.memory.base.norm())
            if update is not None and update.stepped:
                figures["train/grad_norm"] = update.grad_norm
            log_figures(self, figures)

    @property
    def memory(self) -> Memory | None:
        """What training carries on; None before the first batch."""
        return self._memory

    @property
    def used(self) -> Routing | None:
        """How often each slot was read [S] and written [S] and each expert chosen [E], behind the latest figures."""
        return self._figures.used

    def _memory_for(self, inputs: Tensor, starts: Tensor | None) -> Memory:
        """The carry for a batch: the one kept, or a fresh one if every lane starts at column 0 (no starts: it does)."""
        lanes = inputs.shape[0]
        whole = starts is None or bool(starts[:, 0].all())
        if not whole and self.gradient.window is None:
            raise ValueError(f"{self.gradient!r} needs batches of whole sequences: use layout 'sequences'")
        if not (whole or self._goes_on):  # for the first time
            self._goes_on = True
            warn_of_shorter_windows(self.gradient, inputs.shape[1])
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
                try:
                    memory.load_state_dict(self._restored)
                except ValueError as error:
                    raise ValueError(f"--ckpt_path: {error} (compare the config.yaml of its run)") from error
            self._restored = None
        elif whole:
            memory.reset()
        return memory

    # ---- evaluation

    def _start_evaluation(self) -> None:
        self._evaluated = None
        trainer: Any = self.trainer
        loaders = trainer.num_test_batches if trainer.testing else trainer.num_val_batches
        unnamed = ["", *map(str, range(1, len(loaders)))]
        self._evaluation_names = list(getattr(trainer.datamodule, "validation_names", unnamed))
        self.evaluations = nn.ModuleList(EvaluationFigures() for _ in loaders).to(self.device)

    def on_predict_start(self) -> None:
        self._evaluated = None

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Outputs [B, T, O], for callbacks."""
        return self._evaluate("val", batch, dataloader_idx)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Outputs [B, T, O], for callbacks."""
        return self._evaluate("test", batch, dataloader_idx)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Outputs [B, T, O]."""
        return self._outputs(batch, dataloader_idx)

    def _evaluate(self, stage: str, batch: Batch, loader: int) -> Tensor:
        outputs = self._outputs(batch, loader)
        labels, weights = batch.targets
        weight = weights.sum()
        name = self._evaluation_names[loader]
        evaluation = self.evaluations[loader]
        assert isinstance(evaluation, EvaluationFigures)
        evaluation.accuracy.update(correct(outputs, labels), weights)
        evaluation.loss.update(self.loss(outputs, batch.targets) / (weight if weight > 0 else 1), weight)
        for figure, metric in (("accuracy", evaluation.accuracy), ("loss", evaluation.loss)):
            self.log(
                f"{stage}/{figure}_{name}".rstrip("_"),
                metric,
                on_epoch=True,
                prog_bar=figure == "accuracy",
                add_dataloader_idx=False,
                metric_attribute=f"evaluations.{loader}.{figure}",
            )
        return outputs

    def _outputs(self, batch: Batch, loader: int) -> Tensor:
        """Outputs of an evaluation batch, begun where the loader's last one ended unless every lane starts anew."""
        if self._evaluated is None:  # the first
            require_batch(batch, self.output_size, self.dtype, self.loss)  # type: ignore[arg-type]
        inputs, starts, state = batch.inputs, batch.starts, None
        whole = starts is None or bool(starts[:, 0].all())
        if not whole and self._evaluated is not None and self._evaluated[0] == loader:
            state = self._evaluated[1]
            if len(state) != len(inputs):
                raise ValueError(
                    f"the evaluation batch has {len(inputs)} lanes, but {len(state)} go on from the last one: keep the "
                    "batch size, or start all lanes anew"
                )
        with torch.autocast(inputs.device.type, enabled=False):
            outputs, state = go_on(self.cell, self.readout, inputs, starts, state)
        self._evaluated = loader, state
        return outputs

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
            yield "influence norm", self._memory.base.norm()
