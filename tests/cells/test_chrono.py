from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rtrl_moe_pl.cells import GRU, LSTM, Cell
from rtrl_moe_pl.cells.chrono import chrono_bias


def test_memories_are_uniform_between_two_steps_and_the_longest() -> None:
    memory = 1 + chrono_bias(100_000, 50).double().exp()  # steps
    assert memory.min() >= 2 - 1e-5
    assert memory.max() <= 50 + 1e-4
    assert abs(memory.mean() - 26) < 0.2  # standard error 0.044


def test_the_shortest_memory_is_two_steps() -> None:
    assert torch.equal(chrono_bias(3, 2), torch.zeros(3))


@pytest.mark.parametrize("cell", [GRU, LSTM])
@pytest.mark.parametrize(("value", "error"), [(1, ValueError), (0, ValueError), (2.5, TypeError)])
def test_bad_memory(cell: Callable[..., Cell], value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^max_memory must be (at least 2|an integer), got "):
        cell(3, 4, max_memory=value)
