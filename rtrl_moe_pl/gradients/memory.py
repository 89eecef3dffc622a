"""What is carried from window to window, and what it will cost."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rtrl_moe_pl.cells.routed import RoutedCell, Routing
from rtrl_moe_pl.cells.stack import Stack
from rtrl_moe_pl.linearization import Linearizer, Tail, multiply_out
from rtrl_moe_pl.sensitivities import Sensitivity


class Memory:
    """State and influence of B persistent lanes, owned by the caller.

    Args:
        state: [B, S], without a graph.
        base: the influence of the parameters on the state that the tail began with.
        fresh: the next step is a start for every lane (nothing has been seen yet).
        linearizer: how the cell is differentiated; found anew after loading, so not saved.

    Attributes:
        tail: the latest steps, which ``base`` does not cover yet; None if there never were any.
        used: of a routed cell, how often each slot was read [S] and written [S] and each expert chosen [E] since the
            caller last set it to None.
        half_written: an error came between the first and the last write of a step: nothing held can be trusted.
    """

    def __init__(
        self, state: Tensor, base: Sensitivity, fresh: bool = True, linearizer: Linearizer | None = None
    ) -> None:
        self.state, self.base, self.fresh, self.linearizer = state, base, fresh, linearizer
        self.tail: Tail | None = None
        self.half_written = False
        self.used: Routing | None = None

    def count(self, routings: Sequence[Routing], cell: RoutedCell) -> None:
        """Add what some steps chose to ``used``."""
        sizes = cell.num_slots, cell.num_slots, cell.num_experts
        counts = [
            torch.bincount(torch.cat(index).flatten(), minlength=size)
            for index, size in zip(zip(*routings, strict=True), sizes, strict=True)
        ]
        held = [0, 0, 0] if self.used is None else self.used
        self.used = Routing(*(new + old for new, old in zip(counts, held, strict=True)))

    @property
    def batch_size(self) -> int:
        return self.state.shape[0]

    @property
    def sensitivity(self) -> Sensitivity:
        """The influence of the parameters on the state as it is now: multiplies the tail out, if there is one."""
        self.require_whole()
        self.half_written = True
        self.settle()
        self.half_written = False
        return self.base

    def settle(self) -> None:
        """Let ``base`` cover the tail. Done at any time it changes nothing but rounding."""
        if self.tail is not None and len(self.tail):
            no_loss = torch.zeros_like(self.state)[None]
            self.base.advance(multiply_out(self.tail, no_loss, self.base.shapes))
            self.tail.clear()

    def require_whole(self) -> None:
        """Raise RuntimeError if an error left this memory half written."""
        if self.half_written:
            raise RuntimeError(
                "an error interrupted an earlier step while it wrote this memory: its influence can no longer be "
                "trusted; reset it, or load one that was saved before"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Memory:
        """A copy for another copy of the cell: how that one is differentiated is found anew."""
        return Memory(self.state.clone(), copy.deepcopy(self.sensitivity, memo), self.fresh)

    def reset(self) -> None:
        """Forget everything, keeping what is allocated: the next step is a start."""
        if self.tail is not None:
            self.tail.clear()
        self.base.zero_()
        self.fresh, self.half_written = True, False

    def scale_influence_(self, factor: float) -> None:
        """P <- factor P, the state as it is; 0 forgets all influence. Any other advances P over what is pending."""
        if factor:
            self.sensitivity.scale_(factor)
            return
        if self.tail is not None:
            self.tail.clear()
        self.base.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, numbers and strings. Saving leaves everything as it is."""
        self.require_whole()
        tail = {} if self.tail is None or not len(self.tail) else self.tail.state_dict() | {"size": self.tail.capacity}
        held = {"sensitivity": self.base.state_dict(), "algorithm": self.base.algorithm, "tail": tail}
        return {"state": self.state, "fresh": self.fresh, **held}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave.

        Raises:
            ValueError: if algorithm, batch size, state size or parameters differ.
        """
        algorithm = saved.get("algorithm", self.base.algorithm)
        if algorithm != self.base.algorithm:
            raise ValueError(
                f"the saved influence is that of {algorithm}, the one configured is of {self.base.algorithm}: resume "
                "with the algorithm it was saved with"
            )
        if saved["state"].shape != self.state.shape:
            raise ValueError(
                f"the saved carry has shape {tuple(saved['state'].shape)}, this run needs {tuple(self.state.shape)} "
                "[batch, state]: resume with the batch size and the cell it was saved with"
            )
        state, kept = saved["state"].to(self.state), saved.get("tail", {})
        tail = Tail(kept["size"]) if kept else None
        if tail is not None:
            tail.load_state_dict(kept, state)
        self.base.load_state_dict(saved["sensitivity"])
        self.state, self.tail, self.fresh, self.half_written = state, tail, bool(saved["fresh"]), False


class MemoryForecastError(ValueError):
    """What would be allocated does not fit in the free memory."""


@dataclass(frozen=True)
class Forecast:
    """Bytes that training will take beyond weights and optimizer.

    Args:
        influence_bytes: P, kept from window to window (exact when every parameter is reached).
        workspace_bytes: what a chunk's linearization takes: an estimate; cells that are layers within, but no
            ``Stack``, take a few times more.
        operations_per_token: of one lane's step, a multiply-add counted as 2; for RTRL of a gated cell, at a window as
            long as the chunk.
    """

    influence_bytes: int
    workspace_bytes: int
    operations_per_token: float

    @property
    def total_bytes(self) -> int:
        return self.influence_bytes + self.workspace_bytes


def recurrent_parameters(cell: nn.Module) -> dict[str, nn.Parameter]:
    """The cell's parameters by public name; one shared inside the cell appears once."""
    return {f"cell.{name}": p for name, p in cell.named_parameters()}


def forecast_influence(
    cell: nn.Module,
    batch_size: int,
    itemsize: int,
    steps: int,
    kept_itemsize: int | None = None,
    copied: int = 0,
) -> Forecast:
    """Forecast for a dense influence matrix advanced over windows of ``steps`` steps.

    Args:
        itemsize: bytes of a number that is computed with.
        kept_itemsize: of one of P, if that is another.
        copied: steps that are added to others at a time.
    """
    parameters = [p for p in cell.parameters() if p.requires_grad]
    size = int(getattr(cell, "state_size", 0))
    count = sum(p.numel() for p in parameters)
    influence = batch_size * size * count * (kept_itemsize or itemsize)
    rows = max((p.shape[0] for p in parameters if p.ndim == 2), default=size)
    # cotangents of the states, ds'/ds and a tile's cotangents; and about 16 vectors a step: derivatives of gates, ..
    numbers = steps * (2 * batch_size * size + rows + 16 * batch_size) * size
    if isinstance(cell, Stack):  # layers below the last reach the state through it: by full matrices
        below = sum(p.shape[0] for layer in cell.cells[:-1] for p in layer.parameters() if p.ndim == 2)
        numbers += (2 * steps + 3 * copied) * batch_size * size * below
    workspace = numbers * itemsize
    operations = 2 * size * count * (1 + size / steps) + 2 * size**3  # M, J P, and the sweep back
    return Forecast(influence, workspace, operations)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device, within the process's control group."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    information = Path("/proc/meminfo")
    if information.exists():
        lines = dict(line.split(":", 1) for line in information.read_text().splitlines() if ":" in line)
        free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def readable(size: float) -> str:
    """Bytes for people: 18.4 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"
