"""DataModules of puzzles: a stream that lanes draw from when they are done with one, and fixed evaluation sets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rtrl_moe_pl.cells.base import at_least
from rtrl_moe_pl.data.base import TaskDataModule
from rtrl_moe_pl.randomness import bits
from rtrl_moe_pl.tasks.puzzles import Puzzles, PuzzleShape, PuzzleTask, read_questions
from rtrl_moe_pl.tasks.puzzles.arc_files import FORM

QUESTIONS = "questions"  # the set that a file holds
_OF_ENDLESS = 512  # puzzles of an evaluation set that has no end
_CELL_BYTES = 30  # of a cell of a grid while puzzles are drawn: 13 to 41 were measured, of all tasks
_EVALUATION = 3  # the seed of evaluation sets is drawn from (seed, this)


class PuzzleBatch(NamedTuple):
    """Puzzles to be evaluated."""

    index: Tensor  # [B] int64, which of the set; -1: padding
    puzzles: Puzzles


class PuzzleStream:
    """Training puzzles of one process: lane l of all holds the puzzles l, l + lanes, l + 2 lanes and so on.

    A training batch is the stream itself: which lanes need another puzzle only the module knows, so that it draws.

    Args:
        task: what the puzzles are.
        seed: which of the task's streams.
        batch_size: lanes of this process.
        rank, world_size: this process among all.
        device: where puzzles are made.
    """

    def __init__(
        self,
        task: PuzzleTask,
        seed: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.task, self.seed, self.batch_size = task, seed, batch_size
        self.rank, self.world_size, self.device = rank, world_size, torch.device(device)

    @property
    def lanes(self) -> int:
        """Number of lanes of all processes."""
        return self.batch_size * self.world_size

    @property
    def identity(self) -> str:
        """Names the stream of all ranks: streams of the same identity give equal puzzles to equal lanes."""
        return f"{self.task!r}, seed={self.seed}, lanes={self.lanes}"

    def first(self) -> Tensor:
        """[batch_size]: the first puzzle of every lane."""
        return self.rank * self.batch_size + torch.arange(self.batch_size, device=self.device)

    def draw(self, index: Tensor) -> Puzzles:
        """The puzzles of an index [n]."""
        return self.task.draw("train", self.seed, index)


class _Turns:
    """``batches`` times the same item: a sized loader of a stream, whose position is the lanes' own."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[str]:
        return iter(["train"] * self.batches)

    def state_dict(self) -> dict[str, Any]:  # Lightning takes a loader that has it for resumable, as this one is
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class _Request(NamedTuple):
    """An evaluation batch yet to be made."""

    split: str
    index: Tensor


