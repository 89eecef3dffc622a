"""Train a recursive model on puzzles: TRM with a puzzle embedding, ETRM with an encoder of demonstrations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from rtrl_moe_pl.cells.base import at_least, not_negative
from rtrl_moe_pl.data.puzzles import PuzzleBatch, PuzzleStream
from rtrl_moe_pl.modules.base import ManualModule
from rtrl_moe_pl.modules.encoder_training import make_optimizer, require_trainable
from rtrl_moe_pl.modules.figures import log_figures
from rtrl_moe_pl.modules.pretrained import load_pretrained
from rtrl_moe_pl.modules.reasoning_figures import ReasoningFigures, context_figures, grad_norms
from rtrl_moe_pl.reasoning.carry import Carry, Halting
from rtrl_moe_pl.reasoning.encoders import Encoder, PuzzleEmbedding
from rtrl_moe_pl.reasoning.etrm import Mode, Supervision, Thoughts, supervise, think
from rtrl_moe_pl.reasoning.losses import ReasoningLoss
from rtrl_moe_pl.reasoning.metrics import Curves, PuzzleMetrics
from rtrl_moe_pl.reasoning.trm import TRM
from rtrl_moe_pl.tasks.base import one_of
from rtrl_moe_pl.tasks.puzzles import Puzzles, PuzzleShape
from rtrl_moe_pl.training.failure import first_bad
from rtrl_moe_pl.training.pictures import log_histogram


class ReasoningModule(ManualModule):
    """A recursive model that answers puzzles, one supervision step and one optimizer step per training batch.

    Every lane carries its puzzle and the model's inner states from batch to batch until it halts, and takes up the next
    puzzle of its own only then: none is lost. Labels are those of the puzzles that lanes hold. Nothing of a carry has a
    graph: gradients stay within a supervision step.

    Args:
        shape: sizes of the puzzles; linked to the data on the command line.
        decoder: called with the shape: a `TRM` with its options.
        encoder: called with shape, width and prefix of the decoder: what the prefix is made of. `PuzzleEmbedding` gives
            TRM, an encoder of demonstrations ETRM.
        mode: "re_encode": demonstrations are encoded at every step, so that every lane's loss reaches the encoder.
            "fixed_time": so too, and lanes halt after exactly halting.max_steps. "cached": demonstrations are encoded
            at a puzzle's first step alone; an ablation, which starves the encoder.
        halting: when lanes are done; None: `Halting()`.
        loss: None: `ReasoningLoss()`.
        kl_weight: of the divergence of variational encoders, per row.
        evaluation_steps: numbers of supervision steps to evaluate at, beside the other ways of stopping; those above
            ``halting.max_steps`` think on for longer than training does.
        encoder_lr: learning rate of the encoder; None: the optimizer's own.
        embedding_optimizer: of the table of a `PuzzleEmbedding`, such as `SignSGD`; None: the optimizer of the rest.
        pretrained: checkpoint whose decoder training begins with, and whose encoder if it is of the same class (both
            must fit); a `PuzzleEmbedding` of another size begins with the mean of its rows. See also `Freeze`.
        optimizer, lr_scheduler, gradient_clip, update_every: see ManualModule.

    Raises:
        TypeError, ValueError: for options out of range, naming the option.
    References: Jolicoeur-Martineau 2025, arXiv 2510.04871 (TRM).
    """

    _figures: ReasoningFigures

    def __init__(
        self,
        shape: PuzzleShape,
        decoder: Callable[[PuzzleShape], TRM],
        encoder: Callable[[PuzzleShape, int, int], Encoder] = PuzzleEmbedding,
        mode: Mode = "re_encode",
        halting: Halting | None = None,
        loss: ReasoningLoss | None = None,
        kl_weight: float = 1e-4,
        evaluation_steps: Sequence[int] = (),
        encoder_lr: float | None = None,
        embedding_optimizer: OptimizerCallable | None = None,
        pretrained: str | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        gradient_clip: float | None = 1.0,
        update_every: int = 1,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, gradient_clip, update_every)
        self.shape = shape
        if decoder is None or encoder is None:
            raise TypeError("decoder and encoder must be classes, got null")
        self.decoder = decoder(shape)
        self.encoder = encoder(shape, self.decoder.width, self.decoder.prefix)
        self.mode: Mode = one_of(get_args(Mode), "mode", mode)  # type: ignore[assignment]
        self.halting = Halting() if halting is None else halting
        self.loss = ReasoningLoss() if loss is None else loss
        self.kl_weight = not_negative("kl_weight", kl_weight)
        self.evaluation_steps = [at_least(1, "evaluation_steps", steps) for steps in evaluation_steps]
        require_trainable(self.encoder, self.mode, encoder_lr, embedding_optimizer)
        self.encoder_lr = None if encoder_lr is None else not_negative("encoder_lr", encoder_lr)
        self.embedding_optimizer = embedding_optimizer
        self.pretrained = pretrained
        self._thinks_for = self._metrics().steps  # in evaluation
        self.evaluations = nn.ModuleDict()  # metrics by name of the evaluation set
        self.curves: dict[str, Curves] = {}  # of the last evaluation, by name of its set
        self._carry: Carry | None = None  # not a buffer: other processes carry other lanes
        self._stream: str | None = None  # identity of the stream that the carry's puzzles are of
        self._restored = False  # whether the carry is that of a checkpoint
        self._figures = ReasoningFigures(self.halting.max_steps)

    # ---- training

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self._carry = self._stream = None
        self._restored = False
        self._missing: FileNotFoundError | None = None
        if stage == "fit" and self.pretrained is not None:
            try:
                load_pretrained(self, Path(self.pretrained))
            except FileNotFoundError as missing:  # a run that goes on has weights of its own
                self._missing = missing

    def on_fit_start(self) -> None:
        if self._missing is not None and self.trainer.ckpt_path is None:
            raise self._missing

    def make_optimizer(self) -> torch.optim.Optimizer:
        own = self.encoder_lr, self.embedding_optimizer
        return make_optimizer(self.optimizer, self.decoder, self.encoder, *own)

    def on_train_start(self) -> None:
        super().on_train_start()
        self._carry = None if self._carry is None else self._carry.to(self.device)

    def training_step(self, batch: PuzzleStream, batch_idx: int) -> None:
        with torch.autocast(self.device.type, enabled=False):
            made = supervise(self.decoder, self.encoder, self._renewed(batch), self.mode, batch.seed)
            labels = made.carry.puzzles.labels
            loss = self.loss(made.answer, labels, self._go_on_target(made))
            total = loss.total(self.loss.halt_weight)
            if made.encoding.kl is not None:
                total = total + self.kl_weight * made.encoding.kl.sum()
            grads, reached = self._gradients(total, made)
        weight = made.carry.puzzles.valid.sum().to(total.dtype)

        def diagnose() -> str | None:
            tensors = {"context": made.context, "state": made.carry.latents.high, "logits": made.answer.logits}
            tensors |= {"q_halt": made.answer.halt, "loss": total}
            return first_bad([*tensors.items(), *((f"gradient of {name}", grad) for name, grad in grads.items())])

        carry = made.carry
        halted = self._halted(made, batch.seed)
        self._carry = replace(carry, halted=halted)
        update = self.update_parameters(grads, weight + 0 * total.detach(), diagnose)
        self._figures.add(made, loss, total.detach(), reached, halted)
        if self.logs_now():
            figures, steps = self._figures.read()
            encoded: Any = self.all_gather((made.context, carry.puzzles.identity))
            values: dict[str, Any] = {**figures, **context_figures(*encoded)}
            if update is not None and update.stepped:
                values |= grad_norms(self, update.grad_norm)
            log_figures(self, values, batch_size=1)
            log_histogram(self.trainer, "train/steps_at_halt", steps)

    def _renewed(self, stream: PuzzleStream) -> Carry:
        """The carry for the next step: lanes that have halted hold their next puzzles."""
        if not isinstance(stream, PuzzleStream):
            raise TypeError(
                f"training batches must be a PuzzleStream, from which lanes draw when they have halted, got "
                f"{type(stream).__name__}: use a PuzzleDataModule"
            )
        if self._carry is not None and self._stream != stream.identity:
            change = f"from [{self._stream}] to [{stream.identity}]"
            if not self._restored:
                raise ValueError(f"the training data changed under a live carry, {change}: keep them within a run")
            rank_zero_warn(f"the training data have changed since the checkpoint, {change}: every lane begins anew")
            self._carry = None
        self._restored = False
        if self._carry is None:
            self._stream = stream.identity
            index = stream.first()
            return Carry.first(self.decoder, index, stream.draw(index))
        return self._carry.renew(self.decoder, stream.lanes, stream.draw)

    def _gradients(self, total: Tensor, made: Supervision) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients of the summed loss by parameter name, and how many rows' loss reached the encoder.

        Zero where the loss does not reach a parameter: every rank must have the same ones.
        """
        named = {name: p for name, p in self.named_parameters() if p.requires_grad}
        context = made.encoding.context
        probe = [context] if context.requires_grad else []
        found = torch.autograd.grad(total, [*named.values(), *probe], allow_unused=True, materialize_grads=True)
        reached = (found[-1].flatten(1) != 0).any(1).sum() if probe else total.new_zeros(())
        return dict(zip(named, found, strict=False)), reached

    @torch.no_grad()
    def _go_on_target(self, made: Supervision) -> Tensor | None:
        """What q_continue should be: how sure the next step will be, sigmoid of the better of its two values."""
        if not self.halting.q_continue:
            return None
        carry = made.carry
        _, ahead = self.decoder(carry.latents, carry.puzzles.inputs, made.context)
        last = carry.steps + 1 >= self.halting.max_steps
        return torch.sigmoid(torch.where(last, ahead.halt, torch.maximum(ahead.halt, ahead.go_on)))

    @torch.no_grad()
    def _halted(self, made: Supervision, seed: int) -> Tensor:
        carry = made.carry
        if self.mode == "fixed_time":
            return carry.steps >= self.halting.max_steps
        return self.halting(made.answer, carry.steps, carry.index, seed)

    # ---- evaluation

    def _start_evaluation(self) -> None:
        trainer: Any = self.trainer
        loaders = trainer.num_test_batches if trainer.testing else trainer.num_val_batches
        unnamed = [f"set_{i}" for i in range(len(loaders))]
        names = list(getattr(trainer.datamodule, "validation_names", unnamed))
        self.evaluations = nn.ModuleDict({name: self._metrics() for name in names}).to(self.device)

    def _metrics(self) -> PuzzleMetrics:
        return PuzzleMetrics(self.halting.max_steps, self.evaluation_steps)

    def on_predict_start(self) -> None:
        data: Any = getattr(self.trainer, "datamodule", None)
        if getattr(data, "questions", None) is not None and isinstance(self.encoder, PuzzleEmbedding):
            if self.shape.identities > 1:
                raise ValueError(
                    "data.puzzle: a PuzzleEmbedding knows the puzzles it was trained on and no other; use an encoder "
                    "of demonstrations"
                )

    def validation_step(self, batch: PuzzleBatch, batch_idx: int, dataloader_idx: int = 0) -> Thoughts:
        """Predictions and q_halt of every step, for callbacks."""
        return self._evaluate(batch, dataloader_idx)

    def test_step(self, batch: PuzzleBatch, batch_idx: int, dataloader_idx: int = 0) -> Thoughts:
        """Predictions and q_halt of every step, for callbacks."""
        return self._evaluate(batch, dataloader_idx)

    def predict_step(self, batch: PuzzleBatch, batch_idx: int, dataloader_idx: int = 0) -> Thoughts:
        """Predictions and q_halt of every step."""
        return self(batch.puzzles)

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def _evaluate(self, batch: PuzzleBatch, loader: int) -> Thoughts:
        metrics = list(self.evaluations.values())[loader]
        assert isinstance(metrics, PuzzleMetrics)
        thoughts = self(batch.puzzles)
        metrics.update(thoughts, batch.puzzles.labels)
        return thoughts

    def _log_evaluation(self, stage: str) -> None:
        for name, metrics in self.evaluations.items():
            figures = {f"{stage}/{name}/{figure}": value.float() for figure, value in metrics.compute().items()}  # type: ignore[operator]
            shown = f"{stage}/{name}/exact_accuracy"
            self.log(shown, figures.pop(shown), prog_bar=True, sync_dist=True)  # equal on all ranks already
            self.log_dict(figures, sync_dist=True)
            curves = self.curves[name] = metrics.curves()  # type: ignore[operator]
            log_histogram(self.trainer, f"{stage}/{name}/steps_at_halt", curves.halted)

    def forward(self, puzzles: Puzzles) -> Thoughts:
        """Answers of all supervision steps, from the initial states on; the training carry is left alone."""
        with torch.autocast(self.device.type, enabled=False):
            return think(self.decoder, self.encoder, puzzles, self._thinks_for, self.halting.q_continue)

    # ---- checkpoints

    def carry_state(self) -> dict[str, Any] | None:
        return None if self._carry is None else {"stream": self._stream, "lanes": self._carry.state_dict()}

    def restore_carry(self, state: dict[str, Any] | None) -> None:
        if state is None:
            return
        self._stream, self._carry, self._restored = state["stream"], Carry.from_state_dict(state["lanes"]), True

    def carried_tensors(self) -> Iterable[tuple[str, Tensor]]:
        if self._carry is not None:
            yield from (("state z_H", self._carry.latents.high), ("state z_L", self._carry.latents.low))
