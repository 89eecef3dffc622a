"""RTRL with its influence kept in bfloat16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rtrl_moe_pl.cells import GRU, RecurrentMoE
from rtrl_moe_pl.gradients import RTRL, TBPTT, BlockRTRL, LazyExpertRTRL, audit_gradient
from tests.gradients.problem import make_problem, plain_autograd, total_error, weighted_squares

CASES: list[tuple[Any, type[RTRL]]] = [
    (lambda: GRU(3, 5), RTRL),
    (lambda: RecurrentMoE(3, 3, 3, 4), RTRL),
    (lambda: RecurrentMoE(3, 3, 3, 4), BlockRTRL),
    (lambda: RecurrentMoE(3, 3, 3, 4), LazyExpertRTRL),
]


def cosine(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    a, b = (torch.cat([grads[name].flatten() for name in truth]) for grads in (found, truth))
    return float(a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize(("cell", "kind"), CASES, ids=lambda value: getattr(value, "__name__", ""))
def test_the_gradient_is_nearly_that_of_bptt(cell: Any, kind: type[RTRL]) -> None:
    weights = torch.zeros(2, 24, dtype=torch.float64)
    weights[:, -2:] = 1  # nearly all of the gradient comes through P
    problem = make_problem(cell().double(), steps=24, weights=weights)
    truth = plain_autograd(problem)[2]
    found = problem.solve(kind(window=2, chunk=2, influence_dtype="bfloat16")).grads
    assert 1e-5 < total_error(found, truth) < 2e-2
    assert cosine(found, truth) > 0.9998
    assert total_error(problem.solve(kind(window=2, chunk=2)).grads, truth) < 1e-9
    assert cosine(problem.solve(TBPTT(window=2)).grads, truth) < 0.9995


def test_it_says_that_it_is_approximate() -> None:
    algorithm = RTRL(window=4, chunk=4, influence_dtype="bfloat16")
    assert repr(algorithm) == "RTRL(window=4, chunk=4, influence_dtype='bfloat16')"
    assert "influence_dtype='bfloat16'" in repr(LazyExpertRTRL(window=4, influence_dtype="bfloat16"))
    assert not algorithm.exact
    problem = make_problem(GRU(3, 4).double(), steps=12)
    given = problem.cell, problem.readout, problem.inputs, problem.targets, weighted_squares
    report = audit_gradient(algorithm, *given)
    assert not report.exact
    assert report.passed
    assert 1e-9 < report.relative_error < 1e-2
    assert audit_gradient(RTRL(window=4, chunk=4), *given).exact


@pytest.mark.parametrize(("cell", "kind"), CASES, ids=lambda value: getattr(value, "__name__", ""))
def test_the_forecast_counts_half_the_bytes(cell: Any, kind: type[RTRL]) -> None:
    exact, rounded = (
        kind(window=4, influence_dtype=dtype).forecast(cell(), 2, torch.float32, 8) for dtype in (None, "bfloat16")
    )
    ring = kind(window=4)._ring_bytes(2, 9, torch.float32) if issubclass(kind, LazyExpertRTRL) else 0  # type: ignore[attr-defined]
    assert 2 * (rounded.influence_bytes - ring) == exact.influence_bytes - ring
    assert rounded.workspace_bytes == exact.workspace_bytes


def test_a_forecast_is_what_is_held() -> None:
    cell, algorithm = GRU(3, 5), RTRL(window=2, chunk=2, influence_dtype="bfloat16")
    problem = make_problem(cell.double())
    cell.float()
    memory = algorithm.init(cell, 2)
    inputs, targets = problem.inputs.float(), tuple(target.float() for target in problem.targets)
    memory = algorithm.run(cell, problem.readout.float(), inputs, targets, weighted_squares, memory).memory
    assert memory.base.nbytes == algorithm.forecast(cell, 2, torch.float32, 2).influence_bytes


def test_another_type_is_refused() -> None:
    with pytest.raises(ValueError, match=r"influence_dtype must be 'bfloat16', or None .*, got 'float16'"):
        RTRL(window=4, influence_dtype="float16")  # type: ignore[arg-type]
