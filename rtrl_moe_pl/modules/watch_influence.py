"""Whether the influence that is carried still says what the present weights do."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from rtrl_moe_pl.cells.base import at_least, positive
from rtrl_moe_pl.data.batch import joined
from rtrl_moe_pl.gradients import MemoryForecastError, audit_gradient
from rtrl_moe_pl.modules.watch import Watch, movement, vector

EXACT = 0.999  # cosine that an exact algorithm must reach: in float64 it is off by 1e-9 or less


class StalenessWatch(Watch):
    """Logs ``train/staleness``: how far the weights have moved while the influence that is carried was accumulated.

    With an update after every batch of a stream, P sums up derivatives at the weights of their time. The staleness of
    a lane is the sum of |theta_u - theta_(u-1)| / |theta| over the updates u since its last start, those of k updates
    ago times decay^k; it is logged as the mean over this process's lanes. Weights are those of the cell. They are
    compared from look to look, and between two looks taken to move evenly: to and fro within a look does not count.
    What the recurrence has forgotten since the start counts, so it is a bound from above. 0 where every lane starts
    anew in every batch. Modules and algorithms that carry no influence are left alone.

    Args:
        threshold: above which it warns.
        decay: P is multiplied by it after every update, in (0, 1]; below 1 the gradient is no longer exact: what was
            k updates ago counts decay^k. 1: P is not touched.
        reset_every: P is set to zero after every so many updates; None: never.

    Raises:
        TypeError, ValueError: for an option out of range.
    Cost: a copy of the cell's parameters a look. With decay a pass over P an update, which is first advanced over what
        is pending.
    """

    kept = ("_count", "_last", "_stale", "_weights")

    def __init__(self, threshold: float = 0.2, decay: float = 1.0, reset_every: int | None = None) -> None:
        self.threshold = positive("threshold", threshold)
        if not 0 < decay <= 1:
            raise ValueError(f"decay must be above 0 and at most 1, got {decay}")
        self.decay = decay
        self.reset_every = None if reset_every is None else at_least(1, "reset_every", reset_every)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._updates = trainer.global_step

    def begin(self) -> None:
        self._count = 0  # batches since the last look
        self._last: Tensor | None = None  # [B], the number of the batch of a lane's last start among them; 0: none
        self._stale: Tensor | None = None  # [B]
        self._weights: Tensor | None = None  # at the last look

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        memory: Any = getattr(pl_module, "memory", None)
        if memory is None or not pl_module.gradient.carries_influence or batch.starts is None:  # type: ignore[union-attr]
            return
        started = batch.starts.any(1)
        if trainer.global_step > self._updates:
            self._updates = trainer.global_step
            if self.reset_every is not None and self._updates % self.reset_every == 0:
                memory.scale_influence_(0.0)
                started = torch.ones_like(started)
            elif self.decay < 1:
                memory.scale_influence_(self.decay)
        if self._last is None or len(self._last) != len(started):  # other lanes, which all start
            self._count, self._last = 0, torch.zeros_like(started, dtype=torch.long)
        self._count += 1
        self._last = torch.where(started, self._count, self._last)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def look(self, trainer: Trainer, module: Any) -> None:
        count, last = self._count, self._last
        assert last is not None
        weights, updates = vector(module.cell.parameters()), trainer.global_step - self.step_seen
        old = self._stale
        if old is None or len(old) != len(last):
            old = torch.zeros_like(last, dtype=torch.float64)
        if self._weights is not None and len(weights) == len(self._weights):
            each = movement(weights, self._weights) / max(1, updates)
            recent = updates * (count - last) / count  # [B], updates since then
            if self.decay < 1:
                recent = (1 - self.decay**recent) / (1 - self.decay)
            self._stale = torch.where(last > 0, 0.0, old * self.decay**updates) + each * recent
            staleness = float(self._stale.mean())
            module.log("train/staleness", staleness)
            if staleness > self.threshold:
                self.warn(
                    trainer,
                    "stale",
                    f"train/staleness is {staleness:.3g}, above {self.threshold:g}: the influence is of other weights; "
                    "try a smaller learning rate, a larger model.update_every, shorter sequences, or StalenessWatch "
                    "with a decay below 1",
                )
        self._weights, self._count, self._last = weights, 0, torch.zeros_like(last)


class ProbeWatch(Watch):
    """Logs ``train/probe_cosine``: of the gradient by the module's algorithm to BPTT's, at the present weights.

    On the latest batches of training, joined and begun as if every lane started, in float64, on copies: training goes
    on bit for bit as without it. By rank 0 alone. It warns if an exact algorithm is below 0.999, which is a fault, or
    an approximate one below ``threshold``. Nothing is logged where these steps give no gradient.

    Args:
        every: batches between two probes, which are made when figures are logged.
        steps: of a probe; None: two windows and one more, or a batch if that is longer.
        threshold: of an approximate algorithm.

    Raises:
        TypeError, ValueError: for an option out of range, or steps within one window, where all algorithms are equal.
        TypeError: in ``setup``, for a module without a gradient algorithm.
    Cost: an audit over ``steps`` steps: one BPTT and one run of the algorithm, in float64.
    """

    def __init__(self, every: int = 500, steps: int | None = None, threshold: float = 0.5) -> None:
        self.every, self.threshold = at_least(1, "every", every), threshold
        self.steps = None if steps is None else at_least(2, "steps", steps)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        gradient: Any = getattr(pl_module, "gradient", None)
        if gradient is None:
            raise TypeError(f"ProbeWatch needs a SequenceModule, got {type(pl_module).__name__}: leave it out")
        window = gradient.window or 1
        self._needed = 2 * window + 1 if self.steps is None else self.steps
        if self._needed <= window:
            raise ValueError(f"steps must be more than the window of {gradient!r}, got {self.steps}")
        self._batches: deque[Any] = deque()
        self._probed = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._batches and len(self._batches[0].inputs) != len(batch.inputs):
            self._batches.clear()
        self._batches.append(batch)
        while sum(kept.inputs.shape[1] for kept in list(self._batches)[1:]) >= self._needed:
            self._batches.popleft()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def look(self, trainer: Trainer, module: Any) -> None:
        batches: Any = trainer.fit_loop.total_batch_idx + 1
        columns = sum(batch.inputs.shape[1] for batch in self._batches)
        if not trainer.is_global_zero or batches // self.every == self._probed // self.every or columns < self._needed:
            return
        self._probed = batches
        inputs, targets, starts, _ = joined(self._batches)
        with torch.random.fork_rng([module.device] if module.device.type == "cuda" else []):
            try:
                report = audit_gradient(
                    module.gradient, module.cell, module.readout, inputs, targets, module.loss, starts
                )
            except MemoryForecastError as error:
                self.warn(trainer, "memory", f"no probe is made: in float64, beside training, {error}")
                return
        if math.isnan(report.cosine):
            return
        module.log("train/probe_cosine", report.cosine, rank_zero_only=True)
        what = f"train/probe_cosine of {module.gradient!r} to BPTT is {report.cosine:.6f} over {columns} steps"
        if report.exact and not report.cosine >= EXACT:
            self.warn(
                trainer,
                "exact",
                f"{what}, though it claims to be exact: a fault; run audit, and report it with the configuration",
            )
        if not report.exact and report.cosine < self.threshold:
            self.warn(
                trainer,
                "approximate",
                f"{what}, below {self.threshold:g}: what it leaves out matters; try a longer window, or RTRL",
            )
