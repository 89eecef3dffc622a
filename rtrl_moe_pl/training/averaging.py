"""The exponential moving average of the weights, used by evaluation and kept in checkpoints beside the raw weights."""

from __future__ import annotations

# pyright: reportPrivateImportUsage=false
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

RAW, COUNT = "current_model_state", "averaging_state"  # Lightning's names


class EMA(WeightAveraging):
    """Exponential moving average of all parameters and buffers after every optimizer step.

    Update n, from 0, has the decay min(decay, (1 + n) / (10 + n)), and the first one copies the weights: a short run
    is not an average over its initial weights. Buffers that are not floating point are copied.

    Validation uses the average; the raw weights come back after it, and when it raises. After fit the module holds
    the average. A checkpoint holds it as ``state_dict``, which evaluation loads, and the raw weights as
    ``current_model_state``, which fit resumes from, with this callback or without it (see `resume_raw`). A run that
    resumes from a checkpoint without an average starts one. Not written by checkpoints with ``save_weights_only``:
    Lightning runs no callback for those.

    Args:
        decay: of the average per step, at least 0 and below 1.

    Raises:
        ValueError: if the decay is out of its range.
    Cost: the memory of the weights once more, and one pass over both per step.
    References: Polyak & Juditsky 1992, SIAM J. Control Optim. 30(4):838-855; TRM uses 0.999 (arXiv 2510.04871).
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1, got {decay}")
        super().__init__(multi_avg_fn=_warmed_up(decay))
        self._swapped = False  # whether the module holds the average, and the average's place the raw weights

    # ---- in a run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._average_model, self._swapped = None, False  # and none in evaluation: its weights stay as they are
        self._latest_update_step = trainer.global_step  # of this run, whatever run the callback was in before
        trainer.precision_plugin.convert_module(pl_module)  # weights are restored into the average, too
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow the module, which has been converted, moved and sent to all processes since `setup`."""
        assert self._average_model is not None
        trainer.precision_plugin.convert_module(self._average_model).to(pl_module.device)
        if not self._average_model.n_averaged:
            self._average_model.module.load_state_dict(pl_module.state_dict(), strict=pl_module.strict_loading)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._use_average(True, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._use_average(False, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._use_average(False, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing yet: callbacks that save the raw weights come after this one."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._use_average(True, pl_module)

    def _use_average(self, use: bool, pl_module: LightningModule) -> None:
        if self._average_model is not None and self._swapped != use:
            self._swap_models(pl_module)
            self._swapped = use

    # ---- checkpoints

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._average_model is not None:
            average, raw = self._average_model.module.state_dict(), checkpoint["state_dict"]
            checkpoint["state_dict"], checkpoint[RAW] = (raw, average) if self._swapped else (average, raw)
            checkpoint[COUNT] = {"n_averaged": self._average_model.n_averaged}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._average_model is not None and RAW in checkpoint:
            strict = pl_module.strict_loading
            self._average_model.module.load_state_dict(checkpoint["state_dict"], strict=strict)
            self._average_model.n_averaged.copy_(checkpoint[COUNT]["n_averaged"])
            pl_module.load_state_dict(checkpoint[RAW], strict=strict)


def resume_raw(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Let a run without `EMA` resume from a checkpoint with it: Lightning would train the averaged weights on.

    For ``on_load_checkpoint`` of a module; evaluation keeps the average.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    fitting = trainer.state.fn == TrainerFn.FITTING
    if fitting and RAW in checkpoint and not any(isinstance(callback, WeightAveraging) for callback in callbacks):
        checkpoint["state_dict"] = checkpoint[RAW]


def _warmed_up(decay: float) -> Callable[[list[Tensor], list[Tensor], Tensor], None]:
    """The update of averages of one device and data type, given the number of updates before it."""

    @torch.no_grad()
    def update(averages: list[Tensor], currents: list[Tensor], count: Tensor) -> None:
        if averages[0].is_floating_point() or averages[0].is_complex():
            n = int(count)
            torch._foreach_lerp_(averages, currents, 1 - min(decay, (1 + n) / (10 + n)))
        else:
            torch._foreach_copy_(averages, currents)

    return update
