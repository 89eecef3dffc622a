"""Faults of an earlier implementation, put back one at a time: each must make the comparison with BPTT fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rtrl_moe_pl.cells import GRU, LSTM, Stack
from rtrl_moe_pl.gradients import BPTT, RTRL, audit_gradient
from rtrl_moe_pl.linearization import Tail, WindowLinearization, linearizer
from rtrl_moe_pl.sensitivities import DenseSensitivity, Sensitivity
from tests.gradients.problem import Problem, make_problem, plain_autograd, total_error, weighted_squares, worst_error

SIZES = (4, 6)  # of the two layers' states


class Mended(DenseSensitivity):
    """The accesses one after another, as the faults below change them."""

    def contract_and_advance(self, linearization: WindowLinearization) -> dict[str, Tensor]:
        return Sensitivity.contract_and_advance(self, linearization)

    def advance(self, linearization: WindowLinearization) -> None:
        DenseSensitivity.contract_and_advance(self, linearization)


class AdvanceFirst(Mended):
    """The loss is contracted with the influence at the window's end, which holds the window itself already."""

    def contract_and_advance(self, linearization: WindowLinearization) -> dict[str, Tensor]:
        self.advance(linearization)
        return self.contract(linearization.cotangent, linearization.terms)


class MeanOverLanes(Mended):
    """The influence is averaged over the batch, where the loss has been summed."""

    def vjp(self, cotangent: Tensor) -> dict[str, Tensor]:
        return {name: part / len(cotangent) for name, part in super().vjp(cotangent).items()}


class SharedByLanes(Mended):
    """One influence matrix for all lanes: their mean."""

    def vjp(self, cotangent: Tensor) -> dict[str, Tensor]:
        dense = self.to_dense()
        return {name: torch.einsum("bs,s...->...", cotangent, p.mean(0)) for name, p in dense.items()}


class IdleWithoutLoss(Mended):
    """Windows without a loss are skipped: their zero cotangent is taken for nothing to do."""

    def advance(self, linearization: WindowLinearization) -> None:
        if any(bool(g.any()) for g in linearization.gradient().values()):
            super().advance(linearization)


class LayerLocal(Mended):
    """Every layer carries its own influence only: credit across layers stops at the window."""

    def advance(self, linearization: WindowLinearization) -> None:
        mask = torch.block_diag(*[torch.ones(n, n, dtype=torch.float64) for n in SIZES])
        super().advance(replace(linearization, transition=linearization.transition * mask))


class Held(Mended):
    """The influence is never written."""

    def advance(self, linearization: WindowLinearization) -> None:
        return None


def algorithm_with(kind: type[DenseSensitivity], window: int) -> RTRL:
    class Faulty(RTRL):
        def _sensitivity(self, cell: nn.Module, shapes: dict[str, torch.Size], state: Tensor) -> Sensitivity:
            return kind(shapes, state.shape[0], state.shape[1], state.dtype, state.device)

    return Faulty(window=window, chunk=window)


@pytest.fixture
def problem() -> Problem:
    torch.manual_seed(1)
    cell = Stack([GRU(3, 4, learned_initial_state=True), LSTM(4, 3)]).double()
    weights = torch.zeros(3, 10, dtype=torch.float64)
    weights[:, [2, 8, 9]] = 1.0  # the second of three windows has no loss
    starts = torch.zeros(3, 10, dtype=torch.bool)
    starts[1, 4] = True
    return make_problem(cell, batch=3, steps=10, weights=weights, starts=starts)


FAULTS: dict[str, type[DenseSensitivity]] = {
    "contracts after advancing": AdvanceFirst,
    "averages the contraction": MeanOverLanes,
    "shares one matrix": SharedByLanes,
    "idle without a loss": IdleWithoutLoss,
    "layer-local": LayerLocal,
    "never written": Held,
}


@pytest.mark.parametrize("window", [1, 3])
def test_nothing_put_back(problem: Problem, window: int) -> None:
    """The frame that the faults are built on is exact."""
    _, _, truth = plain_autograd(problem)
    assert worst_error(problem.solve(algorithm_with(Mended, window)).grads, truth) <= 1e-9


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_fault_is_noticed(problem: Problem, fault: str, window: int) -> None:
    _, _, truth = plain_autograd(problem)
    assert total_error(problem.solve(algorithm_with(FAULTS[fault], window)).grads, truth) > 1e-3


def _without_starts(sweep: Callable[..., Any]) -> Callable[..., Any]:
    """The reverse sweep over steps at which no lane ever starts."""

    def faulty(tail: Tail, *rest: Any, **more: Any) -> Any:
        starts = tail.starts
        tail.starts = [None] * len(starts)
        try:
            return sweep(tail, *rest, **more)
        finally:
            tail.starts = starts

    return faulty


def _late_starts(sweep: Callable[..., Any]) -> Callable[..., Any]:
    """A reset at the end of the window that holds the start, as if starts came between windows only."""

    def faulty(tail: Tail, *rest: Any, **more: Any) -> Any:
        result = _without_starts(sweep)(tail, *rest, **more)
        for here in tail.starts:
            if here is not None:
                result.start[here] = 0.0
        return result

    return faulty


@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("fault", [_without_starts, _late_starts])
def test_missing_reset_is_noticed(
    problem: Problem, window: int, chunk: int | None, fault: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, truth = plain_autograd(problem)
    for name in ("loss_sweep", "state_sweep"):
        monkeypatch.setattr(linearizer, name, fault(getattr(linearizer, name)))
    assert total_error(problem.solve(RTRL(window=window, chunk=chunk)).grads, truth) > 1e-3


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_one_window_is_blind(problem: Problem, fault: str) -> None:
    """Why no test here uses a chunk as long as the sequence: none of these faults shows in it."""
    problem.starts = None
    _, _, truth = plain_autograd(problem)
    assert worst_error(problem.solve(algorithm_with(FAULTS[fault], 10)).grads, truth) <= 1e-9


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_audit_notices(problem: Problem, fault: str) -> None:
    """The audit that users run fails for each of them, and passes without."""
    data = problem.cell, problem.readout, problem.inputs, problem.targets, weighted_squares, problem.starts
    assert audit_gradient(algorithm_with(Mended, 3), *data).passed
    report = audit_gradient(algorithm_with(FAULTS[fault], 3), *data)
    assert not report.passed
    assert report.relative_error > 1e-3
    assert audit_gradient(BPTT(), *data).relative_error == 0.0
