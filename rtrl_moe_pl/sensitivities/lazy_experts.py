"""The influence of stacked experts, left where it was while they are idle."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rtrl_moe_pl.linearization import Block, ExpertTerm, WindowLinearization
from rtrl_moe_pl.linearization.window import add_parts, copy_flushed
from rtrl_moe_pl.sensitivities.base import Sensitivity
from rtrl_moe_pl.sensitivities.block_sparse import BlockSparseSensitivity
from rtrl_moe_pl.sensitivities.expert_pool import ExpertPool
from rtrl_moe_pl.sensitivities.segment_tree import CircularSegmentTree


class LazyExpertSensitivity(Sensitivity):
    """P of a routed cell; that of an expert idle in a lane stays as it was, and the J's since then are kept.

    With P_e as it was c windows ago, what a cotangent g of the present state contributes is (g J .. J) P_e: the
    vector is pulled back, S^2 a window, and the matrix left alone. It catches up, by one product with J .. J, when
    the expert is used again, or before the oldest J would be dropped. A pair of lane and expert that was never used,
    or not since a start, has P_e = 0 and costs nothing (on a GPU: no time). Parameters other than experts' are kept in
    a ``BlockSparseSensitivity``.

    Args:
        slot_size: d; the state is [S / d, d].
        storage: type that P is kept in, by default ``dtype``; what is kept of J is in ``dtype``.
        ring: windows whose J is kept; 0: every pair catches up with every window.
        tree: the products J .. J come from a ``CircularSegmentTree``, and not from a walk back through the J's, which
            finds all of them on its way.

    Cost: of a window and lane, S^2 |theta_e| for every pair that was used, or whose time is up, and for their products
        S^3 a J of the longest (tree: about 2 log ring each, and log ring a window); S^2 a J to contract. Memory that of
        P for the pairs ever used (on a GPU: for all), and ring B S^2 (tree: 2 to 4 times that).
    Exact: equals BPTT while parameters are fixed; but for rounding where ``storage`` is narrower than ``dtype``.
    """

    exact = True
    algorithm = "LazyExpertRTRL"

    def __init__(
        self, *args: Any, slot_size: int, ring: int, tree: bool = False, storage: torch.dtype | None = None
    ) -> None:
        super().__init__(*args)
        self.ring, self.slot_size, self.tree = ring, slot_size, tree
        self._shared = BlockSparseSensitivity(*args, slot_size=slot_size, storage=storage)
        self.storage, self.exact = self._shared.storage, self._shared.exact
        self.pools: dict[Block, ExpertPool] = {}
        self._eye = torch.eye(self.state_size, dtype=self.dtype, device=self.device)
        self._pending = self._kept({}, ring)  # J's [B, S, S], the oldest first
        self.windows = 0  # that P was advanced over

    # ---- reading

    def vjp(self, cotangent: Tensor) -> dict[str, Tensor]:
        gradients = self._shared.vjp(cotangent)
        ages = [pool.oldest(self.windows) for pool in self.pools.values()]
        back = [cotangent]  # as of 0, 1, .. windows ago, [B, S] each
        for age in range(1, max(ages, default=0) + 1):
            back.append(torch.bmm(back[-1][:, None], self._pending[len(self._pending) - age])[:, 0])
        for block, pool in self.pools.items():
            total = pool.contract(torch.stack(back), self.windows)
            add_parts(block.split(total, self.shapes), gradients)
        return gradients

    # ---- writing

    def advance(self, linearization: WindowLinearization) -> None:
        """Carry P over one window, P <- J P + M, where it must be.

        Raises:
            ValueError: if the batch size differs.
        """
        experts = {
            block: [term for term in terms if isinstance(term, ExpertTerm)]
            for block, terms in linearization.terms.items()
            if terms and all(isinstance(term, ExpertTerm) for term in terms)
        }
        shared = {block: terms for block, terms in linearization.terms.items() if block not in experts}
        self._shared.advance(replace(linearization, terms=shared))
        jacobian = linearization.whole_transition(self.slot_size).transpose(1, 2).contiguous()  # [B, S, S]
        emptied = ~jacobian.flatten(1).any(1)  # lanes [B] that started
        for block in [name for name in experts if name not in self.pools]:  # in one order in every process
            self.pools[block] = ExpertPool(block, self.batch_size, self.state_size, jacobian, self.storage)
        for block, pool in self.pools.items():
            pool.drop(emptied)
            terms = experts.get(block, [])
            due = pool.due([term.uses.pairs for term in terms], self.windows - self.ring)
            self._catch_up(pool, due, jacobian)
            for term in terms:
                pool.add(term, linearization.ends, self.slot_size, self.windows + 1)
        self._pending.append(jacobian)
        self.windows += 1

    def _catch_up(self, pool: ExpertPool, rows: Tensor, jacobian: Tensor | None = None) -> None:
        """Bring these rows up to now, or to the end of the window of that J."""
        for here, values in self._caught_up(pool, rows, jacobian):
            pool.values[here] = values.to(self.storage)
        pool.since[rows] = self.windows + (jacobian is not None)

    def _caught_up(
        self, pool: ExpertPool, rows: Tensor, jacobian: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """What these rows are now, or at the end of the window of that J: some rows at a time, and their values."""
        if not len(rows):
            return
        ages, which = torch.unique(self.windows - pool.since[rows], return_inverse=True)
        yield from pool.multiplied(rows, self._products(ages, jacobian), which)

    def _products(self, ages: Tensor, latest: Tensor | None) -> Tensor:
        """The J's of the last windows, multiplied; with one more in front if there is a latest.

        Args:
            ages: numbers of windows [D], increasing.

        Returns:
            [B, D, S, S].
        """
        kept = len(self._pending)
        if kept and isinstance(self._pending, CircularSegmentTree):
            products = self._pending.query((kept - ages).expand(self.batch_size, -1), kept)
            return products if latest is None else latest[:, None] @ products
        product = self._eye.expand(self.batch_size, -1, -1) if latest is None else latest
        found, age = [], 0
        for wanted in ages.tolist():
            while age < wanted:
                age += 1
                product = torch.bmm(product, self._pending[kept - age])
                copy_flushed(product, product)
            found.append(product)
        return torch.stack(found, 1)

    # ---- looking at it, saving it: everything stays as it is, behind or not

    def to_dense(self) -> dict[str, Tensor]:
        dense = self._shared.to_dense()
        for block, pool in self.pools.items():
            shape = self.batch_size, block.experts, self.state_size, block.rows, pool.columns
            whole = self._eye.new_zeros(shape).flatten(0, 1)
            for rows, values in self._caught_up(pool, pool.live()):
                whole[pool.pair_of[rows]] = values.unflatten(2, shape[3:])
            parts = whole.unflatten(0, shape[:2]).permute(0, 2, 1, 4, 3).flatten(2, 3)
            add_parts(block.split(parts, self.shapes), dense)
        return dense

    def norm(self) -> Tensor:
        names = [member.name for block in self.pools for member in block.members]
        if len(set(names)) < len(names):  # a bank in two blocks: what they hold of it is added first
            return torch.stack([part.norm() for part in self.to_dense().values()]).norm()
        norms = [self._shared.norm()]
        for pool in self.pools.values():
            norms += [torch.linalg.vector_norm(values) for _, values in self._caught_up(pool, pool.live())]
        return torch.stack(norms).norm()

    def zero_(self) -> None:
        self._shared.zero_()
        for pool in self.pools.values():
            pool.drop(torch.ones(self.batch_size, dtype=torch.bool, device=self.device))
        self._pending = self._kept({}, self.ring)
        self.windows = 0

    def scale_(self, factor: float) -> None:
        self._shared.scale_(factor)
        for pool in self.pools.values():  # linear: those that are behind too, whose J's stay as they are
            pool.values[: pool.used].mul_(factor)

    @property
    def nbytes(self) -> int:
        kept = [self._pending] if isinstance(self._pending, CircularSegmentTree) else self._pending
        return sum(part.nbytes for part in (self._shared, *kept, *self.pools.values()))

    def state_dict(self) -> dict[str, Any]:
        """A run that goes on from it gives the same numbers, bit for bit."""
        if isinstance(self._pending, CircularSegmentTree):
            pending = self._pending.state_dict()
        else:
            pending = {"items": torch.stack(list(self._pending))} if self._pending else {}
        return {
            "shared": self._shared.state_dict(),
            "pools": [pool.state_dict() for pool in self.pools.values()],
            "pending": pending,
            "windows": self.windows,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave; that of another ring too: what a smaller one drops is caught up with."""
        if "pools" not in state:
            super().load_state_dict(state)
            raise ValueError(
                "the saved influence is not one of lazy experts: resume with the algorithm it was saved with"
            )
        pools = [
            ExpertPool.restored(saved, self.batch_size, self.state_size, self.shapes, self._eye, self.storage)
            for saved in state["pools"]
        ]
        self._shared.load_state_dict(state["shared"])
        self.pools = {pool.block: pool for pool in pools}
        self.windows = state["windows"]
        saved = state["pending"]
        self._pending = self._kept(saved, max(self.ring, len(saved.get("items", ()))))  # all, until all are up to date
        for pool in pools:
            self._catch_up(pool, pool.due([], self.windows - self.ring - 1))
        self._pending = self._kept(saved, self.ring)

    def _kept(self, saved: dict[str, Any], ring: int) -> deque[Tensor] | CircularSegmentTree:
        """The newest of what was saved, at most ``ring``."""
        if self.tree:
            tree = CircularSegmentTree(ring, torch.matmul, self._eye)
            tree.load_state_dict({"first": 0, **saved})
            return tree
        return deque((item.to(self._eye) for item in saved.get("items", ())), maxlen=ring)
