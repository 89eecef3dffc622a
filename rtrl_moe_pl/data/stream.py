"""Endless lanes packed with sequences end to end, and where each lane stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rtrl_moe_pl.data.batch import Batch
from rtrl_moe_pl.tasks import Task

_SEEK_SEQUENCES = 1 << 20  # sequences looked at in one piece while skipping ahead: bounds the memory


class Cursor(NamedTuple):
    """Where B lanes stand: everything there is to know about the position in a stream."""

    index: Tensor  # [B] int64, the sequence each lane is in
    offset: Tensor  # [B] int64, the next step of that sequence


def _locate(task: Task, seed: int, cursor: Cursor, columns: Tensor, last: int, stride: int) -> Cursor:
    """The sequence and the step in it that lie under each column of each lane.

    Args:
        columns: [C], counted from the cursor; ``last`` is the largest.

    Returns:
        Cursor of [B, C] tensors.
    """
    count = (last - 1) // task.min_length + 2  # sequences that can reach into columns 0..last
    number = torch.arange(count, device=columns.device)
    lengths = task.lengths(seed, cursor.index[:, None] + number * stride)  # [B, count]
    ends = lengths.cumsum(1) - cursor.offset[:, None]  # column after each sequence's last
    number = torch.searchsorted(ends, columns.expand(len(ends), -1).contiguous(), right=True)  # [B, C]
    offset = columns - (ends - lengths).gather(1, number)
    return Cursor(cursor.index[:, None] + number * stride, offset)


def window(task: Task, seed: int, cursor: Cursor, steps: int, stride: int) -> tuple[Batch, Cursor]:
    """Cut the next ``steps`` columns out of B lanes.

    A lane's sequences follow each other without a gap: index, index + stride, index + 2 stride and so on. They may
    be longer than the window.

    Args:
        cursor: where the lanes stand, on the device on which the batch is made.
        stride: number of lanes of all processes.

    Returns:
        Batch of token ids [B, steps], and the cursor of the next window.
    Cost: time and memory B steps, whatever the sequences' lengths.
    """
    columns = torch.arange(steps + 1, device=cursor.index.device)
    index, offset = _locate(task, seed, cursor, columns, steps, stride)
    inside = slice(0, steps)
    tokens, labels, weights = task.at(seed, index[:, inside], offset[:, inside])
    return Batch(tokens, (labels, weights), offset[:, inside] == 0), Cursor(index[:, steps], offset[:, steps])


@dataclass(frozen=True)
class Stream:
    """The data of one process: configuration only; a position in it is a `Cursor`, owned by the caller.

    Global lane number rank * batch_size + lane carries the sequences of that number modulo the number of lanes, so
    that ranks never share one. Both layouts hold the same sequences in the same order per lane.

    Args:
        task: what the sequences are.
        seed: which of the task's streams.
        batch_size: lanes of this process.
        steps: columns per batch; None for whole sequences, one per lane and batch, padded to task.max_length.
        rank, world_size: this process among all.
    """

    task: Task
    seed: int
    batch_size: int
    steps: int | None
    rank: int = 0
    world_size: int = 1

    @property
    def lanes(self) -> int:
        """Number of lanes of all processes."""
        return self.batch_size * self.world_size

    @property
    def identity(self) -> str:
        """Names the stream of all ranks: streams of the same identity have equal batches at equal positions."""
        return f"{self.task!r}, seed={self.seed}, lanes={self.lanes}, steps={self.steps}"

    def first(self) -> Cursor:
        """The cursor of the first batch, on the CPU."""
        index = self.rank * self.batch_size + torch.arange(self.batch_size)
        return Cursor(index, torch.zeros_like(index))

    def advance(self, cursor: Cursor, batches: int = 1) -> Cursor:
        """The cursor ``batches`` later.

        Cost: a few operations per skipped sequence when windows are packed, in bounded memory; constant otherwise.
        """
        if self.steps is None:
            return Cursor(cursor.index + batches * self.lanes, cursor.offset)
        left = batches * self.steps
        longest = max(1, _SEEK_SEQUENCES // self.batch_size) * self.task.min_length
        while left > 0:
            steps = min(left, longest)
            columns = torch.full((1,), steps, device=cursor.index.device)
            index, offset = _locate(self.task, self.seed, cursor, columns, steps, self.lanes)
            cursor = Cursor(index[:, 0], offset[:, 0])
            left -= steps
        return cursor

    def batch(self, cursor: Cursor, columns: int | None = None) -> Batch:
        """The batch at a cursor, of token ids, on the cursor's device.

        With whole sequences, a negative index gives a row of weight 0, and ``columns`` is how many are wanted, from
        the cursor's offset on: behind a sequence's end they weigh nothing, and nothing follows it.
        """
        if self.steps is not None:
            return window(self.task, self.seed, cursor, self.steps, self.lanes)[0]
        columns = self.task.max_length if columns is None else columns
        position = cursor.offset[:, None] + torch.arange(columns, device=cursor.index.device)
        tokens, labels, weights, _ = self.task.sample(self.seed, cursor.index, position)
        weights = weights * (cursor.index >= 0)[:, None]
        return Batch(tokens, (labels, weights), position == 0, cursor.index)
