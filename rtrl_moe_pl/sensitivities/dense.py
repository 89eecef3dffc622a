"""The full influence matrix, exact for any cell."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rtrl_moe_pl.linearization import Block, WindowLinearization
from rtrl_moe_pl.linearization.window import copy_flushed
from rtrl_moe_pl.linearization.workspace import Workspace
from rtrl_moe_pl.sensitivities.blockwise import BlockwiseSensitivity
from rtrl_moe_pl.sensitivities.tiles import Tile, TiledMatrix

# Bytes of P worked on at a time: what is read, what is written and the cotangents should stay near a core (measured at
# S = 64 and 128 with 0.5 and 2 MiB of second-level cache: within a tenth from 512 KiB to 4 MiB, a fifth slower at 256).
CPU_TILE_BYTES = 1536 * 1024
GPU_TILE_BYTES = 128 * 1024 * 1024


class DenseSensitivity(BlockwiseSensitivity):
    """P [B, S, |theta|], every entry kept.

    Kept in tiles ``[lanes, columns, rows, S]`` of blocks of parameters, the state last, so that ``J P`` is a product
    of contiguous rows with J transposed and M one product over time. A tile is contracted and advanced while it is in
    cache. A block is allocated when one of its parameters is first reached; until then its influence is zero and
    costs nothing.

    Cost: S^2 |theta| a window for J P, k S |theta| for M; memory B S |theta|, plus one tile.
    Exact: equals BPTT while parameters are fixed; but for rounding where ``storage`` is narrower than ``dtype``.
    References: Williams & Zipser 1989, Neural Computation 1(2):270-280; Schmidhuber 1992, Neural Computation
    4(2):243-248 (windows).
    """

    _matrix: TiledMatrix

    algorithm = "RTRL"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._workspace = Workspace()  # of a tile in ``dtype``, where P is kept in another type

    def vjp(self, cotangent: Tensor) -> dict[str, Tensor]:
        totals = self._totals()
        for tile, values in self._matrix.tiles():
            self._contract(tile, self._widened(values), cotangent, totals)
        return self._split(totals)

    def advance(self, linearization: WindowLinearization) -> None:
        """Carry P over one window, P <- J P + M.

        Args:
            linearization: J and the factors of M, of this sensitivity's batch.

        Raises:
            ValueError: if the batch size differs.
        """
        self.contract_and_advance(linearization)

    def contract_and_advance(self, linearization: WindowLinearization) -> dict[str, Tensor]:
        transition, cotangent = linearization.transition, linearization.cotangent
        self._require_lanes(linearization)
        self._cover(linearization.terms)
        totals = self._totals()
        for tile, held, place in self._matrix.moves():
            here = slice(tile.lane, tile.lane + tile.lanes)
            old = self._widened(held)
            new = place if self.exact else self._workspace.empty("new", place.shape, transition)
            copy_flushed(old, old)
            self._contract(tile, old, cotangent, totals)
            torch.bmm(old.flatten(1, 2), transition[here], out=new.flatten(1, 2))
            for term in linearization.terms.get(tile.block, []):
                term.add_to(new, tile.lane, tile.row)
            if new is not place:
                place.copy_(new)  # rounds
        for block, terms in linearization.terms.items():
            for term in terms:
                term.add_gradient(totals[block])
        return self._split(totals)

    def _widened(self, held: Tensor) -> Tensor:
        """A tile in ``dtype``: itself, or a copy that lasts until the next one."""
        if self.exact:
            return held
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        return self._workspace.empty("old", held.shape, like).copy_(held)

    @staticmethod
    def _contract(tile: Tile, values: Tensor, cotangent: Tensor, totals: dict[Block, Tensor]) -> None:
        """Add a tile's part of the gradient."""
        total = totals[tile.block][:, tile.row : tile.row + tile.rows]
        flat = values.flatten(1, 2)
        if tile.lanes == 1:  # twice as fast as a batch of one
            total += torch.mv(flat[0], cotangent[tile.lane]).view_as(total)
        else:
            row = cotangent[tile.lane : tile.lane + tile.lanes, None]
            total += torch.bmm(row, flat.transpose(1, 2)).sum(0).view_as(total)

    def _totals(self) -> dict[Block, Tensor]:
        """Room for a gradient of every block, [columns, rows]."""
        return {
            block: torch.zeros(block.columns, block.rows, dtype=self.dtype, device=self.device)
            for block in self._matrix.blocks
        }

    def _split(self, totals: dict[Block, Tensor]) -> dict[str, Tensor]:
        return {name: g for block, total in totals.items() for name, g in block.split(total, self.shapes).items()}

    def _empty(self, blocks: Iterable[Block]) -> TiledMatrix:
        tile_bytes = GPU_TILE_BYTES if self.device.type == "cuda" else CPU_TILE_BYTES
        like = torch.empty(0, dtype=self.storage, device=self.device)
        tile_bytes = tile_bytes * self.storage.itemsize // self.dtype.itemsize  # as it is worked on
        return TiledMatrix(tuple(blocks), self.batch_size, self.state_size, tile_bytes, like)
