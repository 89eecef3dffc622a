"""Callbacks of the command line."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from rtrl_moe_pl.cells.base import at_least
from rtrl_moe_pl.training.last_checkpoint import validation_due


class Bar(TQDMProgressBar):
    """A progress bar that ends its line before an error is printed."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.is_enabled:
            print()


class BestCheckpoint(ModelCheckpoint):
    """The best by ``monitor``; of a figure that no validation logs it warns, and training goes on without a best.

    What is due between two validations is saved after the next one, if the figure is of validations, and what is due
    before a validation in any case, since a resumed run would leave it out. At the end of training one warning says why
    there is none, if so. A resumed run goes on from the best so far, which stays where it is if that is another folder;
    it is forgotten, with a warning, only if its file is gone.

    Raises:
        TypeError, ValueError: if save_last or save_on_exception is given, which are `LastCheckpoint`'s part; if
            train_time_interval is given, which has no effect under manual optimization; or if all of
            every_n_train_steps and every_n_epochs that are given are 0, which would keep none.
    """

    def __init__(self, **options: Any) -> None:
        if options.get("train_time_interval") is not None:
            raise ValueError(
                "train_time_interval has no effect under manual optimization: use every_n_train_steps or every_n_epochs"
            )
        for name in ("save_last", "save_on_exception"):
            if options.get(name):
                raise ValueError(f"{name} must be left out: last.ckpt is saved by last_checkpoint, also after an error")
        names = ("every_n_train_steps", "every_n_epochs")
        given = {name: options[name] for name in names if options.get(name) is not None}
        least = 0 if any(given.values()) else 1
        for name, value in given.items():
            at_least(least, name, value)
        super().__init__(**options)
        self._warned = False

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        # Lightning raises here, and what was trained until the first validation would be lost for a slip of the pen.
        if self.monitor is None or self.monitor in monitor_candidates or self.save_top_k == 0:
            super()._save_topk_checkpoint(trainer, monitor_candidates)
        elif trainer.fit_loop.epoch_loop.val_loop._has_run and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"checkpoint.monitor={self.monitor}: nothing has logged it so far; until something does, no best "
                f"checkpoint is kept, only last.ckpt; logged: {self._logged(monitor_candidates)}"
            )

    def _logged(self, figures: Iterable[str]) -> str:
        """Names of the figures of the kind that is monitored; of all, if that has none."""
        monitor = self.monitor or ""
        kind = monitor[: monitor.find("/") + 1]
        return ", ".join(sorted(name for name in figures if name.startswith(kind))) or f"nothing of {kind}"

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not (self._validated(trainer) or validation_due(trainer)):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        elif self._every_n_train_steps and trainer.global_step % self._every_n_train_steps == 0:
            self._defer_save_until_validation = True

    def _validated(self, trainer: Trainer) -> bool:
        """Whether the monitored figure is of validations: in between it is that of earlier weights."""
        return trainer.enable_validation and not (self.monitor or "train/").startswith("train/")

    def _should_save_on_train_epoch_end(self, trainer: Trainer) -> bool:
        return not self._every_n_train_steps and super()._should_save_on_train_epoch_end(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        cut_short = not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch  # by max_steps
        if not (cut_short and self._validated(trainer)):
            super().on_train_epoch_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "deferred": self._defer_save_until_validation}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Lightning forgets the scores in a new folder, and every resumed run has one. It removes no file of another.
        super().load_state_dict({**state_dict, "dirpath": self.dirpath})
        self._defer_save_until_validation = state_dict.get("deferred", False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        best = self.best_model_path
        if not best or self.save_top_k == 0:
            return
        # Here, not on loading, because all ranks have to agree on what is there.
        top, worst = (min, max) if self.mode == "min" else (max, min)
        scores = {path: score for path, score in self.best_k_models.items() if self.file_exists(path, trainer)}
        while 0 < self.save_top_k < len(scores):  # fewer than before
            del scores[worst(scores, key=scores.__getitem__)]
        self.best_k_models = scores
        if scores:
            self.best_model_path = top(scores, key=scores.__getitem__)
            self.kth_best_model_path = worst(scores, key=scores.__getitem__)
            self.kth_value = scores[self.kth_best_model_path]
        elif self.monitor is not None or not self.file_exists(best, trainer):
            self.best_model_path = self.kth_best_model_path = ""
        self.best_model_score = scores.get(self.best_model_path)
        if best != self.best_model_path:
            rank_zero_warn(f"the best checkpoint so far, {best}, is gone: the best of what is left and comes is kept")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        run: Any = trainer  # attributes that its __init__ does not declare
        if self.save_top_k != 0 and not (self.best_model_path or self._warned or run.fast_dev_run):
            due, logged = "none", ""
            if self.monitor is not None:
                due = f"checkpoint.monitor={self.monitor} was never there when one"
                logged = f"; logged by the end: {self._logged(self._monitor_candidates(trainer))}"
            rank_zero_warn(
                f"no best checkpoint was kept, only last.ckpt: {due} was due (every_n_train_steps="
                f"{self._every_n_train_steps}, every_n_epochs={self._every_n_epochs}){logged}"
            )


class PredictionWriter(Callback):
    """Writes ``predictions.csv`` of the steps that have a weight, one file per process, into a new folder of the logs.

    Columns: batch, lane, step, label, prediction (the class of the largest output). A batch is of whole sequences:
    where they come in windows, its windows count as one, and steps are counted through them.
    """

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        suffix = "" if trainer.world_size == 1 else f"_rank{trainer.global_rank}"
        self.path = folder / f"predictions{suffix}.csv"
        self._file = self.path.open("x", newline="")  # never over another file
        self._batch, self._steps = -1, 0  # the batch of sequences, and its steps before this window
        self._rows = csv.writer(self._file)
        self._rows.writerow(["batch", "lane", "step", "label", "prediction"])

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        labels, weights = batch.targets
        if bool(batch.starts[:, 0].all()):
            self._batch, self._steps = self._batch + 1, 0
        predicted = outputs.argmax(-1)
        where = weights.nonzero()  # [N, 2]
        lanes, steps = where.unbind(1)
        columns = (lanes, self._steps + steps, labels[lanes, steps], predicted[lanes, steps])
        self._rows.writerows([self._batch, *row] for row in zip(*(column.tolist() for column in columns), strict=True))
        self._steps += labels.shape[1]

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._file.close()
        print(f"predictions: {self.path}")
