"""Pass@k of ARC after every validation and test, and the submission."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from rtrl_moe_pl.data import ArcDataModule
from rtrl_moe_pl.data.puzzles import PuzzleBatch
from rtrl_moe_pl.reasoning.evaluator import ArcEvaluator, write_submission
from rtrl_moe_pl.training.pictures import picture_folder


class ArcEvaluation(Callback):
    """Logs ``val/SET/pass@1`` and so on, of answers under q-halt; needs an `ArcDataModule`.

    Beside them ``val/SET/tasks``, the denominator, and ``val/SET/test_inputs``. After ``test`` the answers to the first
    set are written as ``submission.json``, two attempts each, into the folder of the logs. See `ArcEvaluator`.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, ArcDataModule):
            raise TypeError(f"ArcEvaluation needs an ArcDataModule, got {type(data).__name__}")
        self._data = data

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        splits = self._data.validation_names
        self._evaluators = [ArcEvaluator(self._data.task, split).to(pl_module.device) for split in splits]  # type: ignore[arg-type]

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._submission = picture_folder(trainer) / "submission.json"
        if self._submission.exists():  # now, not when all is done
            raise FileExistsError(f"{self._submission} exists and is not overwritten: move it away")
        self.on_validation_start(trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: PuzzleBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        halted = outputs.halted_at(pl_module.halting.max_steps)
        self._evaluators[dataloader_idx].update(batch.index, outputs.at(halted), outputs.confidence(halted))

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(pl_module, "test")
        submission = self._evaluators[0].submission(k=2)
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._submission.parent.mkdir(parents=True, exist_ok=True)
            write_submission(submission, self._submission)
            print(f"submission: {self._submission}")

    def _log(self, module: LightningModule, stage: str) -> None:
        for split, evaluator in zip(self._data.validation_names, self._evaluators, strict=True):
            scored = {name: value for name, value in evaluator.compute().items() if not value.isnan()}
            figures = {f"{stage}/{split}/{name}": value for name, value in scored.items()}
            module.log_dict(figures, sync_dist=True)  # equal on all ranks already
