"""The DataModule that turns a task into training windows and validation sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from rtrl_moe_pl.cells.base import at_least
from rtrl_moe_pl.data.base import TaskDataModule
from rtrl_moe_pl.data.batch import Batch
from rtrl_moe_pl.data.loader import Request, StreamLoader, ValidationLoader
from rtrl_moe_pl.data.stream import Stream
from rtrl_moe_pl.randomness import bits
from rtrl_moe_pl.tasks import Task
from rtrl_moe_pl.tasks.base import one_of

_STEP_BYTES = 100  # of a step while its batch is made: 50 to 160 were measured, of all tasks and both layouts
_VALIDATION, _TEST = 1, 2  # their seeds are drawn from (seed, this, scale); training takes the seed itself


class SequenceDataModule(TaskDataModule):
    """Batches of a task, made on the device from cursors that the loaders yield.

    Everything is a pure function of the options: a run resumed from a checkpoint sees the batches an unbroken run
    would have seen, each rank draws its own sequences, and validation and test data never change. Validation, test
    and prediction come as whole sequences, one per lane, at once or (``validation_window``) piece by piece.

    Args:
        task: what the sequences are.
        seed: of the training data, at least 0; those of validation and test are derived from it.
        batch_size: lanes per process.
        layout: "stream": windows of persistent lanes, packed with sequences end to end, a start in mid-window
            wherever one begins. "sequences": a whole sequence per lane, padded with zero weight.
        steps_per_batch: columns of a window (layout "stream" only).
        batches_per_epoch: training batches per epoch; the stream goes on from epoch to epoch.
        validation_size: sequences per validation or test set, over all processes.
        validation_batch_size: sequences per validation batch and process.
        validation_scales: sequence lengths to validate at, as multiples of the trained lengths.
        validation_window: None: a validation, test or prediction batch is whole sequences. Else as many columns of
            them at a time, so that memory does not grow with their length: a lane starts at column 0 of its
            sequence's first window only. The Trainer's limits (limit_val_batches, num_sanity_val_steps,
            fast_dev_run) count windows then: they may cut sequences off before they are asked anything.
        encoding: "one_hot": inputs [B, T, input_size]. "ids": inputs [B, T] int64, for an embedding.

    Attributes:
        input_size: number of tokens, the width of one-hot inputs.
        output_size: number of classes.
        validation_names: one per validation loader: "" at the trained lengths, "2x" at twice those, and so on.

    Raises:
        TypeError, ValueError: for an option out of range, naming it.
    """

    def __init__(
        self,
        task: Task,
        seed: int = 0,
        batch_size: int = 32,
        layout: Literal["stream", "sequences"] = "stream",
        steps_per_batch: int = 64,
        batches_per_epoch: int = 100,
        validation_size: int = 1024,
        validation_batch_size: int = 256,
        validation_scales: Sequence[int] = (1, 2, 4),
        validation_window: int | None = None,
        encoding: Literal["one_hot", "ids"] = "one_hot",
    ) -> None:
        super().__init__()
        self.task = task
        self.seed = at_least(0, "seed", seed)
        self.batch_size = at_least(1, "batch_size", batch_size)
        self.layout = one_of(("stream", "sequences"), "layout", layout)
        self.steps_per_batch = at_least(1, "steps_per_batch", steps_per_batch)
        self.batches_per_epoch = at_least(1, "batches_per_epoch", batches_per_epoch)
        self.validation_size = at_least(1, "validation_size", validation_size)
        self.validation_batch_size = at_least(1, "validation_batch_size", validation_batch_size)
        if not validation_scales:
            raise ValueError("validation_scales needs at least one factor, got none: [1] is the trained lengths")
        self._scales = {_scale_name(scale): scale for scale in validation_scales}
        for scale in validation_scales:
            task.scale(scale)  # refused now or never
        self.validation_window = (
            None if validation_window is None else at_least(1, "validation_window", validation_window)
        )
        self.encoding = one_of(("one_hot", "ids"), "encoding", encoding)
        self.input_size = task.vocabulary_size
        self.output_size = task.num_classes
        self.validation_names = list(self._scales)
        self._streams: dict[str, Stream] = {}  # of the loaders handed out, by split
        self._train_loader: StreamLoader | None = None
        self._restored: dict[str, Any] | None = None  # a loader's state, until there is a loader

    # ---- loaders

    @property
    def training_task(self) -> Task:
        """What is trained and validated; test and prediction are of ``task``."""
        return self.task

    @property
    def training_seed(self) -> int:
        """That of the training stream."""
        return self.seed

    def setup(self, stage: str) -> None:
        """Every fit starts the training stream at its first batch, unless a checkpoint is loaded after this."""
        if stage == "fit":
            self._train_loader = self._restored = None

    def train_dataloader(self) -> StreamLoader:
        """The training batches. Within one fit this is one loader: reloading it goes on with the stream."""
        if self._train_loader is None or self.trainer is None:
            self._train_loader = StreamLoader("train", self._training_stream(), self.batches_per_epoch)
            if self._restored is not None:
                self._train_loader.load_state_dict(self._restored)
                self._restored = None
        return self._train_loader

    def val_dataloader(self) -> list[ValidationLoader]:
        """One loader per entry of `validation_names`."""
        return [self._fixed("validation", name) for name in self.validation_names]

    def test_dataloader(self) -> list[ValidationLoader]:
        """As for validation, of sequences drawn apart from those."""
        return [self._fixed("test", name) for name in self.validation_names]

    def predict_dataloader(self) -> ValidationLoader:
        """The first of the test sets."""
        return self._fixed("test", self.validation_names[0])

    def evaluation_stream(self, split: str, loader: int) -> Stream:
        """What a loader that was handed out draws from: the number ``loader`` of split "validation" or "test"."""
        return self._streams[_split_name(split, self.validation_names[loader])]

    def _fixed(self, split: str, name: str) -> ValidationLoader:
        purpose, task = (_VALIDATION, self.training_task) if split == "validation" else (_TEST, self.task)
        seed = int(bits(self.seed, purpose, self.validation_names.index(name)))
        split = _split_name(split, name)
        lanes = min(self.validation_batch_size, self.validation_size)
        stream = self._stream(split, task.scale(self._scales[name]), seed, lanes, None)
        columns = min(stream.task.max_length, self.validation_window or stream.task.max_length)
        self._require_room(
            f"a {split} batch of {lanes} x {columns} steps, of {self.task!r},",
            lanes * columns,
            "data.validation_batch_size, validation_scales or the length of the sequences, or set validation_window",
        )
        return ValidationLoader(split, stream, self.validation_size, self.validation_window)

    def _training_stream(self) -> Stream:
        steps = self.steps_per_batch if self.layout == "stream" else None
        columns = steps or self.training_task.max_length
        self._require_room(
            f"a training batch of {self.batch_size} x {columns} steps, of {self.training_task!r},",
            self.batch_size * columns,
            f"data.batch_size or {'data.steps_per_batch' if steps else 'the length of the sequences'}",
        )
        return self._stream("train", self.training_task, self.training_seed, self.batch_size, steps)

    def _stream(self, split: str, task: Task, seed: int, batch_size: int, steps: int | None) -> Stream:
        self._streams[split] = Stream(task, seed, batch_size, steps, *self.process)
        return self._streams[split]

    def _require_room(self, batch: str, steps: int, options: str) -> None:
        width = 5 * self.input_size if self.encoding == "one_hot" else 0  # a bool and a float32 a token
        self.require_room(batch, steps * (_STEP_BYTES + width), f"lower {options}")

    # ---- batches

    def on_after_batch_transfer(self, batch: Request, dataloader_idx: int) -> Batch:
        """Make the batch that a loader's request stands for, on the device to which the request was moved."""
        dtype = torch.get_default_dtype()
        if self.trainer is not None and self.trainer.lightning_module is not None:
            dtype = self.trainer.lightning_module.dtype
        assert isinstance(dtype, torch.dtype)
        made = self._streams[batch.split].batch(batch.cursor, batch.columns).to_dtype(dtype)
        return made.one_hot(self.input_size) if self.encoding == "one_hot" else made

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The training loader's position.

        Lightning keeps the loader's own state as well, but forgets it on resuming from a checkpoint written at the end
        of a training epoch, or if configure_optimizers has asked for trainer.estimated_stepping_batches.
        """
        return {} if self._train_loader is None else {"train": self._train_loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict.get("train")


def _split_name(split: str, name: str) -> str:
    return f"{split} {name}".rstrip()


def _scale_name(scale: int) -> str:
    at_least(1, "validation_scales", scale)
    return "" if scale == 1 else f"{scale}x"
