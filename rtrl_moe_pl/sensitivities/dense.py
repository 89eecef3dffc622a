"""The full influence matrix, exact for any cell."""

from __future__ import annotations

from math import ceil
from typing import Any

import torch
from torch import Tensor

from rtrl_moe_pl.linearization import Block, WindowLinearization
from rtrl_moe_pl.linearization.window import Term, copy_flushed
from rtrl_moe_pl.sensitivities.base import Sensitivity

# Bytes of P worked on at a time: with its scratch copy and the cotangents it must stay in a core's second-level
# cache (measured at S = 64 and 128: flat from 512 KiB to 1 MiB, 25 % slower at 128 KiB, half the speed untiled).
CPU_TILE_BYTES = 512 * 1024
GPU_TILE_BYTES = 128 * 1024 * 1024


class DenseSensitivity(Sensitivity):
    """P [B, S, |theta|], every entry kept and updated in place.

    Kept in tiles ``[B, columns, rows, S]`` of blocks of parameters, the state last, so that ``J P`` is a product of
    contiguous rows with J transposed and M one product over time. A tile is contracted and advanced while it is in
    cache. A block is allocated when one of its parameters is first reached; until then its influence is zero and
    costs nothing.

    Cost: S^2 |theta| a window for J P, k S |theta| for M; memory B S |theta|, plus one tile.
    Exact: equals BPTT while parameters are fixed.
    References: Williams & Zipser 1989, Neural Computation 1(2):270-280; Schmidhuber 1992, Neural Computation
    4(2):243-248 (windows).
    """

    exact = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._blocks: dict[Block, list[Tensor]] = {}  # tiles [B, columns, some rows, S]
        self._scratch = torch.empty(0, dtype=self.dtype, device=self.device)

    def vjp(self, cotangent: Tensor) -> dict[str, Tensor]:
        gradients: dict[str, Tensor] = {}
        for block, tiles in self._blocks.items():
            parts = [torch.einsum("bcrs,bs->cr", tile, cotangent) for tile in tiles]
            gradients |= block.split(torch.cat(parts, 1), self.shapes)
        return gradients

    def advance(self, linearization: WindowLinearization) -> None:
        """Carry P over one window, P <- J P + M, in place.

        Args:
            linearization: J and the factors of M, of this sensitivity's batch.

        Raises:
            ValueError: if the batch size differs.
        """
        self.contract_and_advance(linearization)

    def contract_and_advance(self, linearization: WindowLinearization) -> dict[str, Tensor]:
        batch = linearization.transition.shape[0]
        if batch != self.batch_size:
            raise ValueError(
                f"a window of {batch} lanes cannot advance an influence matrix of {self.batch_size}: "
                "the batch size must stay the same while influence is carried"
            )
        for block in linearization.terms:
            if block not in self._blocks:
                self._allocate(block)
        totals = {block: self._scratch.new_zeros(block.columns, block.rows) for block in self._blocks}
        lane_bytes = self.nbytes // batch
        lanes = min(batch, max(1, self._tile_bytes // max(1, lane_bytes)))
        for lane in range(0, batch, lanes):  # outside: what the tiles of a lane read is then in cache
            here = slice(lane, lane + lanes)
            for block, tiles in self._blocks.items():
                terms = linearization.terms.get(block, [])
                row = 0
                for tile in tiles:
                    gradient = totals[block][:, row : row + tile.shape[2]]
                    self._advance_tile(tile[here], lane, row, linearization, terms, gradient)
                    row += tile.shape[2]
        gradients: dict[str, Tensor] = {}
        for block, total in totals.items():
            for term in linearization.terms.get(block, []):
                term.add_gradient(total)
            gradients |= block.split(total, self.shapes)
        return gradients

    def _advance_tile(
        self,
        tile: Tensor,  # [lanes, columns, rows, S]
        lane: int,
        row: int,
        linearization: WindowLinearization,
        terms: list[Term],
        gradient: Tensor,
    ) -> None:
        """Contract a tile into ``gradient`` [columns, rows], then advance it."""
        here = slice(lane, lane + tile.shape[0])
        if self._scratch.numel() < tile.numel():
            self._scratch = tile.new_empty(tile.numel())
        flat = tile.flatten(1, 2)  # [lanes, columns rows, S]
        old = self._scratch[: flat.numel()].view_as(flat)
        copy_flushed(flat, old)
        gradient += torch.bmm(linearization.cotangent[here, None], old.transpose(1, 2)).sum(0).view_as(gradient)
        torch.bmm(old, linearization.transition[here], out=flat)
        for term in terms:
            term.add_to(tile, lane, row)

    @property
    def _tile_bytes(self) -> int:
        return GPU_TILE_BYTES if self.device.type == "cuda" else CPU_TILE_BYTES

    def _allocate(self, block: Block) -> None:
        """Make room for a block, taking along what its members already had elsewhere."""
        row_bytes = block.columns * self.state_size * self.dtype.itemsize
        rows = max(1, self._tile_bytes // max(1, row_bytes))
        rows = ceil(block.rows / ceil(block.rows / rows))  # tiles of equal size
        tiles = [
            torch.zeros(
                self.batch_size,
                block.columns,
                min(rows, block.rows - row),
                self.state_size,
                dtype=self.dtype,
                device=self.device,
            )
            for row in range(0, block.rows, rows)
        ]
        names = {member.name for member in block.members}
        replaced = [b for b in self._blocks if names & {m.name for m in b.members}]
        held = {name: p for old in replaced for name, p in self._unpack(old).items()}
        for old in replaced:
            del self._blocks[old]
        self._blocks[block] = tiles
        self._pack(block, held)
        for name in held.keys() - names:
            alone = Block.alone(name, self.shapes[name])
            self._allocate(alone)
            self._pack(alone, held)

    def _unpack(self, block: Block) -> dict[str, Tensor]:
        """The members' P, [B, S, *shape] each."""
        whole = torch.cat(self._blocks[block], 2)
        return block.split(whole.permute(0, 3, 1, 2), self.shapes)

    def _pack(self, block: Block, held: dict[str, Tensor]) -> None:
        """Write the members' P, [B, S, *shape] each, where they are in ``held``."""
        if not any(member.name in held for member in block.members):
            return
        tiles = self._blocks[block]
        whole = torch.cat(tiles, 2)
        block.join(held, whole.permute(0, 3, 1, 2))
        for tile, part in zip(tiles, whole.split([t.shape[2] for t in tiles], 2), strict=True):
            tile.copy_(part)

    def to_dense(self) -> dict[str, Tensor]:
        dense = {
            name: torch.zeros(self.batch_size, self.state_size, *shape, dtype=self.dtype, device=self.device)
            for name, shape in self.shapes.items()
        }
        for block in self._blocks:
            dense |= self._unpack(block)
        return dense

    def norm(self) -> Tensor:
        norms = [torch.linalg.vector_norm(tile) for tiles in self._blocks.values() for tile in tiles]
        return torch.stack(norms).norm() if norms else torch.zeros((), dtype=self.dtype, device=self.device)

    def zero_(self) -> None:
        for tiles in self._blocks.values():
            for tile in tiles:
                tile.zero_()

    @property
    def nbytes(self) -> int:
        return sum(tile.nbytes for tiles in self._blocks.values() for tile in tiles)

    def state_dict(self) -> dict[str, Any]:
        return {name: p.contiguous() for block in self._blocks for name, p in self._unpack(block).items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for name, value in state.items():
            expected = (self.batch_size, self.state_size, *self.shapes[name])
            if tuple(value.shape) != expected:
                raise ValueError(
                    f"the saved influence of {name} has shape {tuple(value.shape)}, this run needs {expected}: "
                    "resume with the batch size and the model it was saved with"
                )
        self._blocks.clear()
        for name, value in state.items():
            block = Block.alone(name, self.shapes[name])
            self._allocate(block)
            self._pack(block, {name: value.to(self.device, self.dtype)})
