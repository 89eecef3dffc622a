"""Where an influence matrix lies in memory: tiles that are advanced one after the other, with room for one more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from rtrl_moe_pl.linearization import Block

# Numbers: a tile begins where a cache line does, wherever P is, so that products round alike before and after a move.
ALIGNED = 16


@dataclass(frozen=True)
class Tile:
    """Some lanes and rows of a block, all its columns: ``[lanes, columns, rows, S]``."""

    block: Block
    lane: int
    lanes: int
    row: int
    rows: int
    offset: int  # numbers before it


def norm(values: Tensor) -> Tensor:
    """Frobenius norm, summed in float32 at least: 0-dim."""
    return torch.linalg.vector_norm(values, dtype=torch.promote_types(values.dtype, torch.float32))


class TiledMatrix:
    """P of some blocks, ``[B, columns, rows, S]`` each, in one piece of memory, cut into tiles.

    The memory has room for one tile more than P. To advance P, every tile is written where the one before it was read
    a moment ago, and the next time the other way round: no product needs a copy of what it replaces, and what is
    written is already in cache.

    Args:
        blocks: what it covers; zero at first.
        batch_size: lanes B.
        state_size: S.
        tile_bytes: of a tile at most (but one row at least).
        like: gives type and device.
    """

    def __init__(self, blocks: Sequence[Block], batch_size: int, state_size: int, tile_bytes: int, like: Tensor):
        self.blocks = tuple(blocks)
        self.batch_size, self.state_size = batch_size, state_size
        self._tiles: list[Tile] = []
        bytes_of = {b: b.columns * b.rows * state_size * like.dtype.itemsize for b in self.blocks}
        lanes = min(batch_size, max(1, tile_bytes // max(1, sum(bytes_of.values()))))
        offset = room = 0
        for lane in range(0, batch_size, lanes):  # outside: what the tiles of a lane read is then in cache
            for block in self.blocks:
                count = max(1, min(block.rows, ceil(bytes_of[block] / tile_bytes)))
                rows = max(1, ceil(block.rows / count))  # tiles of equal size
                for row in range(0, block.rows, rows):
                    tile = Tile(block, lane, min(lanes, batch_size - lane), row, min(rows, block.rows - row), offset)
                    self._tiles.append(tile)
                    aligned = ALIGNED * ceil(self._numel(tile) / ALIGNED)
                    offset += aligned
                    room = max(room, aligned)
        self._room = room
        self._memory = torch.zeros(offset + room, dtype=like.dtype, device=like.device)
        self._first = 0  # where P begins: 0, or ``room``

    def moves(self) -> Iterator[tuple[Tile, Tensor, Tensor]]:
        """Every tile with what it holds and where to write what replaces it; P is the latter once all are written."""
        first, other = self._first, self._room - self._first
        # away from the free end, so that nothing is overwritten before it is read
        for tile in self._tiles if other < first else reversed(self._tiles):
            yield tile, self._view(tile, first), self._view(tile, other)
        self._first = other

    def tiles(self) -> Iterator[tuple[Tile, Tensor]]:
        """Every tile with what it holds."""
        return ((tile, self._view(tile, self._first)) for tile in self._tiles)

    @property
    def nbytes(self) -> int:
        """Of P; its memory is one tile larger."""
        return sum(self._numel(tile) for tile in self._tiles) * self._memory.itemsize

    def norms(self) -> list[Tensor]:
        """Of the tiles, 0-dim each."""
        return [norm(values) for _, values in self.tiles()]

    def zero_(self) -> None:
        """Set P to zero."""
        self._memory.zero_()

    def scale_(self, factor: float) -> None:
        """Multiply P by a number."""
        for _, values in self.tiles():
            values.mul_(factor)

    def read(self, block: Block) -> Tensor:
        """A block in full, [B, columns, rows, S]; a copy."""
        whole = self._memory.new_empty(self.batch_size, block.columns, block.rows, self.state_size)
        for part, values in self._parts(block, whole):
            part.copy_(values)
        return whole

    def write(self, block: Block, whole: Tensor) -> None:
        """The inverse of ``read``."""
        for part, values in self._parts(block, whole):
            values.copy_(part)

    def _parts(self, block: Block, whole: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for tile, values in self.tiles():
            if tile.block == block:
                yield whole[tile.lane : tile.lane + tile.lanes, :, tile.row : tile.row + tile.rows], values

    def _numel(self, tile: Tile) -> int:
        return tile.lanes * tile.block.columns * tile.rows * self.state_size

    def _view(self, tile: Tile, first: int) -> Tensor:
        begin = first + tile.offset
        shape = (tile.lanes, tile.block.columns, tile.rows, self.state_size)
        return self._memory[begin : begin + self._numel(tile)].view(shape)
