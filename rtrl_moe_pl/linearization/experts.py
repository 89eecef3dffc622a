"""Sums over time for banks of experts: a product for every (lane, expert) pair that was used, none for the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rtrl_moe_pl.linearization.cotangents import Cotangents

TILE_BYTES = 4 * 1024 * 1024  # of what is added to P at a time: it stays in cache


@dataclass(frozen=True)
class Uses:
    """Which expert was used at which step of which lane.

    Args:
        experts: [K, L] int64, one for each of K uses in a lane.
        count: E, the number of experts.
    """

    experts: Tensor
    count: int

    @cached_property
    def _sorted(self) -> tuple[Tensor, Tensor, Tensor]:
        """Every use, by pair and then by time; the pairs used, ascending; how often each."""
        lanes = torch.arange(self.experts.shape[1], device=self.experts.device)
        pairs, order = torch.sort((lanes * self.count + self.experts).flatten(), stable=True)
        return order, *torch.unique_consecutive(pairs, return_counts=True)

    @property
    def pairs(self) -> Tensor:
        """lane * E + expert of every pair that was used, [G] ascending."""
        return self._sorted[1]

    @cached_property
    def _buckets(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Pairs of about the same number of uses: their places in ``pairs`` [g], the uses [g, m], whether real [g, m].

        m doubles from bucket to bucket, so that less than half of the products are with padding.
        """
        order, _, counts = self._sorted
        ends = counts.cumsum(0)
        result = []
        width, longest = 1, int(counts.max())
        while width < 2 * longest:
            here = ((counts <= width) & (2 * counts > width)).nonzero().flatten()
            if len(here):
                number = torch.arange(width, device=counts.device)
                real = number < counts[here, None]
                place = (ends - counts)[here, None] + number
                result.append((here, order[place.clamp_(max=len(order) - 1)], real))
            width *= 2
        return result

    def sums(self, left: Tensor, right: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Of every pair, the sum over its uses of ``left (x) right``; some pairs at a time.

        Args:
            left: [K L, U], the uses flattened.
            right: [K L, V]; None for ones, V = 1.

        Yields:
            places in ``pairs`` [g], and the sums [g, U, V].
        """
        size = left.shape[1] * (1 if right is None else right.shape[1]) * left.itemsize
        count = max(1, TILE_BYTES // size)
        for bucket in self._buckets:
            for here, uses, real in zip(*(part.split(count) for part in bucket), strict=True):
                factor = real.to(left.dtype).unsqueeze(-1)  # [g, m, 1]
                if right is not None:
                    factor = right[uses].mul_(factor)
                yield here, torch.bmm(left[uses].transpose(1, 2), factor)


@dataclass
class ExpertTerm:
    """sum_t cotangent_t (x) input_t for the expert used, of banks ``a = W_e z``; with ``inputs`` None, z = 1."""

    cotangents: Cotangents  # [K, B, rows]
    inputs: Tensor | None  # [K, B, columns of one expert]
    uses: Uses  # of [K, B]

    def _inputs(self, lanes: slice) -> Tensor | None:
        return None if self.inputs is None else self.inputs[:, lanes].flatten(0, 1)

    def add_to(self, influence: Tensor, lane: int, row: int) -> None:
        lanes, _, rows, size = influence.shape
        here = slice(lane, lane + lanes)
        cotangents = self.cotangents.part(lane, lanes, row, rows).flatten(0, 1).flatten(1)
        whole = lanes == self.uses.experts.shape[1]
        uses = self.uses if whole else Uses(self.uses.experts[:, here], self.uses.count)
        by_pair = influence.view(lanes * self.uses.count, -1, rows, size)
        for group, sums in uses.sums(cotangents, self._inputs(here)):
            sums = sums.unflatten(1, (rows, size)).permute(0, 3, 1, 2)
            by_pair.index_add_(0, uses.pairs[group], sums)

    def pair_sums(self) -> Iterator[tuple[Tensor, Tensor]]:
        """M of the pairs that were used: places in ``uses.pairs`` [g], and [g, S, rows columns]."""
        _, batch, rows = self.cotangents.shape
        cotangents = self.cotangents.part(0, batch, 0, rows).transpose(2, 3)  # [K, B, S, rows]
        size = cotangents.shape[2]
        for group, sums in self.uses.sums(cotangents.flatten(0, 1).flatten(1), self._inputs(slice(None))):
            yield group, sums.unflatten(1, (size, rows)).flatten(2)

    def immediate(self) -> Tensor:
        found: Tensor | None = None  # in the order of what is returned: a copy would be as large as P
        count, (_, batch, rows) = self.uses.count, self.cotangents.shape
        for group, sums in self.pair_sums():
            if found is None:
                found = sums.new_zeros(batch, sums.shape[1], rows, count, sums.shape[2] // rows)
            pairs = self.uses.pairs[group]
            found[pairs // count, :, :, pairs % count] = sums.unflatten(2, (rows, -1))
        assert found is not None
        return found.flatten(3)

    def add_gradient(self, gradient: Tensor) -> None:
        by_expert = gradient.view(self.uses.count, -1, gradient.shape[-1])
        loss = self.cotangents.loss.flatten(0, 1)
        for group, sums in self.uses.sums(loss, self._inputs(slice(None))):
            by_expert.index_add_(0, self.uses.pairs[group] % self.uses.count, sums.transpose(1, 2))
