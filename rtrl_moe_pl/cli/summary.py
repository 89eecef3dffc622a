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
from rtrl_moe_pl.cli.trial import of_batches
from rtrl_moe_pl.gradients.memory import readable
from rtrl_moe_pl.training import NumericalFailure

CONFIG = "rtrl_moe_pl_config"  # in a checkpoint
# What of a configuration is a hyperparameter.
KEPT = ("seed_everything", "model.", "data.", *(f"trainer.{name}" for name in ("max_steps", "max_epochs", "precision")))


class SaveConfig(SaveConfigCallback):
    """Saves config.yaml beside the logs, and nowhere if there are none; in every checkpoint, as a text.

    A run that is refused before anything is logged leaves no folder.

    When a fit begins, TensorBoard gets the configuration as hyperparameters, with the last value of
    ``checkpoint.monitor`` as their metric, and a text: model, gradient, forecast memory and cost; when figures are
    logged for the second time, the measured time a token too. Other loggers are left alone.
    """

    _writers: Sequence[Any] = ()  # TensorBoard's; of rank 0
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
        self._show(summary(trainer, pl_module), 0)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # as LightningCLI itself, for any jsonargparse 4
            checkpoint[CONFIG] = self.parser.dump(self.config, skip_none=False)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        module: Any = pl_module
        if self._writers and self._looks < 2 and module.logs_now():
            self._looks += 1
            speed = module.figures.get("train/tokens_per_second")
            if self._looks == 2 and speed:  # the first has the time of getting ready in it
                done = trainer.fit_loop.total_batch_idx + 1
                self._show({**summary(trainer, module), "measured": f"{1e6 / speed:.3g} us a token"}, done)

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


def summary(trainer: Trainer, module: Any) -> dict[str, str]:
    """Model, numbers of parameters, and, of a SequenceModule, gradient, forecast memory and cost."""
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    total = sum(p.numel() for p in module.parameters())
    children = [(name, part) for name, part in module.named_children() if any(True for _ in part.parameters())]
    lines = {
        "model": f"{type(module).__name__}: {', '.join(f'{name} {type(part).__name__}' for name, part in children)}",
        "parameters": f"{total:,}" + ("" if trained == total else f", {trained:,} of them trained"),
    }
    gradient, data = getattr(module, "gradient", None), getattr(trainer, "datamodule", None)
    if gradient is None:
        return lines
    lines["gradient"] = f"{gradient!r}, {'exact' if gradient.exact else 'approximate'}"
    lanes, steps = getattr(data, "batch_size", None), getattr(data, "steps_per_batch", None)
    if getattr(data, "layout", None) == "sequences":
        steps = data.training_task.max_length  # type: ignore[union-attr]
    if isinstance(lanes, int) and isinstance(steps, int):
        forecast = of_batches(gradient, module, lanes, steps, getattr(data, "layout", None) == "stream")
        lines["forecast memory"] = (
            f"{readable(forecast.influence_bytes)} for the influence, about {readable(forecast.workspace_bytes)} for "
            f"a chunk ({lanes} lanes, {steps} steps a batch)"
        )
        lines["forecast cost"] = f"{forecast.operations_per_token:.3g} operations a token"
    return lines
