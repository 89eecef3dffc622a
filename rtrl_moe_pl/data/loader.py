"""Loaders that yield cursors, a few numbers per lane: the batches are made from them on the device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn

from rtrl_moe_pl.data.stream import Cursor, Stream


class Request(NamedTuple):
    """A batch yet to be made."""

    split: str  # which of the data module's streams
    cursor: Cursor
    columns: int | None = None  # of whole sequences: how many, from the cursor on; None: all


class StreamLoader:
    """The training batches: sized, endless, and resumable from two plain numbers.

    Every iteration yields len(self) requests and goes on where the last one stopped, however that ended. A checkpoint
    in the middle of an epoch needs no more than the number of batches yielded: the trainer knows how many of the
    epoch's are left, and asks for no more.

    Args:
        split: the name that goes with each cursor.
        stream: where the batches come from.
        batches: batches per epoch.
    """

    def __init__(self, split: str, stream: Stream, batches: int) -> None:
        self.split = split
        self.stream = stream
        self.batches = batches
        self.yielded = 0  # since the stream's beginning
        self._next = stream.first()

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Request]:
        for _ in range(self.batches):
            cursor = self._next
            self._next = self.stream.advance(cursor)
            self.yielded += 1
            yield Request(self.split, cursor)

    def switch(self, stream: Stream) -> None:
        """Go over to another stream, at its first batch."""
        self.stream = stream
        self.yielded = 0
        self._next = stream.first()

    def state_dict(self) -> dict[str, Any]:
        """The position in the stream, the same on every rank, and the stream's identity."""
        return {"yielded": self.yielded, "stream": self.stream.identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue behind the last batch that had been yielded.

        A position in another stream means nothing here: if task, seed, lanes or steps have changed, a warning says
        so and the new stream begins at its first batch.

        Cost: see `Stream.advance`; 10^9 tokens of a^n b^n are skipped in about 8 s, longer sequences faster.
        """
        same = state["stream"] == self.stream.identity
        if not same:
            rank_zero_warn(
                f"the training data have changed since the checkpoint, from [{state['stream']}] to "
                f"[{self.stream.identity}]: the new stream begins at its first batch"
            )
        self.yielded = state["yielded"] if same else 0
        self._next = self.stream.advance(self.stream.first(), self.yielded)


class ValidationLoader:
    """The same ``size`` whole sequences in every iteration, shared out between the ranks.

    Every rank yields the same number of batches; where the sequences run out, a batch has fewer rows, or a single row
    of index -1, which weighs nothing. With a window, the lanes of a batch go on from one window to the next until the
    longest possible sequence has ended, and only then the next sequences begin, in every lane.

    Args:
        split: the name that goes with each cursor.
        stream: where the batches come from; of whole sequences.
        size: number of sequences, over all ranks.
        window: columns delivered at a time; None: whole sequences.
    """

    def __init__(self, split: str, stream: Stream, size: int, window: int | None = None) -> None:
        self.split = split
        self.stream = stream
        self.size = size
        longest = stream.task.max_length
        self._begins = range(0, longest, longest if window is None else window)

    def __len__(self) -> int:
        return self._batches * len(self._begins)

    @property
    def _batches(self) -> int:
        return -(-self.size // self.stream.lanes)

    def __iter__(self) -> Iterator[Request]:
        for batch in range(self._batches):
            index = self.stream.advance(self.stream.first(), batch).index
            index = index[index < self.size]
            if not len(index):
                index = torch.tensor([-1])
            for begin in self._begins:
                columns = min(self._begins.step, self.stream.task.max_length - begin)
                yield Request(self.split, Cursor(index, torch.full_like(index, begin)), columns)
