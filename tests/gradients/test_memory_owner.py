"""A memory belongs to one algorithm, one cell and its parameters as they were."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from torch import nn

from rtrl_moe_pl.cells import GRU
from rtrl_moe_pl.gradients import RTRL, TBPTT, GradientAlgorithm, Memory
from tests.gradients.problem import Problem, make_problem, weighted_squares


def run(problem: Problem, algorithm: GradientAlgorithm, memory: Memory, steps: int = 9) -> None:
    targets = tuple(part[:, :steps] for part in problem.targets)
    algorithm.run(problem.cell, problem.readout, problem.inputs[:, :steps], targets, weighted_squares, memory)


def _replace(cell: Any) -> None:
    cell.recurrent.weight = nn.Parameter(cell.recurrent.weight.detach().clone())


def _freeze(cell: Any) -> None:
    cell.recurrent.weight.requires_grad_(False)


def _assign(cell: Any) -> None:
    cell.load_state_dict(copy.deepcopy(cell.state_dict()), assign=True)


@pytest.mark.parametrize("change", [_replace, _freeze, _assign])
@pytest.mark.parametrize("after", [0, 3])
def test_parameters_replaced_under_a_memory_are_refused(change: Any, after: int) -> None:
    problem = make_problem(GRU(3, 4).double())
    algorithm = RTRL(window=3)
    memory = algorithm.init(problem.cell, 2)
    if after:
        run(problem, algorithm, memory, after)
    change(problem.cell)
    with pytest.raises(ValueError, match=r"was replaced, frozen or unfrozen after this memory was made.*init again"):
        run(problem, algorithm, memory)


def test_a_parameter_unfrozen_under_a_memory_is_refused() -> None:
    problem = make_problem(GRU(3, 4).double())
    problem.cell.recurrent.weight.requires_grad_(False)
    memory = RTRL(window=3).init(problem.cell, 2)
    problem.cell.recurrent.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"cell\.recurrent\.weight was replaced, frozen or unfrozen"):
        run(problem, RTRL(window=3), memory)


def test_another_cell_is_refused() -> None:
    problem = make_problem(GRU(3, 4).double())
    memory = RTRL(window=3).init(problem.cell, 2)
    problem.cell = copy.deepcopy(problem.cell)
    with pytest.raises(ValueError, match="made for another cell"):
        run(problem, RTRL(window=3), memory)


def test_memory_of_another_algorithm_is_refused() -> None:
    problem = make_problem(GRU(3, 4).double())
    with pytest.raises(ValueError, match=r"made by another algorithm: use RTRL\(window=3\)\.init"):
        run(problem, RTRL(window=3), TBPTT(window=3).init(problem.cell, 2))
    with pytest.raises(ValueError, match=r"made by another algorithm: use TBPTT\(window=3\)\.init"):
        run(problem, TBPTT(window=3), RTRL(window=3).init(problem.cell, 2))
