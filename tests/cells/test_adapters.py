from __future__ import annotations

import pytest
import torch
from torch import nn

from rtrl_moe_pl.cells import TorchCell
from tests.cells.cell_case import CellCase, random_run


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
class TorchCellCase(CellCase):
    module: type[nn.RNNCell] | type[nn.GRUCell] | type[nn.LSTMCell]

    def make(self, learned_initial_state: bool = False) -> TorchCell:
        return TorchCell(self.module(self.input_size, 5), learned_initial_state=learned_initial_state)

    def test_equals_the_module(self, cell: TorchCell) -> None:
        inputs, state = random_run(cell)
        is_lstm = cell.state_size == 10
        expected = tuple(state.chunk(2, -1)) if is_lstm else state
        for x in inputs.unbind(1):
            state, expected = cell(x, state), cell.cell(x, expected)
            # the halves of an LSTM's flat state are strided: a product may sum them in another order
            whole = torch.cat(expected, -1) if is_lstm else expected
            torch.testing.assert_close(state, whole, rtol=1e-14, atol=1e-15)
            torch.testing.assert_close(cell.output(state), expected[0] if is_lstm else expected, rtol=1e-14, atol=1e-15)

    def test_keeps_the_module(self) -> None:
        module = self.module(3, 5)
        assert TorchCell(module).cell is module


class TestRNNCell(TorchCellCase):
    module = nn.RNNCell


class TestGRUCell(TorchCellCase):
    module = nn.GRUCell


class TestLSTMCell(TorchCellCase):
    module = nn.LSTMCell

    def test_vmap_over_rows(self, cell: TorchCell) -> None:
        with pytest.raises(RuntimeError, match=r"Batching rule not implemented for aten::lstm_cell"):
            super().test_vmap_over_rows(cell)


@pytest.mark.parametrize("module", [nn.Linear(3, 5), nn.LSTM(3, 5)])
def test_other_modules_are_refused(module: nn.Module) -> None:
    with pytest.raises(TypeError, match=r"^TorchCell wraps a torch.nn RNNCell, GRUCell or LSTMCell, got "):
        TorchCell(module)  # type: ignore[arg-type]
