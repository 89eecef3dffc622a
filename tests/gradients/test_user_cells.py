"""RTRL is exact for the cells that users bring, whatever they do with their parameters."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from rtrl_moe_pl.gradients import BPTT, RTRL, TBPTT, parameter_paths
from tests.gradients.problem import assert_exact, make_problem, total_error, weighted_squares
from tests.gradients.user_cells.cases import CASES, Case, data

STEPS = 9


@contextmanager
def fallback(expected: bool) -> Iterator[None]:
    """Fail unless the slowest path was announced exactly where it is expected."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    messages = [str(w.message) for w in caught if "exact but slow" in str(w.message)]
    assert bool(messages) == expected, messages


def problem_of(case: Case, batch: int):
    cell = case.make().double()
    starts = torch.zeros(batch, STEPS, dtype=torch.bool)
    starts[-1, 4] = True  # one lane, inside a window of 3
    weights = torch.ones(batch, STEPS, dtype=torch.float64)
    weights[:, :5] = 0.0  # whole windows without a loss
    return make_problem(cell, inputs=data(case, batch, STEPS), starts=starts, weights=weights)


@pytest.mark.parametrize("name", sorted(CASES))
def test_exact(name: str) -> None:
    case = CASES[name]
    for batch in case.batches:
        problem = problem_of(case, batch)
        for window in (1, 3, 4, 20):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*exact but slow")
                truth = assert_exact(problem, RTRL(window=window))
        assert_exact(problem, BPTT(), tolerance=1e-12)
        if case.remembers:
            assert total_error(problem.solve(TBPTT(window=3)).grads, truth) > 1e-4


@pytest.mark.parametrize("name", sorted(CASES))
def test_paths(name: str) -> None:
    case = CASES[name]
    problem = problem_of(case, 2)
    algorithm = RTRL(window=3)
    memory = algorithm.init(problem.cell, 2)
    assert parameter_paths(memory) == {}
    with fallback(case.warns):
        algorithm.run(
            problem.cell, problem.readout, problem.inputs, problem.targets, weighted_squares, memory, problem.starts
        )
    paths = parameter_paths(memory)
    assert paths.keys() == {n for n, p in problem.names.items() if p.requires_grad and n.startswith("cell.")}
    assert {name: paths[name] for name in case.paths} == case.paths
    assert case.warns or "window" not in paths.values()
