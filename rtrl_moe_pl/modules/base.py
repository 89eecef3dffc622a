"""What every module shares: hand-written gradients, one optimizer step per batch at most, carry in checkpoints."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from rtrl_moe_pl.cells.base import at_least
from rtrl_moe_pl.modules.architecture import ARCHITECTURE, architecture_of, check_architecture
from rtrl_moe_pl.modules.figures import Stopwatch
from rtrl_moe_pl.modules.optimization import prepare_callbacks, require_schedule, require_usable, warn_of_unused_rates
from rtrl_moe_pl.modules.resuming import (
    check_optimizer,
    close_epoch,
    describe,
    reopen_epoch,
    require_finite,
    require_resumable,
    stop_again,
)
from rtrl_moe_pl.randomness.generators import generator_states, seed_of_rank, set_generators
from rtrl_moe_pl.training import GradientSums, NumericalFailure, UpdateResult, sum_over_ranks, update
from rtrl_moe_pl.training.averaging import resume_raw
from rtrl_moe_pl.training.checkpoints import PER_RANK, DurableCheckpointIO
from rtrl_moe_pl.training.failure import first_bad
from rtrl_moe_pl.training.last_checkpoint import batches_behind
from rtrl_moe_pl.training.strategy import require_broadcast, require_same_processes


class ManualModule(LightningModule):
    """A LightningModule whose gradients come from elsewhere than ``loss.backward()``.

    A subclass's ``training_step`` computes sums of gradients and calls `update_parameters` once.

    Args:
        optimizer: called with the parameters.
        lr_scheduler: called with the optimizer; stepped once per optimizer step.
        gradient_clip: largest L2 norm of the mean gradient, or None.
        update_every: batches whose gradients are summed into one optimizer step.

    Raises:
        ValueError: if gradient_clip or update_every is not positive.
    """

    advice = "try a smaller learning rate, a smaller model.gradient_clip"  # after a numerical failure

    def __init__(
        self,
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        gradient_clip: float | None = None,
        update_every: int = 1,
    ) -> None:
        super().__init__()
        if gradient_clip is not None and not 0 < gradient_clip < math.inf:
            raise ValueError(f"gradient_clip must be positive and finite, or null for none, got {gradient_clip}")
        if optimizer is None:
            raise TypeError("optimizer must be an optimizer, got null")
        self.automatic_optimization = False
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.gradient_clip = gradient_clip
        self.update_every = at_least(1, "update_every", update_every)
        self._figures = Stopwatch()  # of training; a subclass puts its own in its place
        self.figures: dict[str, Any] = {}  # that were logged last, by tag
        self._resumed: dict[str, Any] | None = None  # this rank's part of a checkpoint, until training starts
        self._sums = GradientSums()
        self._diagnosis: str | None = None
        self.resumed_at: int | None = None  # optimizer steps of the checkpoint that this fit goes on from, if from one

    # ---- set-up

    def configure_callbacks(self) -> list[Callback]:
        """Refuse Trainer options that hand-written gradients cannot honour; adds no callback.

        This hook, because Lightning's own refusal comes right after it and cannot say where to set them instead.
        """
        trainer = self.trainer
        if trainer.gradient_clip_val:
            raise ValueError(
                f"trainer.gradient_clip_val={trainer.gradient_clip_val} is not supported: "
                "the Trainer cannot clip hand-written gradients; set model.gradient_clip instead"
            )
        if trainer.accumulate_grad_batches != 1:
            raise ValueError(
                f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches} is not supported: "
                "the Trainer cannot accumulate hand-written gradients; set model.update_every instead"
            )
        refuse_half(trainer.precision)
        prepare_callbacks(trainer.callbacks)  # type: ignore[attr-defined]
        require_broadcast(trainer.strategy, trainer.world_size)
        return []

    def setup(self, stage: str) -> None:
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # one that a user gave stays
            self.trainer.strategy.checkpoint_io = DurableCheckpointIO()
        self.trainer.precision_plugin.convert_module(self)  # type: ignore[attr-defined]  # before weights are restored
        self._sums.clear()
        self._diagnosis = self._resumed = self.resumed_at = None

    def make_optimizer(self) -> torch.optim.Optimizer:
        """The one optimizer of all parameters."""
        return self.optimizer(self.parameters())

    def configure_optimizers(self) -> Any:
        optimizer, scheduler = self._make_optimizer_and_schedule()
        return optimizer if scheduler is None else ([optimizer], [scheduler])

    def _make_optimizer_and_schedule(self) -> tuple[torch.optim.Optimizer, LRScheduler | None]:
        optimizer = self.make_optimizer()
        require_usable(optimizer)
        if self.lr_scheduler is None:
            return optimizer, None
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        scheduler = self.lr_scheduler(optimizer)
        require_schedule(scheduler, self.trainer, self.update_every)
        warn_of_unused_rates(rates, scheduler)
        return optimizer, scheduler  # type: ignore[return-value]  # ReduceLROnPlateau is refused

    # ---- the update

    def update_parameters(
        self,
        grads: Mapping[str, Tensor],
        weight: Tensor,
        diagnose: Callable[[], str | None],
        counts: Tensor | None = None,
    ) -> UpdateResult | None:
        """Add a batch's gradients; every ``update_every`` batches, update the parameters.

        Args:
            grads: gradients of the summed loss, by parameter name.
            weight: sum of the loss weights, 0-dim; NaN or infinite if anything else of the batch is.
            diagnose: says what went bad first in this batch, if anything did.
            counts: [n], to be summed over batches and ranks as well.

        Returns:
            what the update did; None between updates.
        Raises:
            NumericalFailure: naming the first tensor that went bad; on every rank at its next update or checkpoint.
        """
        self._sums.add(grads, weight, counts)
        if self._sums.batches < self.update_every:
            if self._diagnosis is None and not math.isfinite(float(weight)):
                self._diagnosis = diagnose() or "the loss weight is not finite"
                if self.trainer.world_size == 1:  # else the other ranks would wait for this one in their update
                    raise self._failure(self._diagnosis)
            return None
        try:
            return update(
                dict(self.named_parameters()),
                self._sums,
                self.optimizers(),  # type: ignore[arg-type]  # Lightning's wrapper of the one optimizer: it counts steps
                self.lr_schedulers(),  # type: ignore[arg-type]
                self.gradient_clip,
            )
        except NumericalFailure as failure:
            self._diagnosis = self._diagnosis or diagnose() or str(failure)
            raise self._failure(self._diagnosis) from None

    def _failure(self, diagnosis: str) -> NumericalFailure:
        advice = "check the data" if diagnosis.startswith("inputs") else self.advice
        kept = [str(path) for path in map(_saved_path, self.trainer.checkpoint_callbacks) if path]
        return NumericalFailure(
            f"training stopped at step {self.trainer.global_step}: {diagnosis}; {advice}; "
            f"last good checkpoint: {kept[-1] if kept else 'none'}"
        )

    def logs_now(self) -> bool:
        """Whether the loggers are written to after this batch; after the first batch all figures exist."""
        trainer: Any = self.trainer  # attributes that its __init__ does not declare
        done, every = _batches_done(trainer) + 1, trainer.log_every_n_steps
        return done == 1 or bool(trainer.fast_dev_run) or (every > 0 and done % every == 0)

    # ---- evaluation

    def _start_evaluation(self) -> None:
        """Get ready for the loaders of a validation or a test."""

    def on_validation_start(self) -> None:
        self._figures.pause()  # validation is not counted in the speed of training
        self._start_evaluation()

    def on_validation_end(self) -> None:
        self._figures.resume()

    def on_test_start(self) -> None:
        self._start_evaluation()

    # ---- checkpoints

    def carry_state(self) -> dict[str, Any] | None:
        """What the module carries between batches, in tensors, numbers, strings, lists and dicts."""
        return None

    def restore_carry(self, state: dict[str, Any] | None) -> None:
        """Take up what `carry_state` gave."""

    def carried_tensors(self) -> Iterable[tuple[str, Tensor]]:
        """Names and tensors of the carry, to be checked before they are saved."""
        return ()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        tensors = itertools.chain(
            ((f"parameter {name}", parameter) for name, parameter in self.named_parameters()),
            self.carried_tensors(),
            ((f"gradient of {name}", grad) for name, grad in self._sums.grads.items()),
        )
        bad = self._diagnosis or first_bad(tensors)
        flag = torch.tensor(float(bad is not None), device=self.trainer.strategy.root_device)
        if sum_over_ranks(flag):  # before any file is opened: the last good checkpoint stays
            raise self._failure(bad or "a tensor of another rank is not finite")
        checkpoint[ARCHITECTURE] = architecture_of(self)
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        checkpoint |= describe(next(iter(self.trainer.optimizers), None), next(iter(schedulers), None))  # type: ignore[arg-type]
        checkpoint[PER_RANK] = {
            "world_size": self.trainer.world_size,
            "global_step": self.trainer.global_step,
            "batches": batches_behind(self.trainer),  # several may be saved between two steps
            "carry": self.carry_state(),
            "sums": self._sums.state_dict(),
            "figures": self._figures.state_dict(),
            "generators": generator_states(self.device),
        }
        if self._resumed is not None:  # a validation before training: they are not taken up yet
            checkpoint[PER_RANK] |= {name: self._resumed[name] for name in ("figures", "generators")}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_architecture(self, checkpoint)
        require_finite(checkpoint["state_dict"])
        if self._trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        require_resumable(checkpoint, PER_RANK)
        check_optimizer(checkpoint, *self._make_optimizer_and_schedule(), self, self.trainer.max_steps)
        reopen_epoch(checkpoint)
        resume_raw(checkpoint, self.trainer)
        own = checkpoint[PER_RANK]
        require_same_processes(own, self.trainer.world_size)
        self._sums.load_state_dict(own["sums"])
        self.restore_carry(own["carry"])
        self._resumed = own if own["world_size"] == self.trainer.world_size else None
        self.resumed_at = checkpoint["global_step"]

    def on_train_start(self) -> None:
        close_epoch(self.trainer.fit_loop)
        if self.resumed_at is not None:
            stop_again(self.trainer)
        self._sums.to(self.device)
        self._figures.clear()
        if self._resumed is not None:
            self._figures.load_state_dict(self._resumed["figures"], self.device)
            set_generators(self._resumed["generators"], self.device)
            self._resumed = None
        else:
            seed_of_rank(self.trainer.global_rank)
        self._figures.resume()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Lightning's counter of figures is one too high after a resume at the end of an epoch. Callbacks have logged by
        # it already where they log at the start of a batch.
        loop: Any = self.trainer.fit_loop.epoch_loop
        loop._batches_that_stepped = _batches_done(self.trainer)


def refuse_half(precision: object) -> None:
    """Refuse precisions whose loss scale hand-written gradients would not survive, or that keep weights in 8 bits."""
    why = "weights of 8 bits lose updates below 1/256 of them" if precision == "bf16-true" else ""
    if str(precision).startswith("16"):
        why = "the loss scale of float16 would divide hand-written gradients"
    if why:
        raise ValueError(f"trainer.precision={precision} is not supported: {why}; use 32-true, 64-true or bf16-mixed")


def _batches_done(trainer: Any) -> int:
    """Training batches of all epochs that are behind, those of the run it resumed from counted in."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.completed


def _saved_path(callback: Checkpoint) -> str:
    return getattr(callback, "last_model_path", "") or getattr(callback, "best_model_path", "")
