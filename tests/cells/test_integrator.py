from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from rtrl_moe_pl.cells import LeakyIntegrator
from tests.cells.cell_case import CellCase, random_run, run


class TestPerfect(CellCase):
    def make(self, learned_initial_state: bool = False) -> LeakyIntegrator:
        return LeakyIntegrator(self.input_size, 5, learned_initial_state=learned_initial_state)


class TestLearned(CellCase):
    def make(self, learned_initial_state: bool = False) -> LeakyIntegrator:
        options: Any = {"decay": 0.9, "learned_decay": True, "learned_initial_state": learned_initial_state}
        return LeakyIntegrator(self.input_size, 5, **options)


def test_a_perfect_integrator_counts_exactly() -> None:
    cell = LeakyIntegrator(2, 1)
    with torch.no_grad():
        cell.input.weight.copy_(torch.tensor([[1.0, -1.0]]))
    symbols = torch.randint(2, (3, 1000))
    states = run(cell, torch.nn.functional.one_hot(symbols, 2).float(), cell.initial_state(3))
    assert torch.equal(states[..., 0], (1 - 2 * symbols).cumsum(1).float())


@pytest.mark.parametrize("learned_decay", [False, True])
def test_a_leaky_one_weighs_the_past_geometrically(learned_decay: bool) -> None:
    cell = LeakyIntegrator(3, 5, decay=0.8, learned_decay=learned_decay).double()
    inputs, state = random_run(cell, steps=7)
    weights = 0.8 ** torch.arange(6, -1, -1, dtype=torch.float64)
    expected = 0.8**7 * state + cell.input((inputs * weights[:, None]).sum(1))
    found = run(cell, inputs, state)[:, -1]
    assert_close(found, expected, rtol=1e-6, atol=1e-7)  # the logit was rounded to float32 before .double()
    assert (found - state - cell.input(inputs.sum(1))).abs().max() > 0.1  # no leak must not pass


def test_bad_decay() -> None:
    for decay in (0.0, -0.5, 1.01, float("nan")):
        with pytest.raises(ValueError, match=r"^decay must be above 0 and at most 1, got "):
            LeakyIntegrator(3, 5, decay=decay)
    with pytest.raises(ValueError, match=r"^a learned decay must begin below 1, got 1: "):
        LeakyIntegrator(3, 5, learned_decay=True)
