"""From short sequences to long ones: a length is left when validation at it is good enough."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from rtrl_moe_pl.data.module import SequenceDataModule
from rtrl_moe_pl.randomness import bits
from rtrl_moe_pl.tasks import Task
from rtrl_moe_pl.training.last_checkpoint import validation_due

_STAGE = 3  # the seeds of stages are drawn from (seed, this, length); see data.module
MONITOR = "val/progress"


class CurriculumDataModule(SequenceDataModule):
    """Trains on each of several tasks in turn, and leaves one when ``val/accuracy`` reaches ``promote_at``.

    Validation is of the task that is being trained (at every scale), or that a loaded checkpoint had come to; test and
    prediction are of the last. A promotion takes effect with the first batch of the next epoch, in which every lane
    begins at a start: nothing is carried over from the shorter sequences. The stage is part of checkpoints, by its
    length: a resumed run goes on with it.

    In a Trainer this adds a callback, `Promotion`, which needs a model that logs ``val/accuracy`` and itself logs at
    every validation ``train/length``, the length that was trained and validated, and ``val/progress``, the number of
    the stage (from 0) plus ``val/accuracy``. The best checkpoint is that of the highest ``val/progress``: accuracy
    alone falls with every promotion, so that callbacks that monitor it are refused.

    Args:
        tasks: from the shortest to the longest, each of one length; at least one.
        promote_at: accuracy at which a stage is left, above 0 and at most 1.
        **options: those of `SequenceDataModule`.

    Raises:
        ValueError: for options out of range, tasks that do not grow, or if there are several tasks and none is
            validated at its own length.
    """

    def __init__(self, tasks: Sequence[Task], promote_at: float = 0.99, **options: Any) -> None:
        lengths = [task.max_length for task in tasks]
        if not tasks or any(shorter >= longer for shorter, longer in pairwise(lengths)):
            raise ValueError(f"tasks must be of increasing lengths, at least one, got {lengths}")
        super().__init__(tasks[-1], **options)
        if not 0 < promote_at <= 1:
            raise ValueError(f"promote_at must be above 0 and at most 1, got {promote_at}")
        if len(tasks) > 1 and "" not in self.validation_names:
            raise ValueError("validation_scales must include 1: a curriculum is promoted by accuracy at its own length")
        self.tasks = list(tasks)
        self.promote_at = promote_at
        self.stage = 0
        self.passed = False  # the stage, in a validation since it began
        self.validation_due = False  # now, after the latest training batch

    @property
    def training_task(self) -> Task:
        return self.tasks[self.stage]

    @property
    def training_seed(self) -> int:
        length = self.training_task.max_length
        return self.seed if len(self.tasks) == 1 else int(bits(self.seed, _STAGE, length))

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            self.stage, self.passed, self.validation_due = 0, False, False
            if self.trainer is not None:
                self._install(self.trainer)

    def judge(self, accuracy: float) -> None:
        """Take note of a validation of the present stage."""
        self.passed = self.passed or (accuracy >= self.promote_at and self.stage + 1 < len(self.tasks))

    def promote(self) -> None:
        """Go on to the next task if this one has been passed; to be called between two epochs."""
        if self.passed:
            self.stage, self.passed = self.stage + 1, False
            if self._train_loader is not None:
                self._train_loader.switch(self._training_stream())

    def state_dict(self) -> dict[str, Any]:
        length = self.training_task.max_length
        curriculum = {"length": length, "passed": self.passed, "validation_due": self.validation_due}
        return {**super().state_dict(), "curriculum": curriculum}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        saved, lengths = state_dict.get("curriculum", {}), [task.max_length for task in self.tasks]
        if saved.get("length") in lengths:  # else the training data have changed: the loader says so
            self.stage = lengths.index(saved["length"])
            self.passed = saved["passed"] and self.stage + 1 < len(self.tasks)
            self.validation_due = saved["validation_due"]

    def _install(self, trainer: Trainer) -> None:
        """Bring the callback along, in front of those that save checkpoints."""
        others = [callback for callback in trainer.callbacks if not isinstance(callback, Promotion)]  # type: ignore[attr-defined]
        trainer.callbacks = [Promotion(self), *others]  # type: ignore[attr-defined]
        if len(self.tasks) == 1:
            return
        if trainer.limit_val_batches == 0:
            raise ValueError(
                "a curriculum is promoted by validation, but trainer.limit_val_batches is 0: raise it, or leave out "
                "data.curriculum"
            )
        for callback in others:
            if str(getattr(callback, "monitor", None)).startswith(("val/accuracy", "val/loss")):
                raise ValueError(
                    f"{type(callback).__name__} monitors {callback.monitor}, which gets worse with every promotion of "
                    f"data.curriculum: monitor {MONITOR} (for the best checkpoint: checkpoint.monitor)"
                )


class Promotion(Callback):
    """Judges validations, promotes between epochs, and logs the stage. Brought along by its data module."""

    def __init__(self, data: CurriculumDataModule) -> None:
        self.data = data

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make good what Lightning leaves out when it resumes between a batch and the validation due after it."""
        if not self._concerns(trainer):
            return
        if self.data.validation_due and len(self.data.tasks) > 1:
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.restarting = False
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True
        self._promote(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.data.validation_due = validation_due(trainer)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not self._concerns(trainer):
            return
        if "val/accuracy" not in trainer.callback_metrics:
            if len(self.data.tasks) > 1:
                name = type(pl_module).__name__
                raise ValueError(f"data.curriculum needs a model that logs val/accuracy, {name} does not")
            return
        # the same on every rank, whatever the model has logged
        accuracy = float(trainer.strategy.broadcast(float(trainer.callback_metrics["val/accuracy"])))
        figures = {"train/length": float(self.data.training_task.max_length), MONITOR: self.data.stage + accuracy}
        pl_module.log_dict(figures, sync_dist=True)
        self.data.judge(accuracy)
        self.data.validation_due = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._concerns(trainer):
            self._promote(trainer)

    def _promote(self, trainer: Trainer) -> None:
        if self.data.passed and trainer.is_last_batch:  # max_steps may end training in mid-epoch
            self.data.promote()
            # so that the next validation asks for its loaders anew: with windows their number of batches changes
            trainer.fit_loop.epoch_loop.val_loop._combined_loader = None

    def _concerns(self, trainer: Trainer) -> bool:
        """Whether this trainer is fitting the data of this callback: it stays with the trainer."""
        return trainer.state.fn == TrainerFn.FITTING and trainer.datamodule is self.data  # type: ignore[attr-defined]
