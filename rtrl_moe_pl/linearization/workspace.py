"""Buffers that are used again in every window."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor


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

    @property
    def nbytes(self) -> int:
        return sum(b.nbytes for b in self._buffers.values())
