"""Callbacks that look at training now and then, and warn in words before it fails."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from rtrl_moe_pl.cells.base import at_least, not_negative, positive
from rtrl_moe_pl.modules.base import ManualModule


class TrainingWarning(UserWarning):
    """Training goes on, but not as it should."""


class Watch(Callback):
    """Looks at training after every batch whose figures are logged, and warns once of every cause, on rank 0.

    A run that resumes goes on with what was seen, of rank 0, and warns anew.

    Attributes:
        kept: names of the attributes that hold what was seen: tensors, numbers, and lists and dicts of them.
    """

    kept: ClassVar[tuple[str, ...]] = ()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, ManualModule):
            raise TypeError(
                f"{type(self).__name__} needs a module of rtrl_moe_pl.modules, got {type(pl_module).__name__}: leave "
                "it out"
            )
        self._said: set[str] = set()
        self._restored: dict[str, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step_seen = trainer.global_step  # updates that were done at the last look
        self.begin()
        for name, value in self._restored.items():
            setattr(self, name, move_data_to_device(value, pl_module.device))

    def begin(self) -> None:
        """Set all that is ``kept`` to what nothing seen gives."""

    def state_dict(self) -> dict[str, Any]:
        names = ("step_seen", *self.kept) if self.kept and hasattr(self, "step_seen") else ()
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if pl_module.logs_now():  # type: ignore[operator]
            self.look(trainer, pl_module)
            self.step_seen = trainer.global_step

    def look(self, trainer: Trainer, module: Any) -> None:
        """Look at a ManualModule after a batch."""
        raise NotImplementedError

    def warn(self, trainer: Trainer, cause: str, text: str) -> None:
        """Warn, unless it was of the same cause."""
        if cause not in self._said and trainer.is_global_zero:
            # no line of source: where in this package it is found out says nothing
            message = f"step {trainer.global_step}: {text}"
            warnings.warn_explicit(message, TrainingWarning, "rtrl_moe_pl", 0, module=__name__)
        self._said.add(cause)


def vector(parameters: Iterable[nn.Parameter]) -> Tensor:
    """All that are trained, [n]; a copy. Of none, as where all are frozen, [0]."""
    trained = [p.detach().flatten() for p in parameters if p.requires_grad]
    return torch.cat(trained) if trained else torch.zeros(0)


def movement(new: Tensor, old: Tensor) -> float:
    """|new - old| / |new|; infinite for new weights of zero, and 0 if they were that before."""
    moved, size = torch.stack([(new - old).norm(), new.norm()]).tolist()
    return moved / size if size else math.inf * moved if moved else 0.0


class GrowthWatch(Watch):
    """Warns if the state or the influence matrix is very large, or grows steadily.

    Sizes are root mean squares over all entries (``train/state_norm`` over the root of S, ``train/influence_norm``
    over that of B S |theta|), so that they mean the same for every model. Modules without them are left alone.

    Args:
        state, influence: above which root mean square it warns.
        factor: it also warns if all of the last looks // 2 sizes are this many times as large as any of those before,
            and above 1.
        looks: at least 2.

    Raises:
        TypeError, ValueError: for an option out of range.
    """

    kept = ("_sizes",)

    def __init__(self, state: float = 100.0, influence: float = 1e3, factor: float = 100.0, looks: int = 10) -> None:
        self.limits = {"state": positive("state", state), "influence": positive("influence", influence)}
        self.factor, self.looks = positive("factor", factor), at_least(2, "looks", looks)

    def begin(self) -> None:
        self._sizes: dict[str, list[float]] = {name: [] for name in self.limits}

    def look(self, trainer: Trainer, module: Any) -> None:
        memory = getattr(module, "memory", None)
        if memory is None:
            return
        lanes, size = memory.state.shape[0] * trainer.world_size, memory.state.shape[1]  # figures are of all lanes
        entries = {"state": size, "influence": lanes * size * sum(s.numel() for s in memory.base.shapes.values())}
        for name, limit in self.limits.items():
            norm = float(module.figures[f"train/{name}_norm"])
            mean = norm / math.sqrt(max(1, entries[name]))
            sizes = self._sizes[name] = [*self._sizes[name], mean][-self.looks :]
            what = f"train/{name}_norm is {norm:.3g}, {mean:.3g} an entry"
            if mean > limit:
                self.warn(trainer, name, f"{what}, above {limit:g}: {_ADVICE}")
            before, after = sizes[: self.looks // 2], sizes[-(self.looks // 2) :]
            if len(sizes) == self.looks and min(after) > max(1.0, self.factor * max(before)):
                since = f"it was at most {max(before):.3g} {self.looks // 2} looks ago"
                self.warn(trainer, f"{name} grows", f"{what}, and {since}: {_ADVICE}")


_ADVICE = (
    "the recurrence amplifies; try a smaller learning rate, a gated cell (GRU, LSTM), recurrent weights of a smaller "
    "gain, shorter sequences, a smaller model.gradient_clip"
)


AT_ONCE = 0.5  # of an update's size
_SLOWER = "try a smaller learning rate, or a warmup of it"


class UpdateSizeWatch(Watch):
    """Logs ``train/update_size``, the relative size |theta' - theta| / |theta'| of an update of all trained parameters.

    Of the update of the batch that is logged; where it made none, of the next one, logged when figures are again.

    Args:
        large, small: it warns if the last ``looks`` sizes were all above ``large``, or all below ``small`` (at 6e-8
            and below, most weights in float32 stay as they are). Of a size above 0.5, by which one update makes most of
            what the weights are, it warns at once. Of weights that were all zero, sizes above ``large`` say nothing of
            the learning rate for 1 / large^2 updates, by which those of a random walk have come below it.
        looks: at least 1.

    Raises:
        TypeError, ValueError: for an option out of range.
    Cost: two copies of the parameters a look.
    """

    kept = ("_waits", "_size", "_sizes", "_zero_at")

    def __init__(self, large: float = 0.1, small: float = 1e-7, looks: int = 5) -> None:
        self.large, self.small = positive("large", large), not_negative("small", small)
        self.looks = at_least(1, "looks", looks)

    def begin(self) -> None:
        self._before: Tensor | None = None
        self._waits = False
        self._size: float | None = None
        self._sizes: list[float] = []
        self._zero_at: int | None = None  # updates done when the trained weights were last seen to be zero before one

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if self._waits or pl_module.logs_now():  # type: ignore[operator]
            self._before = vector(pl_module.parameters())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._before is not None:
            self._size = movement(vector(pl_module.parameters()), self._before)
            if not self._before.any():
                self._zero_at = trainer.global_step
            self._before, self._waits = None, False
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def look(self, trainer: Trainer, module: Any) -> None:
        if self._size is None:
            self._waits = True
            return
        size, self._size = self._size, None
        module.log("train/update_size", size)
        since = math.inf if self._zero_at is None else trainer.global_step - self._zero_at
        if size > self.large and since < 1 / self.large**2:
            return
        self._sizes = [*self._sizes, size][-self.looks :]
        if size > AT_ONCE:
            self.warn(
                trainer,
                "large",
                f"train/update_size was {size:.3g}: one update made most of what the weights are now: {_SLOWER}",
            )
        sizes = f"train/update_size was {min(self._sizes):.3g} to {max(self._sizes):.3g} in the last {self.looks} looks"
        if len(self._sizes) < self.looks:
            return
        if min(self._sizes) > self.large:
            self.warn(trainer, "large", f"{sizes}, above {self.large:g}: {_SLOWER}")
        if max(self._sizes) < self.small:
            self.warn(
                trainer,
                "small",
                f"{sizes}, below {self.small:g}: nothing is learned; try a larger learning rate, a larger "
                "model.gradient_clip, a schedule that does not end before training does",
            )
