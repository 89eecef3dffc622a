"""What a module is given."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """T steps of B lanes."""

    inputs: Tensor  # [B, T] int64 token ids, or [B, T, V] one-hot
    targets: tuple[Tensor, Tensor]  # labels [B, T] int64, weights [B, T] floating
    starts: Tensor  # [B, T] bool, True at the first step of each sequence
    sequences: Tensor | None = None  # [B] int64, which sequence each lane holds, -1 for none; None in a stream

    def one_hot(self, size: int) -> Batch:
        """The same batch with one-hot inputs [B, T, size], in the dtype of the weights."""
        tokens = torch.arange(size, device=self.inputs.device)
        return self._replace(inputs=(self.inputs[..., None] == tokens).to(self.targets[1].dtype))

    def to_dtype(self, dtype: torch.dtype) -> Batch:
        """The same batch with weights of another dtype."""
        labels, weights = self.targets
        return self._replace(targets=(labels, weights.to(dtype)))


def joined(batches: Iterable[Batch]) -> Batch:
    """Consecutive batches of the same lanes as one of all their steps; what has no ``starts`` begins nowhere."""
    parts = [(batch.inputs, *batch.targets, batch.starts) for batch in batches]
    inputs, labels, weights, starts = (
        None if pieces[0] is None else torch.cat(pieces, 1) for pieces in zip(*parts, strict=True)
    )
    return Batch(inputs, (labels, weights), starts)  # type: ignore[arg-type]
