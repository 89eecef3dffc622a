"""What one window hands to a sensitivity: J, the cotangent at its start, and M in factors."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rtrl_moe_pl.linearization.cotangents import Cotangents


def copy_flushed(value: Tensor, out: Tensor) -> None:
    """Copy, with zero for what is too small to matter: below 1.1e-19 in float32, 1.5e-154 in float64.

    The bound is the root of the smallest normal number, so that no product of two copies is subnormal.

    A contracting cell drives products of Jacobians into subnormal numbers, with which a processor's products are 100
    times slower; torch's own switch does not reach its worker threads. GPUs do not mind.
    """
    if value.is_cuda:
        if out is not value:
            out.copy_(value)
        return
    torch.hardshrink(value, torch.finfo(value.dtype).tiny ** 0.5, out=out)


@dataclass(frozen=True)
class Member:
    """A parameter's place inside a block: columns ``start .. start + width - 1`` of ``[columns, rows]``."""

    name: str
    start: int
    width: int
    transposed: bool = False  # the parameter is stored [width, rows], not [rows, width]


@dataclass(frozen=True)
class Block:
    """Parameters whose influence is kept together, as ``[B, columns, rows, S + 1]``.

    ``rows`` index a layer's outputs and ``columns`` its inputs. Parameters that meet the same cotangents (weights and
    biases of layers whose outputs are added) share a block, so that one product over time serves them all.
    """

    rows: int
    columns: int
    members: tuple[Member, ...]

    @staticmethod
    def alone(name: str, shape: torch.Size) -> Block:
        """A block for one parameter of any shape, one row per element."""
        return Block(shape.numel(), 1, (Member(name, 0, 1),))

    def split(self, value: Tensor, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
        """Cut ``[.., columns, rows]`` into the members' own shapes (leading dimensions kept)."""
        parts: dict[str, Tensor] = {}
        for member in self.members:
            part = value[..., member.start : member.start + member.width, :]
            if not member.transposed:
                part = part.transpose(-1, -2)
            parts[member.name] = part.reshape(value.shape[:-2] + shapes[member.name])
        return parts

    def join(self, parts: dict[str, Tensor], out: Tensor) -> None:
        """The inverse of ``split`` for the members in ``parts``: write them into ``out`` [.., columns, rows]."""
        for member in self.members:
            if member.name in parts:
                shape = (member.width, self.rows) if member.transposed else (self.rows, member.width)
                value = parts[member.name].reshape(out.shape[:-2] + shape)
                place = out[..., member.start : member.start + member.width, :]
                place.copy_(value if member.transposed else value.transpose(-1, -2))


class Term(Protocol):
    """One contribution to a block's M; the last of its S + 1 entries is the gradient inside the window."""

    def add_to(self, influence: Tensor, lane: int, row: int) -> None:
        """Add to ``influence`` [lanes, columns, rows, S + 1], the part of a block that begins at ``lane``, ``row``."""
        ...


@dataclass
class OuterTerm:
    """sum_t cotangent_t (x) input_t, for a layer ``a = W z``; with ``inputs`` None, for what is added: z = 1."""

    cotangents: Cotangents  # [k, B, rows, S + 1]
    inputs: Tensor | None  # [k, B, columns]
    column: int = 0  # first column of the block that it covers

    def add_to(self, influence: Tensor, lane: int, row: int) -> None:
        lanes, _, rows, _ = influence.shape
        cotangents = self.cotangents.part(lane, lanes, row, rows)
        if self.inputs is None:
            influence[:, self.column] += cotangents.sum(0)
            return
        inputs = self.inputs[:, lane : lane + lanes].permute(1, 2, 0)  # [lanes, columns, k]
        part = influence[:, self.column : self.column + inputs.shape[1]].flatten(2)
        part.baddbmm_(inputs, cotangents.flatten(2).transpose(0, 1))


@dataclass
class IndexTerm:
    """sum_t cotangent_t at column ``ids_t``, for a look-up in a table ``[columns, rows]``."""

    cotangents: Cotangents  # [k, B, rows, S + 1]
    ids: Tensor  # [k, B]

    def add_to(self, influence: Tensor, lane: int, row: int) -> None:
        lanes, _, rows, _ = influence.shape
        cotangents = self.cotangents.part(lane, lanes, row, rows)
        for i in range(lanes):
            influence[i].index_add_(0, self.ids[:, lane + i], cotangents[:, i])


@dataclass
class DenseTerm:
    """M itself, for what has no factors."""

    jacobian: Tensor  # [B, columns, rows, S + 1]

    def add_to(self, influence: Tensor, lane: int, row: int) -> None:
        lanes, _, rows, _ = influence.shape
        influence += self.jacobian[lane : lane + lanes, :, row : row + rows]


@dataclass
class WindowLinearization:
    """The derivatives of one window at the weights it was run with.

    The window's loss is treated as one more component of the state that it ends in, the last of S + 1: then the
    gradient is a row of the influence matrix, and ``P <- J P + M`` computes it on the way.

    Args:
        transition: J transposed, [B, S, S + 1]: ``transition[b, j, i] = d s_end[b, i] / d s_start[b, j]`` and, at
            i = S, the loss's cotangent of ``s_start[b, j]``.
        terms: the contributions to each block's M.
        shapes: shape of every parameter by name.
    """

    transition: Tensor
    terms: dict[Block, list[Term]]
    shapes: dict[str, torch.Size]

    @property
    def cotangent(self) -> Tensor:
        """dL/ds_start at fixed parameters, [B, S]."""
        return self.transition[..., -1]

    def gradient(self) -> dict[str, Tensor]:
        """Gradient of the window's loss at a fixed start state, by parameter name, summed over lanes."""
        return {name: m[:, -1].sum(0) for name, m in self.immediate().items()}

    def immediate(self) -> dict[str, Tensor]:
        """M in full by parameter name, [B, S + 1, *shape]. Large: for representations that want no factors."""
        result: dict[str, Tensor] = {}
        batch, _, width = self.transition.shape
        for block, terms in self.terms.items():
            total = self.transition.new_zeros(batch, block.columns, block.rows, width)
            for term in terms:
                term.add_to(total, 0, 0)
            result |= block.split(total.permute(0, 3, 1, 2), self.shapes)
        return result


def separate(terms: dict[Block, list[Term]], shapes: dict[str, torch.Size], like: Tensor) -> dict[Block, list[Term]]:
    """Terms in which no parameter is in two blocks: blocks that share one are replaced by M in full.

    Args:
        like: the window's transition, [B, S, S + 1].
    """
    count = Counter(member.name for block in terms for member in block.members)
    if all(n == 1 for n in count.values()):
        return terms
    shared = [b for b in terms if any(count[m.name] > 1 for m in b.members)]
    result = {block: found for block, found in terms.items() if block not in shared}
    for block in shared:
        part = WindowLinearization(like, {block: terms[block]}, shapes)
        for name, m in part.immediate().items():  # [B, S + 1, *shape]
            dense = DenseTerm(m.flatten(2).transpose(1, 2)[:, None])
            result.setdefault(Block.alone(name, shapes[name]), []).append(dense)
    return result
