"""What a cell changes beside its state: torch's random generators and its buffers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rtrl_moe_pl.randomness.generators import generator_states, set_generators


class SideEffects:
    """Generators and buffers as they are when this is made, before a window that may have to be run again."""

    def __init__(self, cell: nn.Module, device: torch.device) -> None:
        self._cell, self._device = cell, device
        self._buffers = [buffer.clone() for buffer in self._writable()]
        self._marks = self._now()

    def undo(self) -> bool:
        """Put back what has changed since, so that the window draws what it drew; whether anything had."""
        if all(torch.equal(a, b) for a, b in zip(self._marks, self._now(), strict=True)):
            return False
        set_generators(self._marks[1:], self._device)
        for buffer, begun in zip(self._writable(), self._buffers, strict=True):
            buffer.copy_(begun)
        return True

    def _now(self) -> list[Tensor]:
        versions = torch.tensor([buffer._version for buffer in self._writable()])
        return [versions, *generator_states(self._device)]

    def _writable(self) -> list[Tensor]:
        return [buffer for buffer in self._cell.buffers() if not buffer.is_inference()]
