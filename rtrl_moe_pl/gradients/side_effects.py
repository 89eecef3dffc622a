"""What a cell changes beside its state: torch's random generators and its buffers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rtrl_moe_pl.randomness.generators import generator_states, set_generators


class SideEffects:
    """Generators and buffers as they are when this is made, before a window that may have to be run again."""

    def __init__(self, cell: nn.Module, device: torch.device) -> None:
        self._cell, self._device = cell, device
        self._generators = generator_states(device)
        self._buffers = {name: (b, b._version, b.clone()) for name, b in self._changeable().items()}

    def undo(self) -> bool:
        """Put back what has changed since, so that the window draws what it drew; whether anything had."""
        drawn = any(
            not torch.equal(then, now)
            for then, now in zip(self._generators, generator_states(self._device), strict=True)
        )
        if drawn:
            set_generators(self._generators, self._device)
        now = self._changeable()
        # Not by value: on a GPU that would wait for the window. A cell may put another tensor in a buffer's place.
        changed = [n for n, (b, version, _) in self._buffers.items() if now[n] is not b or b._version != version]
        for name in changed:
            now[name].copy_(self._buffers[name][2])
        return drawn or bool(changed)

    def _changeable(self) -> dict[str, Tensor]:
        return {name: buffer for name, buffer in self._cell.named_buffers() if not buffer.is_inference()}
