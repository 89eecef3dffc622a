"""Buffers that are used again in every window."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

CACHE_LINE = 64  # bytes


class Workspace:
    """Named buffers, kept between windows: fresh pages for them cost as much as the products written there.

    A buffer's content lasts until the same name is asked for again.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def empty(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An uninitialised tensor of this shape, with ``like``'s type and device."""
        size = prod(shape)
        held = self._buffers.get(name)
        if held is None or held.numel() < size or held.dtype != like.dtype or held.device != like.device:
            held = self._buffers[name] = torch.empty(size, dtype=like.dtype, device=like.device)
        return held[:size].view(shape)

    def steps(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """The same, with the parts along the first dimension a cache line further apart than their size.

        A product over that dimension would otherwise meet, at sizes that are powers of two, one cache set only.
        """
        size = prod(shape[1:])
        return self.empty(name, (shape[0], size + CACHE_LINE // like.dtype.itemsize), like)[:, :size].unflatten(
            1, shape[1:]
        )

    @property
    def nbytes(self) -> int:
        return sum(b.nbytes for b in self._buffers.values())
