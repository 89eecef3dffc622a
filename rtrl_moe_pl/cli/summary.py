"""What a run is: config.yaml beside its logs, and hyperparameters and a summary in TensorBoard."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.tensorboard.summary import hparams

from rtrl_moe_pl.cli.folders import discard_unused, is_fresh
from rtrl_moe_pl.cli.trial import forecast_reasoning, of_batches
from rtrl_moe_pl.data.puzzles import PuzzleStream
from rtrl_moe_pl.gradients.memory import readable
from rtrl_moe_pl.modules import ReasoningModule, SequenceModule
from rtrl_moe_pl.training import NumericalFailure

CONFIG = "rtrl_moe_pl_config"  # in a checkpoint
# What of a configuration is a hyperparameter.
KEPT = ("seed_everything", "model.", "data.", *(f"trainer.{name}" for name in ("max_steps", "max_epochs", "precision")))


class SaveConfig(SaveConfigCallback):
    """Saves config.yaml beside the logs, and nowhere if there are none; in every checkpoint, as a text.

    A run that is refused before anything is logged leaves no folder.

    When a fit begins, TensorBoard gets the configuration as hyperparameters, with the last value of
    ``checkpoint.monitor`` as their metric, and a text: model, gradient, forecast memory and cost; when figures are
    logged for the second time, the measured time too. Other loggers are left alone.
    """

    _writers: Sequence[Any] = ()  # TensorBoard's; of rank 0
    _lines: dict[str, str] | None = None  # of the text; None before training
    _looks = 0
    _own = False  # whether all files beside the logs are of this run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.loggers:
            self._own = is_fresh(Path(trainer.log_dir or ""))
            super().setup(trainer, pl_module, stage)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        unused = not trainer.logged_metrics and not isinstance(exception, NumericalFailure)
        if not (unused and trainer.loggers and trainer.is_global_zero):
            return
        logger = trainer.loggers[0]  # trainer.log_dir would be a collective, and a process has failed
        folder = getattr(logger, "log_dir", logger.save_dir)
        if folder is not None:
            discard_unused(Path(folder), trainer, self._own)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._writers = [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        monitor = self.config.get("checkpoint.monitor")
        for writer in self._writers:
            # its last value is looked up among the scalars of that name; as an own point it would be a false one
            for part in hparams(hyperparameters(self.config), {monitor: 0.0} if monitor else {}):
                writer._get_file_writer().add_summary(part, 0)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # as LightningCLI itself, for any jsonargparse 4
            checkpoint[CONFIG] = self.parser.dump(self.config, skip_none=False)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._writers and self._lines is None:
            self._lines = summary(trainer, pl_module, batch)
            self._show(self._lines, 0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        module: Any = pl_module
        if self._lines and self._looks < 2 and module.logs_now():
            self._looks += 1
            speeds = {what: module.figures.get(f"train/{what}s_per_second") for what in ("token", "puzzle")}
            measured = [f"{1e6 / speed:.3g} us a {what}" for what, speed in speeds.items() if speed]
            if self._looks == 2 and measured:  # the first has the time of getting ready in it
                self._show({**self._lines, "measured": measured[0]}, trainer.fit_loop.total_batch_idx + 1)

    def _show(self, lines: dict[str, str], step: int) -> None:
        table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in lines.items())])
        for writer in self._writers:
            writer.add_text("summary", table, step)


def hyperparameters(config: Namespace) -> dict[str, bool | int | float | str]:
    """A subcommand's configuration, flat: ``model.cell: GRU``, ``model.cell.hidden_size: 32``; nulls are left out."""
    flat: dict[str, bool | int | float | str] = {}
    for key, value in vars(config.as_flat()).items():
        if value is None or not key.startswith(KEPT):
            continue
        key = key.replace(".init_args", "")
        if key.endswith(".class_path"):
            key, value = key.removesuffix(".class_path"), str(value).rsplit(".", 1)[-1]
        flat[key] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat


def summary(trainer: Trainer, module: Any, batch: Any) -> dict[str, str]:
    """Model, numbers of parameters, gradient, and forecast memory and cost where they are known.

    Args:
        batch: the first.

    Cost: of a ReasoningModule a few training steps of one and two lanes, of a copy; of other modules nothing is run.
    """
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    total = sum(p.numel() for p in module.parameters())
    children = [(name, part) for name, part in module.named_children() if any(True for _ in part.parameters())]
    lines = {
        "model": f"{type(module).__name__}: {', '.join(f'{name} {type(part).__name__}' for name, part in children)}",
        "parameters": f"{total:,}" + ("" if trained == total else f", {trained:,} of them trained"),
    }
    if isinstance(module, SequenceModule):
        lines |= _of_sequences(module, getattr(trainer, "datamodule", None))
    elif isinstance(module, ReasoningModule) and isinstance(batch, PuzzleStream):
        cut = f"{module.decoder.grad_cycles} of {module.decoder.h_cycles} rounds of a supervision step"
        lines["gradient"] = f"{module.mode}, through {cut}"
        try:
            forecast = forecast_reasoning(module, batch)
        except Exception:  # of a module or encoder that cannot be copied: no reason to end a run
            return lines
        lines["forecast memory"] = (
            f"about {readable(forecast.workspace_bytes)} for the way back ({batch.batch_size} lanes, "
            f"{module.shape.cells} cells)"
        )
        lines["forecast cost"] = f"{forecast.operations_per_token:.3g} operations a cell, where all puzzles begin"
    return lines


def _of_sequences(module: SequenceModule, data: Any) -> dict[str, str]:
    gradient = module.gradient
    lines = {"gradient": f"{gradient!r}, {'exact' if gradient.exact else 'approximate'}"}
    lanes, steps, layout = (getattr(data, name, None) for name in ("batch_size", "steps_per_batch", "layout"))
    if layout == "sequences":
        steps = data.training_task.max_length
    if isinstance(lanes, int) and isinstance(steps, int):
        forecast = of_batches(gradient, module, lanes, steps, layout == "stream")
        lines["forecast memory"] = (
            f"{readable(forecast.influence_bytes)} for the influence, about {readable(forecast.workspace_bytes)} for "
            f"a chunk ({lanes} lanes, {steps} steps a batch)"
        )
        lines["forecast cost"] = f"{forecast.operations_per_token:.3g} operations a token"
    return lines