class _EvaluationLoader:
    """The puzzles 0..size - 1 of a set in batches, shared out between the ranks; as many batches on each.

    Where puzzles run out a batch holds padding (index -1).
    """

    def __init__(self, split: str, size: int, batch_size: int, rank: int, world_size: int) -> None:
        self.split, self.size, self.batch_size, self.rank, self.world_size = split, size, batch_size, rank, world_size

    def __len__(self) -> int:
        return -(-self.size // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[_Request]:
        for batch in range(len(self)):
            index = (batch * self.world_size + self.rank) * self.batch_size + torch.arange(self.batch_size)
            index = torch.where(index < self.size, index, -1)
            kept = int((index >= 0).sum())
            yield _Request(self.split, index[: max(1, kept)])


class PuzzleDataModule(TaskDataModule):
    """Puzzles of a task, made on the device.

    Training: every batch is a `PuzzleStream`. Evaluation: the same puzzles every time, one loader per evaluation set
    of the task.

    Args:
        task: what the puzzles are.
        seed: of the training puzzles, at least 0; those of evaluation are derived from it.
        batch_size: lanes per process.
        batches_per_epoch: supervision steps per epoch; lanes go on from epoch to epoch.
        validation_size: puzzles per evaluation set, over all processes; None: 512 of an endless one, all of another.
        validation_batch_size: puzzles per evaluation batch and process.
        puzzle: JSON file to be answered by ``predict``, see `read_questions`; None: the task's first evaluation set.

    Attributes:
        shape: sizes of the puzzles, for the model.
        validation_names: one per evaluation loader.

    Raises:
        TypeError, ValueError: for an option out of range, naming it; for a file of no puzzle.
        FileNotFoundError: if there is no such file.
    """

    def __init__(
        self,
        task: PuzzleTask,
        seed: int = 0,
        batch_size: int = 64,
        batches_per_epoch: int = 100,
        validation_size: int | None = None,
        validation_batch_size: int = 256,
        puzzle: str | None = None,
    ) -> None:
        super().__init__()
        self.task = task
        self.seed = at_least(0, "seed", seed)
        self.batch_size = at_least(1, "batch_size", batch_size)
        self.batches_per_epoch = at_least(1, "batches_per_epoch", batches_per_epoch)
        self.validation_size = None if validation_size is None else at_least(1, "validation_size", validation_size)
        self.validation_batch_size = at_least(1, "validation_batch_size", validation_batch_size)
        if puzzle is not None and not Path(puzzle).is_file():
            fault = f"{puzzle} is a folder" if puzzle and Path(puzzle).is_dir() else f"there is no file {puzzle}"
            raise FileNotFoundError(f"data.puzzle: {fault}: name a JSON file, {FORM}")
        try:
            self.questions = None if puzzle is None else read_questions(puzzle, task)  # refused now or never
        except ValueError as fault:
            raise ValueError(f"data.puzzle: {fault}") from fault

    @property
    def shape(self) -> PuzzleShape:
        return self.task.shape

    @property
    def validation_names(self) -> list[str]:
        return list(self.task.evaluation_splits)

    @property
    def evaluation_seed(self) -> int:
        """That of all evaluation sets: a control differs from what it controls in nothing else."""
        return int(bits(self.seed, _EVALUATION))

    # ---- loaders

    def train_dataloader(self) -> _Turns:
        self._require_room("training", self.batch_size, "batch_size")
        return _Turns(self.batches_per_epoch)

    def val_dataloader(self) -> list[_EvaluationLoader]:
        """One loader per entry of `validation_names`."""
        return [self._evaluation_loader(split) for split in self.validation_names]

    def test_dataloader(self) -> list[_EvaluationLoader]:
        """Those of validation: held-out puzzles are never trained on."""
        return self.val_dataloader()

    def predict_dataloader(self) -> _EvaluationLoader:
        """The puzzles of the file, shared out between the ranks, or the first evaluation set."""
        if self.questions is not None:
            return self._loader(QUESTIONS, len(self.questions.inputs))
        return self._evaluation_loader(self.validation_names[0])

    def _evaluation_loader(self, split: str) -> _EvaluationLoader:
        limits = [limit for limit in (self.task.count(split), self.validation_size) if limit is not None]
        size = min(limits, default=_OF_ENDLESS)
        return self._loader(split, size)

    def _loader(self, split: str, size: int) -> _EvaluationLoader:
        lanes = min(size, self.validation_batch_size)
        self._require_room(split, lanes, "validation_batch_size")
        return _EvaluationLoader(split, size, lanes, *self.process)

    def _require_room(self, split: str, lanes: int, option: str) -> None:
        size = lanes * self.shape.cells * 2 * (1 + self.shape.max_demos) * _CELL_BYTES
        self.require_room(f"a {split} batch of {lanes} puzzles", size, f"lower data.{option}")

    # ---- batches

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> PuzzleStream | PuzzleBatch:
        """The stream, or the puzzles that an evaluation loader asks for, on the module's device."""
        if batch == "train":
            return PuzzleStream(self.task, self.seed, self.batch_size, *self.process, device=self.device)
        if batch.split == QUESTIONS:
            assert self.questions is not None
            return PuzzleBatch(batch.index, self.questions.rows(batch.index.cpu()).to(batch.index.device))
        return PuzzleBatch(batch.index, self.task.draw(batch.split, self.evaluation_seed, batch.index))
