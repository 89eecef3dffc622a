"""A Trainer with the subcommands audit and forecast."""

from __future__ import annotations

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from rtrl_moe_pl.cli.audit import audit, audit_puzzles
from rtrl_moe_pl.cli.forecast import forecast, forecast_puzzles
from rtrl_moe_pl.modules import ReasoningModule, SequenceModule


class DiagnosisTrainer(Trainer):
    """A Trainer with the subcommands audit and forecast, which train nothing."""

    def audit(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        steps: int | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> bool:
        """Compare the configured gradient with another computation of it in float64, on the configured model and data.

        Args:
            model: the model.
            datamodule: the data.
            steps: time steps over which gradients are compared and norms are followed (null: 200); of a
                ReasoningModule supervision steps (null: 2).
            ckpt_path: a checkpoint whose weights are taken; last: the newest below the output folder; null: new ones.
            weights_only: whether the file may hold tensors and plain types alone; null: yes.
        """
        self._take_weights(model, ckpt_path, weights_only)
        given = () if steps is None else (steps,)
        if isinstance(model, SequenceModule) and datamodule is not None:
            return audit(model, datamodule, self, *given)
        if isinstance(model, ReasoningModule) and datamodule is not None:
            return audit_puzzles(model, datamodule, self, *given)
        raise TypeError(f"audit needs a SequenceModule or a ReasoningModule, and data, got {type(model).__name__}")

    def forecast(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        steps: int = 512,
        memory: float | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Memory and time of each gradient algorithm on the configured model and data, and which one to use.

        Args:
            model: the model.
            datamodule: the data.
            steps: most time steps of a sequence that are timed; a ReasoningModule has none.
            memory: GB that may be taken; null: what is free.
            ckpt_path: a checkpoint whose weights are taken, as of `audit`: they decide what a routed cell chooses.
            weights_only: as of `audit`.
        """
        self._take_weights(model, ckpt_path, weights_only)
        if isinstance(model, SequenceModule) and datamodule is not None:
            forecast(model, datamodule, self, steps, memory)
        elif isinstance(model, ReasoningModule) and datamodule is not None:
            forecast_puzzles(model, datamodule, self, memory)
        else:
            raise TypeError(
                f"forecast needs a SequenceModule or a ReasoningModule, and data, got {type(model).__name__}"
            )

    def _take_weights(self, model: LightningModule, path: str | None, weights_only: bool | None) -> None:
        if path is not None:
            checkpoint = self.strategy.checkpoint_io.load_checkpoint(path, weights_only=weights_only)
            model.on_load_checkpoint(checkpoint)  # refuses what does not fit
            model.load_state_dict(checkpoint["state_dict"])
