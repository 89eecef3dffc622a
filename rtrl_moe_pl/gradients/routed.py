"""Real-time recurrent learning for cells that read and write few of their slots, and use few of their experts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from rtrl_moe_pl.cells.base import at_least
from rtrl_moe_pl.cells.routed import RoutedCell
from rtrl_moe_pl.gradients.memory import (
    Forecast,
    Memory,
    MemoryForecastError,
    forecast_influence,
    free_memory,
    readable,
)
from rtrl_moe_pl.gradients.rtrl import RTRL
from rtrl_moe_pl.linearization import Linearizer, RoutedLinearizer
from rtrl_moe_pl.linearization.step import TILE_BYTES
from rtrl_moe_pl.sensitivities import BlockSparseSensitivity, LazyExpertSensitivity, Sensitivity

CHUNK_BYTES = 192 * 1024 * 1024  # of the derivatives that a chunk keeps
FRAGMENTS = 1.15  # a processor's memory allocator takes 1.0 to 1.3 times what lives, of many parts of 1 to 30 MB
# Multiply-adds of J P in the time of a step back for the loss, most of it overhead. With c steps a chunk and k a
# window, a window costs (k / c) J P and c / 2 steps back: least at c^2 = 2 k J P / (a step back).
STEP_BACK = 1_000_000


class BlockRTRL(RTRL):
    """RTRL of a cell whose state is slots: derivatives and influence in the rows and columns of the slots chosen.

    P[written] <- J[written, read U written] P[read U written] + M, lane by lane; every other row of P stays as it is,
    because the slot did. Over a chunk of steps the rows are those of all slots written in it.

    Args:
        window, chunk, influence_dtype: see ``RTRL``; a chunk by default is as long as is about the cheapest, and as its
            derivatives fit into 192 MiB, but at least 8 steps.

    Cost: with R, W slots of d numbers read and written, S = slots d in all and c = chunk, a step and lane, about
        S W d (R + W) d for the way back, S' |theta| for M and S' S |theta| / c for J P, S' <= S the rows written in a
        chunk (W d at c = 1); memory as ``RTRL``.
    Exact: as ``RTRL``, for any ``RoutedCell``: one whose slots, if not written, stay exactly as they are.
    Not recommended: where a chunk writes all slots anyway and experts are many: ``LazyExpertRTRL``.
    """

    def _init(self, cell: nn.Module, state: Tensor) -> Memory:
        self._require_cell(cell)
        return super()._init(cell, state)

    def _require_cell(self, cell: nn.Module) -> None:
        if not isinstance(cell, RoutedCell):
            raise ValueError(
                f"{type(self).__name__} needs a cell that chooses slots (a RoutedCell, such as RecurrentMoE), and "
                f"{type(cell).__name__} is none: use RTRL(window={self.window})"
            )
        shapes = {name: parameter.shape for name, parameter in cell.named_parameters()}
        for name in cell.banks:
            if len(shapes.get(name, ())) < 2:
                raise ValueError(
                    f"{type(cell).__name__}.banks names {name!r}, which is no parameter [experts, out, ..]"
                )

    def require_room(self, cell: nn.Module, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        self._require_cell(cell)
        super().require_room(cell, batch, dtype, device)

    def chunk_for(self, cell: nn.Module, is_sparse: bool | None = True, batch_size: int = 1) -> int:
        """Steps between two advances of P for this cell and batch."""
        assert isinstance(cell, RoutedCell)
        assert self.window is not None
        advance = batch_size * cell.state_size**2 * sum(p.numel() for p in cell.parameters())
        cheapest = math.isqrt(self.window * advance // STEP_BACK)
        itemsize = next(cell.parameters()).dtype.itemsize
        longest = CHUNK_BYTES // (itemsize * batch_size * _kept_numbers(cell))
        return self.chunk or max(min(cheapest, longest), 8)

    def _joined_window(self, cell: nn.Module, memory: Memory) -> int | None:
        # a window's own overhead is as large as a few steps': within a batch nothing needs its gradient earlier
        assert self.window is not None
        return self.window * max(1, self.chunk_for(cell, batch_size=memory.batch_size) // self.window)

    def forecast(
        self, cell: nn.Module, batch_size: int, dtype: torch.dtype, steps: int, delivered: int | None = None
    ) -> Forecast:
        self._require_cell(cell)
        assert isinstance(cell, RoutedCell)
        chunk = min(self.chunk_for(cell, batch_size=batch_size), steps)
        assert self.window is not None
        new = min(chunk, delivered or chunk, self.window * max(1, chunk // self.window))
        copied = new if 2 * new <= chunk else 0  # steps are copied where they are added to others
        lanes = batch_size * dtype.itemsize
        dense = forecast_influence(cell, batch_size, dtype.itemsize, chunk, (self.storage or dtype).itemsize)
        derivatives = lanes * _kept_numbers(cell)  # of a step
        cotangents = lanes * cell.state_size * (_written(cell) + _widest(cell))
        together = new * derivatives
        tiles = min(TILE_BYTES, together) if together > TILE_BYTES // 2 else 0  # two, each about half of that
        advance = 2 * lanes * cell.state_size * max(p.numel() for p in self._advanced(cell))  # J P and M of a block
        most = max(advance, (together if copied else 0) + tiles)
        workspace = (chunk + copied) * derivatives + chunk * cotangents + most
        return Forecast(dense.influence_bytes, int(FRAGMENTS * workspace), dense.operations_per_token)

    def _advanced(self, cell: RoutedCell) -> list[nn.Parameter]:
        """The parameters whose influence is advanced as a whole."""
        return list(cell.parameters())

    def _linearizer(self, cell: nn.Module, parameters: dict[str, nn.Parameter]) -> Linearizer:
        assert isinstance(cell, RoutedCell)
        return RoutedLinearizer(cell, parameters)

    def _sensitivity(self, cell: nn.Module, shapes: dict[str, torch.Size], state: Tensor) -> Sensitivity:
        assert isinstance(cell, RoutedCell)
        sizes = shapes, state.shape[0], state.shape[1], state.dtype, state.device
        return BlockSparseSensitivity(*sizes, slot_size=cell.slot_size, storage=self.storage)


class LazyExpertRTRL(BlockRTRL):
    """``BlockRTRL`` in which the influence of an expert is left alone while the expert is idle.

    What an idle expert contributes to a gradient is found by pulling the loss's cotangent, a vector, back through the
    J's since then; its matrix catches up when it is used again, or before the oldest J is dropped. Every lane has its
    own experts. An expert that a lane never used costs nothing.

    Args:
        window, chunk, influence_dtype: see ``BlockRTRL``.
        ring: chunks whose J is kept, at least 2; an expert idle for longer catches up.
        catch_up: "walk": each expert when it must, by the product of the J's it missed; one walk back through them
            finds the products for all. "tree": the same, the products from a ``CircularSegmentTree``: for long rings.
            "block": every expert after every chunk, by the one J that all have missed; nothing is kept.

    Cost: as ``BlockRTRL`` for the parameters that experts do not own; for theirs S |theta_e| a use for M, and
        S^2 |theta_e| a chunk for each expert that was used in it, or that was idle for ``ring`` chunks, and up to
        ring S^3 a chunk for the products. Memory: P, of the experts that a lane has used, and ring B S^2 for the J's.
    Exact: as ``BlockRTRL``.
    Not recommended: for cells with few experts, all of them in use: ``BlockRTRL``.
    """

    def __init__(
        self,
        window: int,
        ring: int = 16,
        chunk: int | None = None,
        catch_up: Literal["walk", "tree", "block"] = "walk",
        influence_dtype: Literal["bfloat16"] | None = None,
    ) -> None:
        super().__init__(window, chunk, influence_dtype)
        if catch_up not in ("walk", "tree", "block"):
            raise ValueError(f"catch_up must be 'walk', 'tree' or 'block', got {catch_up!r}")
        self.ring, self.catch_up = at_least(2, "ring", ring), catch_up

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, ring={self.ring}, catch_up={self.catch_up!r})"

    def _require_cell(self, cell: nn.Module) -> None:
        super()._require_cell(cell)
        if not getattr(cell, "num_experts", 0):
            raise ValueError(
                f"{type(self).__name__} needs a cell with experts, and {type(cell).__name__} has none: "
                f"use BlockRTRL(window={self.window})"
            )

    def _sensitivity(self, cell: nn.Module, shapes: dict[str, torch.Size], state: Tensor) -> Sensitivity:
        assert isinstance(cell, RoutedCell)
        sizes = shapes, state.shape[0], state.shape[1], state.dtype, state.device
        ring, tree = 0 if self.catch_up == "block" else self.ring, self.catch_up == "tree"
        return LazyExpertSensitivity(*sizes, slot_size=cell.slot_size, ring=ring, tree=tree, storage=self.storage)

    def require_room(self, cell: nn.Module, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        kept, free = self._ring_bytes(batch, int(cell.state_size), dtype), free_memory(device)  # type: ignore[arg-type]
        if kept > free >= 2 * kept / self.ring:
            raise MemoryForecastError(
                f"{self} keeps {readable(kept)} of the state's derivatives, but {readable(free)} are free: "
                "set a smaller ring"
            )
        super().require_room(cell, batch, dtype, device)

    def _advanced(self, cell: RoutedCell) -> list[nn.Parameter]:
        return [parameter for name, parameter in cell.named_parameters() if name not in cell.banks]

    def forecast(
        self, cell: nn.Module, batch_size: int, dtype: torch.dtype, steps: int, delivered: int | None = None
    ) -> Forecast:
        found = super().forecast(cell, batch_size, dtype, steps, delivered)
        kept = self._ring_bytes(batch_size, int(cell.state_size), dtype)  # type: ignore[arg-type]
        return replace(found, influence_bytes=found.influence_bytes + kept)

    def _ring_bytes(self, batch_size: int, state_size: int, dtype: torch.dtype) -> int:
        jacobians = {"walk": self.ring, "tree": 4 * self.ring, "block": 0}[self.catch_up]
        return jacobians * batch_size * state_size**2 * dtype.itemsize


def _written(cell: RoutedCell) -> int:
    """W d."""
    return cell.write_slots * cell.slot_size


def _kept_numbers(cell: RoutedCell) -> int:
    """About as many as a step's derivatives have: of what is written, by the slots and by the outputs of layers.

    Every layer is taken to act on as many slots as are read or written, whichever is more, or on an expert's input.
    """
    shapes = {name: p.shape for name, p in cell.named_parameters()}
    banks = [shapes[name] for name in cell.banks]
    of_experts = sum(shape[1] for shape in banks if len(shape) > 2) or sum(shape[1] for shape in banks)
    slots = (cell.read_slots + cell.write_slots) * cell.slot_size
    outputs = max(cell.read_slots, cell.write_slots) * sum(_widths(cell)) + cell.active_experts * of_experts
    return _written(cell) * (slots + outputs)


def _widest(cell: RoutedCell) -> int:
    """Outputs of the largest layer, which acts on the slots, and the input, say."""
    return (max(cell.read_slots, cell.write_slots) + 1) * max(_widths(cell))


def _widths(cell: RoutedCell) -> list[int]:
    """Outputs of every layer for one slot; a weight's bias has the same."""
    own = [p.shape[-1] for name, p in cell.named_parameters() if "." not in name and name not in cell.banks and p.ndim]
    layers = [list(layer.parameters(recurse=False)) for layer in cell.modules() if layer is not cell]
    return own + [max(p.shape[0] if p.ndim else 1 for p in held) for held in layers if held]
