"""P of the pairs of lane and expert that have been used, in one piece of memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from rtrl_moe_pl.linearization import Block, ExpertTerm, Member
from rtrl_moe_pl.linearization.experts import TILE_BYTES
from rtrl_moe_pl.linearization.window import copy_flushed


class ExpertPool:
    """``[pairs used, S, rows columns]``: of a block's banks, one row for every (lane, expert) whose P is not zero.

    A row is taken when a pair is first used, and given back when its lane starts anew. Memory that no row was ever
    taken from is never touched.

    Args:
        block: of banks.
        batch_size, state_size: B, S.
        like: gives device, and the type that is computed in.
        storage: type that P is kept in.
    """

    def __init__(
        self, block: Block, batch_size: int, state_size: int, like: Tensor, storage: torch.dtype | None = None
    ) -> None:
        self.block, self.batch_size = block, batch_size
        self.columns = block.columns // block.experts
        pairs = batch_size * block.experts
        self.dtype = like.dtype
        self.values = like.new_empty(pairs, state_size, block.rows * self.columns, dtype=storage)
        self.row_of = torch.full((pairs,), -1, device=like.device)  # by lane * E + expert; -1: P is zero
        self.pair_of = torch.full((pairs,), -1, device=like.device)  # by row; -1: free
        self.since = torch.zeros(pairs, dtype=torch.long, device=like.device)  # by row: windows that P covers
        self.used = 0  # all later rows are free

    def live(self) -> Tensor:
        """The rows taken."""
        return (self.pair_of[: self.used] >= 0).nonzero().flatten()

    def oldest(self, windows: int) -> int:
        """Most windows that any row taken is behind."""
        rows = self.live()
        return windows - int(self.since[rows].min()) if len(rows) else 0

    def drop(self, lanes: Tensor) -> None:
        """P = 0 for these lanes [B] bool."""
        rows = self.live()
        gone = rows[lanes[self.pair_of[rows] // self.block.experts]]
        self.row_of[self.pair_of[gone]] = -1
        self.pair_of[gone] = -1
        if len(gone):
            kept = self.live()
            self.used = int(kept[-1]) + 1 if len(kept) else 0

    def due(self, used: Iterable[Tensor], expired: int) -> Tensor:
        """Rows taken whose pair is among ``used``, or which cover no more than ``expired`` windows."""
        due = (self.pair_of >= 0) & (self.since <= expired)
        for pairs in used:
            rows = self.row_of[pairs]
            due[rows[rows >= 0]] = True
        return due.nonzero().flatten()

    def multiplied(self, rows: Tensor, products: Tensor, which: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """A product times P, some rows at a time.

        Args:
            rows: [R].
            products: [B, D, S, S], of every lane.
            which: [R], below D.

        Yields:
            rows [r], and their new values.
        """
        lanes = self.pair_of[rows] // self.block.experts
        count = max(1, TILE_BYTES // (self.values[0].nbytes))
        for here in torch.arange(len(rows), device=rows.device).split(count):
            tile = self.values[rows[here]].to(self.dtype)
            copy_flushed(tile, tile)
            yield rows[here], torch.bmm(products[lanes[here], which[here]], tile)

    def add(self, term: ExpertTerm, ends: Tensor | None, slot_size: int, now: int) -> None:
        """Add a window's M to the pairs that it used, of slots ``ends`` [B, U] or all; new ones cover ``now``."""
        pairs = term.uses.pairs
        new = pairs[self.row_of[pairs] < 0]
        rows = (self.pair_of < 0).nonzero().flatten()[: len(new)]
        self.row_of[new], self.pair_of[rows], self.since[rows] = rows, new, now
        self.values[rows] = 0.0
        self.used = max(self.used, int(rows.max()) + 1) if len(rows) else self.used
        for group, sums in term.pair_sums():  # [g, S, rows columns]
            here, sums = pairs[group], sums.to(self.values.dtype)
            rows = self.row_of[here]
            if ends is None:
                self.values.index_add_(0, rows, sums)
            else:
                slots = self.values.unflatten(1, (-1, slot_size))
                index = rows[:, None], ends[here // self.block.experts]
                slots.index_put_(index, sums.unflatten(1, (-1, slot_size)), accumulate=True)

    def contract(self, cotangents: Tensor, windows: int) -> Tensor:
        """sum_b g_b P_b of every expert, [E columns, rows].

        Args:
            cotangents: [A, B, S], of the state as it was 0, 1, .. windows ago.
            windows: the number up to now.
        """
        total = cotangents.new_zeros(self.block.experts, self.values.shape[2])
        rows = self.live()
        pairs = self.pair_of[rows]
        left = cotangents[windows - self.since[rows], pairs // self.block.experts]  # [R, S]
        values = self.values[: self.used]
        if len(rows) < self.used:
            left = left.new_zeros(self.used, left.shape[1]).index_copy_(0, rows, left)
            pairs = self.pair_of[: self.used].clamp(min=0)
        # all at once; some at a time in another type, of which there is never a whole copy
        count = len(values) if values.dtype == self.dtype else TILE_BYTES // self.values[0].nbytes
        parts = (part.split(max(1, count)) for part in (left, values, pairs % self.block.experts))
        for row, value, expert in zip(*parts, strict=True):
            total.index_add_(0, expert, torch.bmm(row[:, None], value.to(self.dtype))[:, 0])
        by_expert = total.unflatten(1, (self.block.rows, self.columns))
        return by_expert.transpose(1, 2).flatten(0, 1)

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, numbers, strings and lists of them."""
        block, used = self.block, slice(self.used)
        return {
            "rows": block.rows,
            "columns": block.columns,
            "experts": block.experts,
            "members": [[m.name, m.start, m.width, m.transposed] for m in block.members],
            "values": self.values[used].clone(),
            "pair_of": self.pair_of[used].clone(),
            "since": self.since[used].clone(),
        }

    @staticmethod
    def restored(
        state: dict[str, Any],
        batch_size: int,
        state_size: int,
        shapes: Mapping[str, torch.Size],
        like: Tensor,
        storage: torch.dtype | None = None,
    ) -> ExpertPool:
        """The pool that ``state_dict`` was of; values of another type are converted.

        Raises:
            ValueError: if it is of another cell, or another batch.
        """
        members = tuple(Member(*member) for member in state["members"])
        for member in members:
            name, numbers = member.name, state["experts"] * state["rows"] * member.width
            if name not in shapes:
                raise ValueError(f"the saved influence covers {name!r}, which this cell does not have")
            if shapes[name].numel() != numbers:
                raise ValueError(
                    f"the saved influence of {name} is of {numbers} numbers, this cell's has {shapes[name].numel()}: "
                    "resume with the model it was saved with"
                )
        pool = ExpertPool(
            Block(state["rows"], state["columns"], members, state["experts"]), batch_size, state_size, like, storage
        )
        values, used = state["values"], len(state["values"])
        if values.shape[1:] != pool.values.shape[1:] or used > len(pool.values):
            raise ValueError(
                f"the saved influence of {members[0].name} is [{used}, {', '.join(map(str, values.shape[1:]))}], this "
                f"run needs {list(pool.values.shape[1:])} each: resume with the model it was saved with"
            )
        pool.used = used
        pool.values[:used] = values
        pool.pair_of[:used], pool.since[:used] = state["pair_of"], state["since"]
        rows = pool.live()
        pool.row_of[pool.pair_of[rows]] = rows
        return pool

    @property
    def nbytes(self) -> int:
        """Up to the last row taken."""
        return self.values[: self.used].nbytes
