"""The full influence matrix of a state of slots, advanced in the rows of the slots that were written."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rtrl_moe_pl.cells.routed import take_slots
from rtrl_moe_pl.linearization import Block, WindowLinearization
from rtrl_moe_pl.linearization.window import copy_flushed
from rtrl_moe_pl.sensitivities.blockwise import BlockwiseSensitivity
from rtrl_moe_pl.sensitivities.tiles import norm


class SlotMatrix:
    """P of some blocks, the state first: ``[B, S, rows columns]`` each.

    Args:
        blocks: what it covers; zero at first.
        batch_size, state_size: B, S.
        like: gives type and device.
    """

    def __init__(self, blocks: Iterable[Block], batch_size: int, state_size: int, like: Tensor) -> None:
        self.parts = {b: like.new_zeros(batch_size, state_size, b.rows * b.columns) for b in blocks}

    @property
    def blocks(self) -> list[Block]:
        return list(self.parts)

    @property
    def nbytes(self) -> int:
        """Of P."""
        return sum(part.nbytes for part in self.parts.values())

    def read(self, block: Block) -> Tensor:
        """A block in full, [B, columns, rows, S]; a copy."""
        return self._view(block).clone(memory_format=torch.contiguous_format)

    def write(self, block: Block, whole: Tensor) -> None:
        """The inverse of ``read``."""
        self._view(block).copy_(whole)

    def _view(self, block: Block) -> Tensor:
        return self.parts[block].unflatten(2, (block.rows, block.columns)).permute(0, 3, 2, 1)

    def norms(self) -> list[Tensor]:
        """Of the blocks, 0-dim each."""
        return [norm(part) for part in self.parts.values()]

    def zero_(self) -> None:
        """Set P to zero."""
        for part in self.parts.values():
            part.zero_()

    def scale_(self, factor: float) -> None:
        """Multiply P by a number."""
        for part in self.parts.values():
            part.mul_(factor)


class BlockSparseSensitivity(BlockwiseSensitivity):
    """P [B, S, |theta|] of a state of slots: P[written] <- J[written, read U written] P[read U written] + M[written].

    Every lane has slots of its own; where lanes differ in number, some rows are computed that stay as they were.

    Args:
        slot_size: d; the state is [S / d, d].

    Cost: of a window in which U slots are written and V read or written, (U d) (V d) |theta| for J P and
        k (U d) |theta| for M; memory B S |theta|.
    Exact: as far as slots that are not written stay exactly as they are, which the cell promises and every window
        is checked for; but for rounding where ``storage`` is narrower than ``dtype``.
    References: Menick et al. 2021, arXiv:2006.07232 (sparsity in RTRL); here the sparsity is the cell's own.
    """

    _matrix: SlotMatrix

    algorithm = "BlockRTRL"

    def __init__(self, *args: Any, slot_size: int, **kwargs: Any) -> None:
        self.slot_size = slot_size
        super().__init__(*args, **kwargs)

    def _empty(self, blocks: Iterable[Block]) -> SlotMatrix:
        like = torch.empty(0, dtype=self.storage, device=self.device)
        return SlotMatrix(blocks, self.batch_size, self.state_size, like)

    def vjp(self, cotangent: Tensor) -> dict[str, Tensor]:
        return {
            name: gradient
            for block, part in self._matrix.parts.items()
            for name, gradient in self._split(block, contracted(cotangent, part)).items()
        }

    def _split(self, block: Block, gradient: Tensor) -> dict[str, Tensor]:
        return block.split(gradient.view(block.rows, block.columns).T, self.shapes)

    def advance(self, linearization: WindowLinearization) -> None:
        self._require_lanes(linearization)
        self._cover(linearization.terms)
        for block, part in self._matrix.parts.items():
            copy_flushed(part, part)
            new = advanced_rows(linearization, part, self.slot_size)
            for term in linearization.terms.get(block, []):
                new += term.immediate().flatten(2)
            self._matrix.parts[block] = put_rows(linearization, part, new, self.slot_size)


def contracted(cotangent: Tensor, part: Tensor) -> Tensor:
    """sum_b cotangent[b] part[b]: [p] from [B, S] and [B, S, p]."""
    if part.dtype != cotangent.dtype:  # a lane at a time: P is never there in full in the wider type
        found = cotangent.new_zeros(part.shape[2])
        for row, lane in zip(cotangent, part, strict=True):
            found += torch.mv(lane.to(row.dtype).T, row)
        return found
    return torch.mv(part.flatten(0, 1).T, cotangent.flatten())


def advanced_rows(linearization: WindowLinearization, part: Tensor, slot_size: int) -> Tensor:
    """J P of the slots that a window wrote, [B, U d, p], from P [B, S, p]."""
    back = linearization.transition  # [B, S, U d]
    if linearization.sources is not None:
        part = _take(part, linearization.sources, slot_size)
        back = _take(back, linearization.sources, slot_size)
    return torch.bmm(back.transpose(1, 2), part.to(back.dtype))


def put_rows(linearization: WindowLinearization, part: Tensor, new: Tensor, slot_size: int) -> Tensor:
    """P with new values of those slots, in place where it can be."""
    new = new.to(part.dtype)
    if linearization.ends is None:
        return new
    slots = part.unflatten(1, (-1, slot_size)).flatten(2)  # [B, slots, d p]
    index = linearization.ends.unsqueeze(-1)
    slots.scatter_(1, index.expand(-1, -1, slots.shape[2]), new.view(*index.shape[:2], -1))
    return part


def _take(value: Tensor, slots: Tensor, slot_size: int) -> Tensor:
    """Rows [B, V d, C] of [B, S, C]."""
    return take_slots(value.unflatten(1, (-1, slot_size)).flatten(2), slots).unflatten(2, (slot_size, -1)).flatten(1, 2)
