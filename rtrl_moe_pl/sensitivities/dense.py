"""The full influence matrix, exact for any cell."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rtrl_moe_pl.linearization import Block, WindowLinearization
from rtrl_moe_pl.linearization.window import Term, flush_tiny_
from rtrl_moe_pl.sensitivities.base import Sensitivity

# Bytes of P worked on at a time: with its scratch copy and the cotangents it must stay in a core's second-level
# cache (measured at S = 64 and 128: 0.67-0.77 of the sgemm peak at 256-512 KiB, 0.45 untiled at S = 128).
CPU_TILE_BYTES = 384 * 1024
GPU_TILE_BYTES = 128 * 1024 * 1024


class DenseSensitivity(Sensitivity):
    """P [B, S, |theta|], every entry kept and updated in place.

    Kept as one array ``[B, rows, columns, S]`` for each block of parameters, the state last, so that ``J P`` is one
    product of contiguous rows with J transposed, and M one product over time for each row. A block is allocated when
    a parameter of it is first reached; until then its influence is zero and costs nothing.

    Cost: S^2 |theta| a window for J P, k S |theta| for M; memory B S |theta|, plus one tile.
    Exact: equals BPTT while parameters are fixed.
    References: Williams & Zipser 1989, Neural Computation 1(2):270-280; Schmidhuber 1992, Neural Computation
    4(2):243-248 (windows).
    """

    exact = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._blocks: dict[Block, Tensor] = {}  # [B, rows, columns, S]

    def vjp(self, cotangent: Tensor) -> dict[str, Tensor]:
        gradients: dict[str, Tensor] = {}
        for block, influence in self._blocks.items():
            rows = influence.flatten(1, 2)  # [B, rows columns, S]
            total = torch.bmm(rows, cotangent[:, :, None]).sum(0)
            gradients |= block.split(total.view(block.rows, block.columns), self.shapes)
        return gradients

    def advance(self, linearization: WindowLinearization) -> None:
        """Carry P over one window, P <- J P + M, in place.

        Args:
            linearization: J and the factors of M, of this sensitivity's batch.

        Raises:
            ValueError: if the batch size differs.
        """
        self._pass(linearization, None)

    def contract_and_advance(self, cotangent: Tensor, linearization: WindowLinearization) -> dict[str, Tensor]:
        return self._pass(linearization, cotangent)

    def _pass(self, linearization: WindowLinearization, cotangent: Tensor | None) -> dict[str, Tensor]:
        """One pass over P: each tile is read, contracted if asked for, and then written."""
        batch = linearization.transition.shape[0]
        if batch != self.batch_size:
            raise ValueError(
                f"a window of {batch} lanes cannot advance an influence matrix of {self.batch_size}: "
                "the batch size must stay the same while influence is carried"
            )
        for block in linearization.terms:
            if block not in self._blocks:
                self._allocate(block)
        gradients: dict[str, Tensor] = {}
        for block, influence in self._blocks.items():
            terms = linearization.terms.get(block, [])
            total = self._pass_block(block, influence, linearization.transition, terms, cotangent)
            if total is not None:
                gradients |= block.split(total, self.shapes)
        return gradients

    def _pass_block(
        self, block: Block, influence: Tensor, transition: Tensor, terms: list[Term], cotangent: Tensor | None
    ) -> Tensor | None:
        total = None if cotangent is None else influence.new_zeros(block.rows, block.columns)
        row_bytes = block.columns * self.state_size * influence.element_size()
        tile_bytes = GPU_TILE_BYTES if influence.is_cuda else CPU_TILE_BYTES
        rows = max(1, min(block.rows, tile_bytes // row_bytes))
        lanes = max(1, tile_bytes // (row_bytes * rows)) if rows == block.rows else 1
        scratch = influence.new_empty(min(lanes, self.batch_size), rows * block.columns, self.state_size)
        for lane in range(0, self.batch_size, lanes):
            jacobians = transition[lane : lane + lanes]  # [lanes, S, S], transposed
            for row in range(0, block.rows, rows):
                tile = influence[lane : lane + lanes, row : row + rows]
                flat = tile.flatten(1, 2)
                old = scratch[: flat.shape[0], : flat.shape[1]].copy_(flat)
                if total is not None and cotangent is not None:
                    part = torch.bmm(old, cotangent[lane : lane + lanes, :, None]).sum(0)
                    total[row : row + rows] += part.view(-1, block.columns)
                torch.bmm(old, jacobians, out=flat)
                for term in terms:
                    term.add_to(tile, lane, row)
                flush_tiny_(tile)
        return total

    def _allocate(self, block: Block) -> None:
        """Make room for a block, taking along what its members already had elsewhere."""
        shape = (self.batch_size, block.rows, block.columns, self.state_size)
        fresh = torch.zeros(shape, dtype=self.dtype, device=self.device)
        names = {member.name for member in block.members}
        for old in [b for b in self._blocks if names & {m.name for m in b.members}]:
            held = self._unpack(old)
            del self._blocks[old]
            self._pack(block, fresh, held)
            for member in old.members:
                if member.name not in names:
                    alone = Block.alone(member.name, self.shapes[member.name])
                    self._allocate(alone)
                    self._pack(alone, self._blocks[alone], held)
        self._blocks[block] = fresh

    def _unpack(self, block: Block) -> dict[str, Tensor]:
        """The members' P, [B, S, *shape] each."""
        by_state = self._blocks[block].permute(0, 3, 1, 2)  # [B, S, rows, columns]
        return block.split(by_state, self.shapes)

    def _pack(self, block: Block, influence: Tensor, held: dict[str, Tensor]) -> None:
        for member in block.members:
            if member.name in held:
                value = held[member.name].flatten(2)  # [B, S, numel]
                part = influence[:, :, member.start : member.start + member.width]
                shape = (member.width, block.rows) if member.transposed else (block.rows, member.width)
                value = value.unflatten(2, shape)
                value = value.transpose(2, 3) if member.transposed else value
                part.copy_(value.permute(0, 2, 3, 1))

    def to_dense(self) -> dict[str, Tensor]:
        dense = {
            name: torch.zeros(self.batch_size, self.state_size, *shape, dtype=self.dtype, device=self.device)
            for name, shape in self.shapes.items()
        }
        for block in self._blocks:
            dense |= self._unpack(block)
        return dense

    def norm(self) -> Tensor:
        if not self._blocks:
            return torch.zeros((), dtype=self.dtype, device=self.device)
        return torch.stack([torch.linalg.vector_norm(p) for p in self._blocks.values()]).norm()

    def zero_(self) -> None:
        for influence in self._blocks.values():
            influence.zero_()

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for p in self._blocks.values())

    def state_dict(self) -> dict[str, Any]:
        return {name: p.contiguous() for block in self._blocks for name, p in self._unpack(block).items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._blocks.clear()
        for name, value in state.items():
            expected = (self.batch_size, self.state_size, *self.shapes[name])
            if tuple(value.shape) != expected:
                raise ValueError(
                    f"the saved influence of {name} has shape {tuple(value.shape)}, this run needs {expected}: "
                    "resume with the batch size and the model it was saved with"
                )
            block = Block.alone(name, self.shapes[name])
            self._allocate(block)
            self._pack(block, self._blocks[block], {name: value.to(self.device, self.dtype)})
