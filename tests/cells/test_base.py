from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rtrl_moe_pl.cells import GRU, LSTM, Cell, LeakyIntegrator, SimpleRNN, VanillaRNN


@pytest.mark.parametrize("cell", [VanillaRNN, SimpleRNN, GRU, LSTM, LeakyIntegrator])
class TestSizes:
    @pytest.mark.parametrize("sizes", [{"input_size": 0, "hidden_size": 4}, {"input_size": 3, "hidden_size": -1}])
    def test_below_one(self, cell: Callable[..., Cell], sizes: dict[str, int]) -> None:
        with pytest.raises(ValueError, match=r"^(input|hidden)_size must be at least \d, got (0|-1)$"):
            cell(**sizes)

    @pytest.mark.parametrize("size", [4.0, "4", True, None])
    def test_not_an_integer(self, cell: Callable[..., Cell], size: object) -> None:
        with pytest.raises(TypeError, match=r"^hidden_size must be an integer, got "):
            cell(input_size=3, hidden_size=size)


class Lookup(Cell):
    """A cell on token ids, which have no width."""

    def __init__(self) -> None:
        super().__init__(None, 4)
        self.table = nn.Embedding(7, 4)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return torch.tanh(self.table(x) + s)


def test_a_cell_may_have_no_input_width() -> None:
    cell = Lookup()
    assert cell.input_size is None
    assert cell(torch.tensor([1, 2]), cell.initial_state(2)).shape == (2, 4)


def test_forward_is_required() -> None:
    with pytest.raises(TypeError, match="forward"):
        Cell(3, 4)  # type: ignore[abstract]


def test_importing_the_package_alone_imports_no_torch() -> None:
    code = "import sys, rtrl_moe_pl; assert rtrl_moe_pl.__version__; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
