"""The influence of stacked experts, left where it was while they are idle."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rtrl_moe_pl.linearization import Block, ExpertTerm, WindowLinearization
from rtrl_moe_pl.linearization.window import add_parts
from rtrl_moe_pl.sensitivities.base import Sensitivity
from rtrl_moe_pl.sensitivities.block_sparse import BlockSparseSensitivity
from rtrl_moe_pl.sensitivities.expert_pool import ExpertPool
from rtrl_moe_pl.sensitivities.segment_tree import CircularSegmentTree


class LazyExpertSensitivity(Sensitivity):
    """P of a routed cell; that of an expert idle in a lane stays as it was, and the J's since then are kept.

    With P_e as it was c windows ago, what a cotangent g of the present state contributes is (g J .. J) P_e: the
    vector is pulled back, S^2 a window, and the matrix left alone. It catches up, by one product with J .. J from a
    ``CircularSegmentTree``, when the expert is used again, or before the oldest J would be dropped. A pair of lane
    and expert that was never used, or not since a start, has P_e = 0 and costs nothing. Parameters other than
    experts' are kept in a ``BlockSparseSensitivity``.

    Args:
        slot_size: d; the state is [S / d, d].
        ring: windows whose J is kept; 0: every pair catches up with every window.

    Cost: of a window, S^2 |theta_e| for every pair that was used, or whose time is up; memory that of P for the pairs
        ever used, and 4 ring B S^2 at most.
    Exact: equals BPTT while parameters are fixed.
    """

    exact = True

    def __init__(self, *args: Any, slot_size: int, ring: int) -> None:
        super().__init__(*args)
        self.ring, self.slot_size = ring, slot_size
        self._shared = BlockSparseSensitivity(*args, slot_size=slot_size)
        self.pools: dict[Block, ExpertPool] = {}
        eye = torch.eye(self.state_size, dtype=self.dtype, device=self.device)
        self._pending = CircularSegmentTree(max(ring, 1), torch.matmul, eye)
        self.windows = 0  # that P was advanced over

    # ---- reading

    def vjp(self, cotangent: Tensor) -> dict[str, Tensor]:
        gradients = self._shared.vjp(cotangent)
        ages = [pool.oldest(self.windows) for pool in self.pools.values()]
        back = [cotangent]  # as of 0, 1, .. windows ago, [B, S] each
        for age in range(1, max(ages, default=0) + 1):
            jacobian = self._pending.query(len(self._pending) - age, len(self._pending) - age + 1)
            back.append(torch.bmm(back[-1][:, None], jacobian)[:, 0])
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
        jacobian = linearization.whole_transition(self.slot_size).transpose(1, 2)  # [B, S, S]
        emptied = ~jacobian.flatten(1).any(1)  # lanes [B] that started
        for block in experts.keys() - self.pools.keys():
            self.pools[block] = ExpertPool(block, self.batch_size, self.state_size, jacobian)
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
            pool.values[here] = values
        pool.since[rows] = self.windows + (jacobian is not None)

    def _caught_up(
        self, pool: ExpertPool, rows: Tensor, jacobian: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """What these rows are now, or at the end of the window of that J: some rows at a time, and their values."""
        if not len(rows):
            return
        since, which = torch.unique(pool.since[rows], return_inverse=True)
        kept = len(self._pending)
        products = self._pending.query((kept - self.windows + since).expand(self.batch_size, -1), kept)  # [B, D, S, S]
        if jacobian is not None:
            products = jacobian[:, None] @ products
        yield from pool.multiplied(rows, products, which)

    # ---- looking at it, saving it: everything stays as it is, behind or not

    def to_dense(self) -> dict[str, Tensor]:
        dense = self._shared.to_dense()
        for block, pool in self.pools.items():
            shape = self.batch_size, block.experts, self.state_size, block.rows, pool.columns
            whole = pool.values.new_zeros(shape).flatten(0, 1)
            for rows, values in self._caught_up(pool, pool.live()):
                whole[pool.pair_of[rows]] = values.unflatten(2, shape[3:])
            parts = whole.unflatten(0, shape[:2]).permute(0, 2, 1, 4, 3).flatten(2, 3)
            add_parts(block.split(parts, self.shapes), dense)
        return dense

    def norm(self) -> Tensor:
        norms = [self._shared.norm()]
        for pool in self.pools.values():
            norms += [torch.linalg.vector_norm(values) for _, values in self._caught_up(pool, pool.live())]
        return torch.stack(norms).norm()

    def zero_(self) -> None:
        self._shared.zero_()
        for pool in self.pools.values():
            pool.drop(torch.ones(self.batch_size, dtype=torch.bool, device=self.device))
        self._pending.reset()
        self.windows = 0

    @property
    def nbytes(self) -> int:
        return self._shared.nbytes + self._pending.nbytes + sum(pool.nbytes for pool in self.pools.values())

    def state_dict(self) -> dict[str, Any]:
        """A run that goes on from it gives the same numbers, bit for bit."""
        return {
            "shared": self._shared.state_dict(),
            "pools": [pool.state_dict() for pool in self.pools.values()],
            "pending": self._pending.state_dict(),
            "windows": self.windows,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "pools" not in state:
            super().load_state_dict(state)
            raise ValueError(
                "the saved influence is not one of lazy experts: resume with the algorithm it was saved with"
            )
        pools = [
            ExpertPool.restored(saved, self.batch_size, self.state_size, self.shapes, self._pending.identity)
            for saved in state["pools"]
        ]
        self._pending.load_state_dict(state["pending"])
        self._shared.load_state_dict(state["shared"])
        self.pools = {pool.block: pool for pool in pools}
        self.windows = state["windows"]
