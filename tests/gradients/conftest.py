"""Problems of routed cells that several files solve."""

from __future__ import annotations

import pytest
import torch

from rtrl_moe_pl.cells import RecurrentMoE
from tests.gradients.problem import Problem, make_problem


@pytest.fixture
def idle() -> Problem:
    """Twelve experts of which one is used at a time: most are idle for longer than a small ring; starts in between."""
    torch.manual_seed(0)
    cell = RecurrentMoE(2, 2, num_slots=6, num_experts=12, write_slots=1, active_experts=1).double()
    starts = torch.zeros(3, 40, dtype=torch.bool)
    starts[1, [9, 23]] = True
    return make_problem(cell, batch=3, steps=40, width=2, starts=starts)
