"""The newest states of a run: kept after validations, every few minutes, and when the run is told to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from rtrl_moe_pl.cells.base import at_least, positive
from rtrl_moe_pl.training.failure import NumericalFailure

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # the last is SLURM's, before the time is up
BATCH = "batch"  # batches done, which may make no optimizer step
CLOCK = 1  # no signal that is caught here has this number


class Interrupted(Exception):
    """A run was told to stop by a signal, and its state has been saved.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int, step: int, path: str) -> None:
        self.number = number
        saved = f"go on with --ckpt_path last, or {path}" if path else "nothing is saved"
        super().__init__(f"stopped by {signal.Signals(number).name} at step {step}; {saved}")


class LastCheckpoint(ModelCheckpoint):
    """``last.ckpt``, a link to the newest of ``last-stepN-batchM.ckpt``, of which the newest few are kept.

    They are saved after every validation and at the end, whatever the accuracy (the best has its own callback); after
    the first batch that ends ``minutes`` after the one before; after the last whole batch if something else fails
    between two (one process only: several may be at different steps); and on SIGTERM, SIGUSR1 and SIGINT (Ctrl-C),
    which end the run after the batch or validation at hand. A SIGINT after it ends it at once, without saving. Several
    processes agree after every batch: a signal to one of them stops all.

    Args:
        keep: how many, at least 1.
        minutes: of training between two, at most (a validation is not interrupted).

    Raises:
        Interrupted: after the state has been saved.
        TypeError, ValueError: for options out of range.
    Cost: of several processes, one more collective of a number per batch and validation.
    """

    def __init__(self, keep: int = 2, minutes: float = 10.0) -> None:
        super().__init__(
            filename=f"last-step{{step}}-{BATCH}{{{BATCH}}}",  # no name is used twice: a kill would leave halves of two
            auto_insert_metric_name=False,
            monitor=BATCH,  # the newest are the best
            mode="max",
            save_top_k=at_least(1, "keep", keep),
            save_last="link",
        )
        self._seconds = 60 * positive("minutes", minutes)
        self._told = 0  # the signal that came to this process
        self._due = 0  # the highest on any process: a signal, CLOCK, or nothing
        self._saved = time.monotonic()
        self._saved_batch = 0
        self._handlers: dict[int, Any] = {}  # those of before

    # ---- signals

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not before, when Lightning would put its own handler over these.
        self._told = self._due = 0
        self._saved, self._saved_batch = time.monotonic(), 0
        link = self.format_checkpoint_name({}, self.CHECKPOINT_NAME_LAST)
        if Path(link).is_symlink():  # of a run before in this folder
            self.last_model_path = link
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._tell) for number in SIGNALS}

    def _tell(self, number: int, frame: FrameType | None) -> None:
        # A flag alone: Lightning's own handler of SIGTERM makes a collective wherever the process happens to be.
        self._told = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    # ---- saving

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._agree(trainer, pl_module)
        if self._due and _between_batches(trainer):
            if self._due > CLOCK:  # Lightning would log after this
                trainer._logger_connector.update_train_step_metrics()
            self._save_and_stop(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._agree(trainer, pl_module)
            if not _is_last_batch(trainer):  # else after the epoch
                self._save_and_stop(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        self._save_and_stop(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)
        self._restore_handlers()
        if self.last_model_path:
            rank_zero_info(f"saved: {self.last_model_path}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore_handlers()
        failed = isinstance(exception, NumericalFailure | Interrupted | KeyboardInterrupt)  # the last is the second
        if not failed and trainer.world_size == 1 and trainer.training and _between_batches(trainer):
            loop: Any = trainer.fit_loop  # a batch that was taken and not trained on would be left out
            if loop._data_fetcher.fetched == loop.epoch_loop.batch_progress.current.ready:
                with contextlib.suppress(OSError):  # the first error is the one to be told
                    self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)

    def _save_and_stop(self, trainer: Trainer) -> None:
        """Save if it is time to, and end the run if it was told to."""
        if self._due:
            self._save(trainer)
        if self._due > CLOCK:
            raise Interrupted(self._due, trainer.global_step, self._last_checkpoint_saved)

    def _agree(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._due = self._told or CLOCK * (time.monotonic() - self._saved >= self._seconds)
        if trainer.world_size > 1:
            due = torch.tensor(self._due, device=pl_module.device)
            dist.all_reduce(due, dist.ReduceOp.MAX)
            self._due = int(due)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        self._saved, self._saved_batch = time.monotonic(), batches_behind(trainer)

    def _should_skip_saving_checkpoint(self, trainer: Trainer) -> bool:
        # Lightning saves no two of one optimizer step, whatever was summed and carried in between.
        self._last_global_step_saved = trainer.global_step if self._saved_batch == batches_behind(trainer) else -1
        return super()._should_skip_saving_checkpoint(trainer)

    def _monitor_candidates(self, trainer: Trainer) -> dict[str, torch.Tensor]:
        return {**super()._monitor_candidates(trainer), BATCH: torch.tensor(batches_behind(trainer))}

    @staticmethod
    def _link_checkpoint(trainer: Trainer, filepath: str, linkpath: str) -> None:
        """In one step: there is a ``last.ckpt`` at all times."""
        link = Path(linkpath)
        if trainer.is_global_zero:
            unfinished = link.with_name(f".{link.name}.{os.getpid()}.unfinished")
            unfinished.symlink_to(os.path.relpath(filepath, link.parent))
            unfinished.replace(link)
        trainer.strategy.barrier()


def batches_behind(trainer: Trainer) -> int:
    """Batches behind, that of a hook at its end counted in."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]


def _is_last_batch(trainer: Trainer) -> bool:
    return trainer.fit_loop.epoch_loop.batch_progress.is_last_batch


def _between_batches(trainer: Trainer) -> bool:
    """Whether a whole batch has just ended and no validation is due: a run goes on from there bit for bit.

    A run that resumes where a validation was due leaves it out, and with it what comes of it, such as a promotion to
    longer sequences.
    """
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    fetcher = trainer.fit_loop._data_fetcher
    whole = progress.current.processed == progress.current.ready
    return whole and fetcher is not None and not _is_last_batch(trainer) and not validation_due(trainer)


def validation_due(trainer: Trainer) -> bool:
    """Whether a validation comes right after the batch at hand."""
    return trainer.fit_loop.epoch_loop._should_check_val_fx(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]
