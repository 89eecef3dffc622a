"""The full influence matrix, exact for any cell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from rtrl_moe_pl.linearization import Block, Term, WindowLinearization
from rtrl_moe_pl.linearization.window import copy_flushed, unshared
from rtrl_moe_pl.sensitivities.base import Sensitivity
from rtrl_moe_pl.sensitivities.tiles import Tile, TiledMatrix

# Bytes of P worked on at a time: what is read, what is written and the cotangents should stay near a core (measured at
# S = 64 and 128 with 0.5 and 2 MiB of second-level cache: within a tenth from 512 KiB to 4 MiB, a fifth slower at 256).
CPU_TILE_BYTES = 1536 * 1024
GPU_TILE_BYTES = 128 * 1024 * 1024


class DenseSensitivity(Sensitivity):
    """P [B, S, |theta|], every entry kept.

    Kept in tiles ``[lanes, columns, rows, S]`` of blocks of parameters, the state last, so that ``J P`` is a product
    of contiguous rows with J transposed and M one product over time. A tile is contracted and advanced while it is in
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
        self._matrix = self._empty(())

    def vjp(self, cotangent: Tensor) -> dict[str, Tensor]:
        totals = self._totals()
        for tile, values in self._matrix.tiles():
            self._contract(tile, values, cotangent, totals)
        return self._split(totals)

    def contract(self, cotangent: Tensor, terms: Mapping[Block, list[Term]]) -> dict[str, Tensor]:
        self._cover(unshared(terms, self.shapes))
        return super().contract(cotangent, terms)

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
        if len(transition) != self.batch_size:
            raise ValueError(
                f"a window of {len(transition)} lanes cannot advance an influence matrix of {self.batch_size}: "
                "the batch size must stay the same while influence is carried"
            )
        self._cover(linearization.terms)
        totals = self._totals()
        for tile, old, new in self._matrix.moves():
            here = slice(tile.lane, tile.lane + tile.lanes)
            copy_flushed(old, old)
            self._contract(tile, old, cotangent, totals)
            torch.bmm(old.flatten(1, 2), transition[here], out=new.flatten(1, 2))
            for term in linearization.terms.get(tile.block, []):
                term.add_to(new, tile.lane, tile.row)
        for block, terms in linearization.terms.items():
            for term in terms:
                term.add_gradient(totals[block])
        return self._split(totals)

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
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        return TiledMatrix(tuple(blocks), self.batch_size, self.state_size, tile_bytes, like)

    def _cover(self, blocks: Iterable[Block]) -> None:
        """Make room for blocks, taking along what their members already had elsewhere."""
        known = self._matrix.blocks
        new = [block for block in blocks if block not in known]
        if not new:
            return
        names = {member.name for block in new for member in block.members}
        kept = [block for block in known if not names & {m.name for m in block.members}]
        held = self._held()
        covered = names | {member.name for block in kept for member in block.members}
        alone = [Block.alone(name, self.shapes[name]) for name in held if name not in covered]
        self._fill([*kept, *alone, *new], held)

    def _fill(self, blocks: Iterable[Block], held: dict[str, Tensor]) -> None:
        """Begin anew with these blocks and the members' P [B, S, *shape] in ``held``; zero where it has none."""
        self._matrix = self._empty(())
        self._matrix = self._empty(blocks)
        for block in self._matrix.blocks:
            if any(member.name in held for member in block.members):
                whole = self._matrix.read(block)
                block.join(held, whole.permute(0, 3, 1, 2))
                self._matrix.write(block, whole)

    def _held(self) -> dict[str, Tensor]:
        """P of what has been reached, [B, S, *shape] each; copies."""
        held: dict[str, Tensor] = {}
        for block in self._matrix.blocks:
            held |= block.split(self._matrix.read(block).permute(0, 3, 1, 2), self.shapes)
        return held

    def to_dense(self) -> dict[str, Tensor]:
        held = self._held()
        for name, shape in self.shapes.items():
            if name not in held:
                size = (self.batch_size, self.state_size, *shape)
                held[name] = torch.zeros(size, dtype=self.dtype, device=self.device)
        return held

    def norm(self) -> Tensor:
        norms = [torch.linalg.vector_norm(values) for _, values in self._matrix.tiles()]
        return torch.stack(norms).norm() if norms else torch.zeros((), dtype=self.dtype, device=self.device)

    def zero_(self) -> None:
        self._matrix.zero_()

    @property
    def nbytes(self) -> int:
        return self._matrix.nbytes

    def state_dict(self) -> dict[str, Any]:
        return {name: p.contiguous() for name, p in self._held().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for name, value in state.items():
            expected = (self.batch_size, self.state_size, *self.shapes[name])
            if tuple(value.shape) != expected:
                raise ValueError(
                    f"the saved influence of {name} has shape {tuple(value.shape)}, this run needs {expected}: "
                    "resume with the batch size and the model it was saved with"
                )
        held = {name: value.to(self.device, self.dtype) for name, value in state.items()}
        self._fill([Block.alone(name, self.shapes[name]) for name in held], held)
