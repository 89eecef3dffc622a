"""What one window hands to a sensitivity: J, the cotangent at its start, and M in factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


def flush_tiny_(value: Tensor) -> None:
    """Set to zero what is too small to matter (1e-30 in float32, 1e-290 in float64), in place.

    A contracting cell drives products of Jacobians into subnormal numbers, with which a processor's products are 100
    times slower; torch's own switch does not reach its worker threads. GPUs do not mind.
    """
    if not value.is_cuda:
        threshold = 1e-290 if value.dtype == torch.float64 else 1e-30
        torch.hardshrink(value, threshold, out=value)


@dataclass(frozen=True)
class Member:
    """A parameter's place inside a block: columns ``start .. start + width - 1`` of ``[rows, columns]``."""

    name: str
    start: int
    width: int
    transposed: bool = False  # the parameter is stored [width, rows], not [rows, width]


@dataclass(frozen=True)
class Block:
    """Parameters whose influence is kept in one array ``[B, rows, columns, S]``.

    Parameters that meet the same cotangent (weights and bias of layers whose outputs are added) share a block, so
    that one product over time serves them all.
    """

    rows: int
    columns: int
    members: tuple[Member, ...]

    @staticmethod
    def alone(name: str, shape: torch.Size) -> Block:
        """A block for one parameter of any shape, one row per element."""
        return Block(shape.numel(), 1, (Member(name, 0, 1),))

    def split(self, value: Tensor, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
        """Cut ``[.., rows, columns]`` into the members' own shapes (leading dimensions kept)."""
        parts: dict[str, Tensor] = {}
        for member in self.members:
            part = value[..., member.start : member.start + member.width]
            if member.transposed:
                part = part.transpose(-1, -2)
            parts[member.name] = part.reshape(value.shape[:-2] + shapes[member.name])
        return parts


class Term(Protocol):
    """One contribution to a block's M and to its gradient within the window.

    Cotangents have a last axis of S + 1: one for each entry of the end state, and last the window's loss.
    """

    def add_to(self, influence: Tensor, lane: int, row: int) -> None:
        """Add M to ``influence`` [lanes, rows, columns, S], a part that begins at ``lane`` and ``row``."""
        ...

    def gradient(self) -> Tensor:
        """Gradient of the window's loss at a fixed start state, [rows, columns], summed over lanes."""
        ...


@dataclass
class OuterTerm:
    """sum_t cotangent_t (x) input_t, for a layer ``a = W z``; with ``inputs`` None, for what is added: z = 1."""

    cotangents: Tensor  # [k, B, rows, S + 1]
    inputs: Tensor | None  # [k, B, columns]
    column: int = 0  # first column of the block that it covers

    def add_to(self, influence: Tensor, lane: int, row: int) -> None:
        lanes, rows, _, size = influence.shape
        cotangents = self.cotangents[:, lane : lane + lanes, row : row + rows, :size]
        if self.inputs is None:
            influence[:, :, self.column] += cotangents.sum(0)
            return
        width = self.inputs.shape[-1]
        part = influence[:, :, self.column : self.column + width]
        inputs = self.inputs[:, lane : lane + lanes].permute(1, 2, 0)  # [lanes, columns, k]
        if lanes == 1:  # a product per row, batched: [columns, k] x [k, S]
            part[0].baddbmm_(inputs.expand(rows, -1, -1), cotangents[:, 0].transpose(0, 1))
        else:
            flat = cotangents.transpose(0, 1).reshape(lanes, -1, rows * size)
            part += torch.bmm(inputs, flat).view(lanes, width, rows, size).transpose(1, 2)

    def gradient(self) -> Tensor:
        loss = self.cotangents[..., -1].flatten(0, 1)  # [k B, rows]
        if self.inputs is None:
            return loss.sum(0)[:, None]
        return loss.T @ self.inputs.flatten(0, 1)


@dataclass
class IndexTerm:
    """sum_t cotangent_t placed at row ``ids_t``, for an embedding ``[vocabulary, width]``."""

    cotangents: Tensor  # [k, B, width, S + 1]
    ids: Tensor  # [k, B]
    vocabulary: int

    def add_to(self, influence: Tensor, lane: int, row: int) -> None:
        lanes, rows, _, size = influence.shape
        for i in range(lanes):
            ids = self.ids[:, lane + i] - row
            here = (ids >= 0) & (ids < rows)
            influence[i].index_add_(0, ids[here], self.cotangents[here, lane + i, :, :size])

    def gradient(self) -> Tensor:
        loss = self.cotangents[..., -1].flatten(0, 1)  # [k B, width]
        return loss.new_zeros(self.vocabulary, loss.shape[1]).index_add_(0, self.ids.flatten(), loss)


@dataclass
class DenseTerm:
    """M itself, for what has no factors."""

    jacobian: Tensor  # [B, rows, columns, S + 1]

    def add_to(self, influence: Tensor, lane: int, row: int) -> None:
        lanes, rows, _, size = influence.shape
        influence += self.jacobian[lane : lane + lanes, row : row + rows, :, :size]

    def gradient(self) -> Tensor:
        return self.jacobian[..., -1].sum(0)


@dataclass
class WindowLinearization:
    """The derivatives of one window at the weights it was run with.

    Args:
        transition: J transposed, [B, S, S]: ``transition[b, j, i] = d s_end[b, i] / d s_start[b, j]``.
        cotangent: dL/ds_start at fixed parameters, [B, S].
        terms: the contributions to each block, M and the window's own gradient.
        shapes: shape of every parameter by name.
    """

    transition: Tensor
    cotangent: Tensor
    terms: dict[Block, list[Term]]
    shapes: dict[str, torch.Size]

    def gradient(self) -> dict[str, Tensor]:
        """Gradient of the window's loss at a fixed start state, by parameter name, summed over lanes."""
        gradients: dict[str, Tensor] = {}
        for block, terms in self.terms.items():
            total = self.transition.new_zeros(block.rows, block.columns)
            for term in terms:
                part = term.gradient()
                column = getattr(term, "column", 0)
                total[:, column : column + part.shape[1]] += part
            gradients |= block.split(total, self.shapes)
        return gradients
