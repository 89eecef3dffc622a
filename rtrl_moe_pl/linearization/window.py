"""What one window hands to a sensitivity: J, the cotangent at its start, and M in factors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from rtrl_moe_pl.linearization.cotangents import Cotangents


def copy_flushed(value: Tensor, out: Tensor, bound: float | None = None) -> None:
    """Copy, with zero for what is too small to matter: below 1.1e-19 in float32, 1.5e-154 in float64.

    The bound is the root of the smallest normal number, so that no product of two copies is subnormal. Give another
    for numbers whose scale is the caller's, such as a loss's cotangents.

    A contracting cell drives products of Jacobians into subnormal numbers, with which a processor's products are 100
    times slower; torch's own switch does not reach its worker threads. GPUs do not mind.
    """
    if value.is_cuda:
        if out is not value:
            out.copy_(value)
        return
    torch.hardshrink(value, torch.finfo(value.dtype).tiny ** 0.5 if bound is None else bound, out=out)


@dataclass(frozen=True)
class Member:
    """A parameter's place inside a block: columns ``start .. start + width - 1`` of ``[columns, rows]``."""

    name: str
    start: int
    width: int
    transposed: bool = False  # the parameter is stored [width, rows], not [rows, width]


@dataclass(frozen=True)
class Block:
    """Parameters whose influence is kept together, as ``[B, columns, rows, S]``.

    ``rows`` index a layer's outputs and ``columns`` its inputs. Parameters that meet the same cotangents (weights and
    biases of layers whose outputs are added) share a block, so that one product over time serves them all.

    A block of banks has the columns of one expert after those of another, ``experts`` times; its members' places are
    those inside an expert.
    """

    rows: int
    columns: int
    members: tuple[Member, ...]
    experts: int = 1

    @staticmethod
    def alone(name: str, shape: torch.Size) -> Block:
        """A block for one parameter of any shape, one row per element."""
        return Block(shape.numel(), 1, (Member(name, 0, 1),))

    def split(self, value: Tensor, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
        """Cut ``[.., columns, rows]`` into the members' own shapes (leading dimensions kept)."""
        parts: dict[str, Tensor] = {}
        by_expert = value.unflatten(-2, (self.experts, self.columns // self.experts))
        for member in self.members:
            part = by_expert[..., member.start : member.start + member.width, :]
            if not member.transposed:
                part = part.transpose(-1, -2)
            parts[member.name] = part.reshape(value.shape[:-2] + shapes[member.name])
        return parts

    def join(self, parts: dict[str, Tensor], out: Tensor) -> None:
        """The inverse of ``split`` for the members in ``parts``: write them into ``out`` [.., columns, rows]."""
        by_expert = out.unflatten(-2, (self.experts, self.columns // self.experts))
        for member in self.members:
            if member.name in parts:
                shape = (member.width, self.rows) if member.transposed else (self.rows, member.width)
                value = parts[member.name].reshape(*out.shape[:-2], self.experts, *shape)
                place = by_expert[..., member.start : member.start + member.width, :]
                place.copy_(value if member.transposed else value.transpose(-1, -2))


class Term(Protocol):
    """One contribution to a block's M, and to the gradient inside the window."""

    def add_to(self, influence: Tensor, lane: int, row: int) -> None:
        """Add M to ``influence`` [lanes, columns, rows, S], the part of a block that begins at ``lane``, ``row``."""
        ...

    def immediate(self) -> Tensor:
        """M of all lanes, the state first: [B, S, rows, columns]."""
        ...

    def add_gradient(self, gradient: Tensor) -> None:
        """Add the gradient of the window's loss at a fixed start state, summed over lanes, to [columns, rows]."""
        ...


@dataclass
class OuterTerm:
    """sum_t cotangent_t (x) input_t, for a layer ``a = W z``; with ``inputs`` None, for what is added: z = 1."""

    cotangents: Cotangents  # [k, B, rows]
    inputs: Tensor | None  # [k, B, columns]

    def add_to(self, influence: Tensor, lane: int, row: int) -> None:
        lanes, _, rows, _ = influence.shape
        cotangents = self.cotangents.part(lane, lanes, row, rows)
        if self.inputs is None:
            influence[:, 0] += cotangents.sum(0)
            return
        inputs = self.inputs[:, lane : lane + lanes].permute(1, 2, 0)  # [lanes, columns, k]
        influence.flatten(2).baddbmm_(inputs, cotangents.flatten(2).transpose(0, 1))

    def immediate(self) -> Tensor:
        _, batch, rows = self.cotangents.shape
        cotangents = self.cotangents.part(0, batch, 0, rows).permute(1, 3, 2, 0)  # [B, S, rows, k]
        if self.inputs is None:
            return cotangents.sum(-1, keepdim=True)
        found = torch.bmm(cotangents.flatten(1, 2), self.inputs.transpose(0, 1))
        return found.unflatten(1, cotangents.shape[1:3])

    def add_gradient(self, gradient: Tensor) -> None:
        loss = self.cotangents.loss.flatten(0, 1)  # [k B, rows]
        if self.inputs is None:
            gradient += loss.sum(0)
        else:
            gradient.addmm_(self.inputs.flatten(0, 1).T, loss)


@dataclass
class IndexTerm:
    """sum_t cotangent_t at column ``ids_t``, for a look-up in a table ``[columns, rows]``."""

    cotangents: Cotangents  # [k, B, rows]
    ids: Tensor  # [k, B]
    columns: int

    def add_to(self, influence: Tensor, lane: int, row: int) -> None:
        lanes, _, rows, _ = influence.shape
        cotangents = self.cotangents.part(lane, lanes, row, rows)
        for i in range(lanes):
            influence[i].index_add_(0, self.ids[:, lane + i], cotangents[:, i])

    def immediate(self) -> Tensor:
        _, batch, rows = self.cotangents.shape
        cotangents = self.cotangents.part(0, batch, 0, rows).transpose(2, 3)  # [k, B, S, rows]
        found = cotangents.new_zeros(batch * self.columns, *cotangents.shape[2:])
        first = self.columns * torch.arange(batch, device=self.ids.device)
        found.index_add_(0, (first + self.ids).flatten(), cotangents.flatten(0, 1))
        return found.unflatten(0, (batch, -1)).permute(0, 2, 3, 1)

    def add_gradient(self, gradient: Tensor) -> None:
        gradient.index_add_(0, self.ids.flatten(), self.cotangents.loss.flatten(0, 1))


@dataclass
class DenseTerm:
    """M itself, for what has no factors."""

    jacobian: Tensor  # [B, columns, rows, S]
    gradient: Tensor  # [columns, rows]

    def add_to(self, influence: Tensor, lane: int, row: int) -> None:
        lanes, _, rows, _ = influence.shape
        influence += self.jacobian[lane : lane + lanes, :, row : row + rows]

    def immediate(self) -> Tensor:
        return self.jacobian.permute(0, 3, 2, 1)

    def add_gradient(self, gradient: Tensor) -> None:
        gradient += self.gradient


def gradient_of(terms: Mapping[Block, list[Term]], shapes: dict[str, torch.Size], like: Tensor) -> dict[str, Tensor]:
    """Gradient of a loss at a fixed start state, by parameter name, summed over lanes and blocks."""
    gradients: dict[str, Tensor] = {}
    for block, found in terms.items():
        total = like.new_zeros(block.columns, block.rows)
        for term in found:
            term.add_gradient(total)
        add_parts(block.split(total, shapes), gradients)
    return gradients


def add_parts(parts: Mapping[str, Tensor], total: dict[str, Tensor]) -> None:
    """Add what there is by name; a name that ``total`` does not have yet is taken over."""
    for name, part in parts.items():
        total[name] = total[name] + part if name in total else part


@dataclass
class WindowLinearization:
    """The derivatives of one window at the weights it was run with.

    Args:
        transition: J transposed, [B, S, S]: ``transition[b, j, i] = d s_end[b, i] / d s_start[b, j]``.
        cotangent: dL/ds_start at fixed parameters, [B, S].
        terms: the contributions to each block's M.
        shapes: shape of every parameter by name.
        ends: of a routed cell in which every lane left some slots alone, those that any lane wrote (and as many more
            as make their number equal), [B, U]; J and M are then of these slots alone, [B, S, U d] and [B, U d, ..].
            None for all.
        sources: the slots that J reads or writes, [B, V]: all its other rows [b, j] are zero; None for all.
    """

    transition: Tensor
    cotangent: Tensor
    terms: dict[Block, list[Term]]
    shapes: dict[str, torch.Size]
    ends: Tensor | None = None
    sources: Tensor | None = None

    def whole_transition(self, slot_size: int) -> Tensor:
        """J transposed of all slots, [B, S, S]: the identity for those that are not among ``ends``."""
        if self.ends is None:
            return self.transition
        batch, size, _ = self.transition.shape
        whole = torch.eye(size, dtype=self.transition.dtype, device=self.transition.device).repeat(batch, 1, 1)
        index = self.ends[:, None, :, None].expand(-1, size, -1, slot_size)
        whole.unflatten(2, (-1, slot_size)).scatter_(2, index, self.transition.unflatten(2, (-1, slot_size)))
        return whole

    def gradient(self) -> dict[str, Tensor]:
        """Gradient of the window's loss at a fixed start state, by parameter name, summed over lanes."""
        return gradient_of(self.terms, self.shapes, self.cotangent)

    def immediate(self) -> dict[str, Tensor]:
        """M in full by parameter name, [B, S, *shape]. Large: for representations that want no factors, and tests."""
        result: dict[str, Tensor] = {}
        for block, terms in self.terms.items():
            lanes, _, size = self.transition.shape
            total = self.transition.new_zeros(lanes, block.columns, block.rows, size)
            for term in terms:
                term.add_to(total, 0, 0)
            result |= block.split(total.permute(0, 3, 1, 2), self.shapes)
        return result


def unshared(blocks: Iterable[Block], shapes: dict[str, torch.Size]) -> list[Block]:
    """The same parameters with none in two blocks: members of blocks that share one get blocks of their own."""
    blocks = list(blocks)
    count = Counter(member.name for block in blocks for member in block.members)
    result: dict[Block, None] = {}
    for block in blocks:
        if all(count[member.name] == 1 for member in block.members):
            result[block] = None
        else:
            result |= {Block.alone(member.name, shapes[member.name]): None for member in block.members}
    return list(result)


def separate(linearization: WindowLinearization) -> WindowLinearization:
    """The same in ``unshared`` blocks: M is made in full where a block had to be replaced."""
    terms, shapes = linearization.terms, linearization.shapes
    result: dict[Block, list[Term]] = {block: [] for block in unshared(terms, shapes)}
    for block, found in terms.items():
        if block in result:
            result[block] += found
            continue
        part = replace(linearization, terms={block: found})
        gradients = part.gradient()
        for name, m in part.immediate().items():  # [B, S, *shape]
            jacobian = m.flatten(2).transpose(1, 2)[:, None]
            result[Block.alone(name, shapes[name])].append(DenseTerm(jacobian, gradients[name].reshape(1, -1)))
    return replace(linearization, terms=result)
