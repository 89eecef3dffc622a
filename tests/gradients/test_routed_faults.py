"""Faults of an earlier sparse implementation, put back one at a time into block and lazy RTRL: each must show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rtrl_moe_pl.cells import RecurrentMoE
from rtrl_moe_pl.gradients import BlockRTRL, LazyExpertRTRL
from rtrl_moe_pl.linearization import WindowLinearization
from rtrl_moe_pl.linearization.routed_backward import RoutedBackward
from rtrl_moe_pl.sensitivities import (
    BlockSparseSensitivity,
    CircularSegmentTree,
    LazyExpertSensitivity,
    lazy_experts,
)
from rtrl_moe_pl.sensitivities.expert_pool import ExpertPool
from tests.gradients.problem import Problem, make_problem, plain_autograd, total_error, worst_error

Patch = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture
def problem() -> Problem:
    """Many experts of which few are used, slots of which few are written, losses with windows between them, starts."""
    torch.manual_seed(3)
    cell = RecurrentMoE(3, 3, num_slots=6, num_experts=10, read_slots=2, write_slots=1, active_experts=1).double()
    weights = torch.zeros(3, 40, dtype=torch.float64)
    weights[:, 7::8] = 1.0
    starts = torch.zeros(3, 40, dtype=torch.bool)
    starts[1, 11] = True
    return make_problem(cell, batch=3, steps=40, weights=weights, starts=starts)


def contracts_after_advancing(patch: pytest.MonkeyPatch) -> None:
    """P at the window's end, where the direct part of the gradient holds the window already."""

    def faulty(self: Any, linearization: WindowLinearization) -> Any:
        self.advance(linearization)
        return self.contract(linearization.cotangent, linearization.terms)

    for kind in (BlockSparseSensitivity, LazyExpertSensitivity):
        patch.setattr(kind, "contract_and_advance", faulty)


def averages_over_lanes(patch: pytest.MonkeyPatch) -> None:
    for kind in (BlockSparseSensitivity, LazyExpertSensitivity):

        def faulty(self: Any, cotangent: Tensor, right: Any = kind.vjp) -> Any:
            return right(self, cotangent / self.batch_size)

        patch.setattr(kind, "vjp", faulty)


def forgets_old_content(patch: pytest.MonkeyPatch) -> None:
    """The columns of J are those of the read slots alone, without the written slots' own old values."""
    right = RoutedBackward._extend

    def faulty(self: Any, jacobians: Tensor, routing: Any, like: Tensor) -> None:
        written = jacobians.shape[2]
        jacobians = jacobians.clone()
        jacobians[..., -written:] = 0.0
        right(self, jacobians, routing, like)

    patch.setattr(RoutedBackward, "_extend", faulty)


def drops_identity_rows(patch: pytest.MonkeyPatch) -> None:
    """A slot that was not written is taken to have forgotten everything."""
    right = WindowLinearization.whole_transition

    def faulty(self: WindowLinearization, slot_size: int) -> Tensor:
        if self.ends is None:
            return right(self, slot_size)
        return right(replace(self, transition=self.transition), slot_size) - right(
            replace(self, transition=torch.zeros_like(self.transition)), slot_size
        )

    patch.setattr(WindowLinearization, "whole_transition", faulty)


def leaves_idle_experts_stale(patch: pytest.MonkeyPatch) -> None:
    """The present cotangent meets the P of an expert as it was when it fell idle."""
    right = ExpertPool.contract

    def faulty(self: ExpertPool, cotangents: Tensor, windows: int) -> Tensor:
        return right(self, cotangents[:1].expand_as(cotangents), windows)

    patch.setattr(ExpertPool, "contract", faulty)


def never_flushes(patch: pytest.MonkeyPatch) -> None:
    """What is older than the ring is taken to be as old as the ring."""
    right = ExpertPool.due

    def faulty(self: ExpertPool, used: Any, expired: int) -> Tensor:
        due = right(self, used, -1)
        self.since.clamp_(min=expired + 1)
        return due

    patch.setattr(ExpertPool, "due", faulty)


def wraps_in_reverse(patch: pytest.MonkeyPatch) -> None:
    """The part of a range beyond the wrap is taken to be the earlier one."""
    right = CircularSegmentTree._pieces
    patch.setattr(CircularSegmentTree, "_pieces", lambda self, *range: right(self, *range)[::-1])


def walks_in_reverse(patch: pytest.MonkeyPatch) -> None:
    """The oldest J is multiplied from the left."""
    right = lazy_experts.torch.bmm
    products = LazyExpertSensitivity._products

    def faulty(self: LazyExpertSensitivity, *arguments: Any) -> Tensor:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(lazy_experts.torch, "bmm", lambda a, b: right(b, a))
            return products(self, *arguments)

    patch.setattr(LazyExpertSensitivity, "_products", faulty)


def never_resets(patch: pytest.MonkeyPatch) -> None:
    """A start does not reach the P of experts: not in the J's that are kept, and not in P."""
    patch.setattr(ExpertPool, "drop", lambda self, lanes: None)
    right = WindowLinearization.whole_transition

    def faulty(self: WindowLinearization, slot_size: int) -> Tensor:
        whole = right(self, slot_size).clone()
        whole[~whole.flatten(1).any(1)] = torch.eye(whole.shape[1], dtype=whole.dtype)
        return whole

    patch.setattr(WindowLinearization, "whole_transition", faulty)


FAULTS_OF_BOTH: dict[str, Patch] = {
    "contracts after advancing": contracts_after_advancing,
    "averages over lanes": averages_over_lanes,
    "forgets the written slots' old content": forgets_old_content,
}
FAULTS: dict[str, Patch] = FAULTS_OF_BOTH | {
    "drops identity rows": drops_identity_rows,
    "leaves idle experts stale": leaves_idle_experts_stale,
    "never flushes": never_flushes,
    "wraps in reverse": wraps_in_reverse,
    "walks in reverse": walks_in_reverse,
    "never resets": never_resets,
}


@pytest.mark.parametrize("window", [1, 2])
def test_nothing_put_back(problem: Problem, window: int) -> None:
    _, _, truth = plain_autograd(problem)
    lazy = [LazyExpertRTRL(window, 3, window, catch_up) for catch_up in ("walk", "tree")]
    for algorithm in (BlockRTRL(window, window), *lazy):
        assert worst_error(problem.solve(algorithm).grads, truth) <= 1e-9


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_fault_in_lazy_experts(problem: Problem, fault: str, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, truth = plain_autograd(problem)
    FAULTS[fault](monkeypatch)
    catch_up = "tree" if fault == "wraps in reverse" else "walk"
    algorithm = LazyExpertRTRL(window, 3, window, catch_up)
    assert total_error(problem.solve(algorithm).grads, truth) > 1e-7


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("fault", sorted(FAULTS_OF_BOTH))
def test_fault_in_blocks(problem: Problem, fault: str, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, truth = plain_autograd(problem)
    FAULTS[fault](monkeypatch)
    assert total_error(problem.solve(BlockRTRL(window, chunk=window)).grads, truth) > 1e-7
