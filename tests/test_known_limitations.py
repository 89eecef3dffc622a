"""Every entry of docs/known_limitations.md, pinned: a test that fails here means that the entry can go."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rtrl_moe_pl.cells import GRU, Cell, RecurrentMoE, RoutedCell, Routing, SimpleRNN, Stack, VanillaRNN
from rtrl_moe_pl.cli import main
from rtrl_moe_pl.gradients import BPTT, RTRL, BlockRTRL, MemoryForecastError, parameter_paths, sequence_gradient
from rtrl_moe_pl.gradients import rtrl as rtrl_module
from rtrl_moe_pl.gradients.memory import Memory
from rtrl_moe_pl.reasoning import PuzzleEmbedding
from rtrl_moe_pl.tasks.puzzles import Puzzles, PuzzleShape
from tests.modules import reasoning_helpers as reasoning
from tests.modules.helpers import data, module, trainer

DOCUMENT = Path(__file__).parent.parent / "docs" / "known_limitations.md"


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return ((outputs - targets) ** 2).sum()


def one_window(cell: nn.Module, window: int = 4, windows: int = 1) -> Memory:
    """The memory after one window of random data, or more."""
    torch.manual_seed(0)
    inputs = torch.randn(2, window, 3)
    memory = RTRL(window=window).init(cell, 2)
    readout = nn.Linear(int(cell.state_size), 1)  # type: ignore[arg-type]
    for _ in range(windows):
        RTRL(window=window).step(cell, readout, inputs, inputs[:, :, :1], squared, memory)
    return memory


class Own(Cell):
    """A cell around one extra module or function."""

    def __init__(self, extra: nn.Module, size: int = 4) -> None:
        super().__init__(3, size)
        self.inner, self.extra = VanillaRNN(3, size), extra

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        return self.extra(self.inner(x, state))


class MixLanes(nn.Module):
    def forward(self, state: Tensor) -> Tensor:
        return state - state.mean(0)


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Parameter(torch.randn(4, dtype=torch.complex64))

    def forward(self, state: Tensor) -> Tensor:
        return (state * self.turn).real


class Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cube = nn.Parameter(torch.randn(4, 4, 4) / 4)

    def forward(self, state: Tensor) -> Tensor:
        return torch.einsum("ijk,bj,bk->bi", self.cube, state, state)


def test_every_entry_has_its_test() -> None:
    named = set(re.findall(r"`(test_\w+)`", DOCUMENT.read_text())) - {"test_known_limitations"}
    assert named == {n for n in globals() if n.startswith("test_")} - {"test_every_entry_has_its_test"}


def test_large_cells_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rtrl_module, "free_memory", lambda device: 6 * 10**9)
    with pytest.raises(MemoryForecastError, match=r"needs 6\.69 GB .*B=32, S=256.* 6 GB are free: lower batch_size"):
        RTRL(window=256).init(GRU(8, 256), 32)
    RTRL(window=64).init(GRU(8, 64), 8)  # the small one fits


def test_batch_norm_is_refused() -> None:
    with pytest.raises(ValueError, match=r"BatchNorm1d.*use LayerNorm"):
        RTRL(window=4).init(Own(nn.BatchNorm1d(4)), 2)


@pytest.mark.filterwarnings("ignore:.*cannot be differentiated together")
def test_coupled_lanes_are_refused() -> None:
    with pytest.raises(ValueError, match="depends on other lanes"):
        one_window(Own(MixLanes()), windows=2)


def test_complex_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="view_as_complex"):
        RTRL(window=4).init(Own(Complex()), 2)


def test_random_cells_are_slow() -> None:
    with pytest.warns(UserWarning, match="exact but slow"):
        paths = parameter_paths(one_window(Own(nn.Dropout(0.5))))
    assert set(paths.values()) == {"window"}


class PrivateNoise(nn.Module):
    """Adds noise that torch's generators know nothing of."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale, self.generator = scale, torch.Generator().manual_seed(0)

    def forward(self, state: Tensor) -> Tensor:
        return state + self.scale * torch.randn(state.shape, generator=self.generator)


def test_private_randomness_is_noticed_by_its_values() -> None:
    with pytest.warns(UserWarning, match="exact but slow"):
        assert set(parameter_paths(one_window(Own(PrivateNoise(0.1)))).values()) == {"window"}
    assert set(parameter_paths(one_window(Own(PrivateNoise(1e-9)))).values()) == {"taps"}  # below rounding


def test_layer_norm_is_not_compressed() -> None:
    dense, sparse = one_window(SimpleRNN(3, 12)), one_window(VanillaRNN(3, 12))
    assert dense.linearizer is not None
    assert sparse.linearizer is not None
    assert dense.linearizer.is_sparse is False
    assert sparse.linearizer.is_sparse is True


def test_einsum_is_functional() -> None:
    paths = parameter_paths(one_window(Own(Einsum())))
    assert paths["cell.extra.cube"] == "functional"
    assert paths["cell.inner.recurrent.weight"] == "taps"


def test_online_gradient_is_no_replay() -> None:
    torch.manual_seed(0)
    cell, readout = VanillaRNN(3, 4).double(), nn.Linear(4, 1).double()
    inputs = torch.randn(2, 8, 3, dtype=torch.float64)
    targets, algorithm = inputs[:, :, :1], RTRL(window=4)
    memory = algorithm.init(cell, 2)
    algorithm.step(cell, readout, inputs[:, :4], targets[:, :4], squared, memory)
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    online = algorithm.step(cell, readout, inputs[:, 4:], targets[:, 4:], squared, memory).grads

    def last_half(outputs: Tensor, wanted: Tensor) -> Tensor:
        return squared(outputs[:, 4:], wanted[:, 4:])

    replay = sequence_gradient(BPTT(), cell, readout, inputs, targets, last_half).grads
    name = "cell.recurrent.weight"
    assert (online[name] - replay[name]).norm() > 0.01 * replay[name].norm()


def test_16_mixed_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = DOCUMENT.parent.parent / "configs" / "anbn_rtrl.yaml"
    options = ["--trainer.precision", "16-mixed", "--trainer.default_root_dir", str(tmp_path)]
    assert main(["fit", "--config", str(config), *options]) != 0
    assert "error: " in (line := capsys.readouterr().err.strip().splitlines()[-1])
    assert "precision=16-mixed is not supported" in line


def test_bptt_needs_sequences(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sequences"):
        trainer(tmp_path).fit(module(BPTT()), data(layout="stream"))


def test_stream_of_other_lanes_begins_anew(tmp_path: Path) -> None:
    first = trainer(tmp_path)
    first.fit(module(), data())
    first.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match="stream"):
        trainer(tmp_path, max_steps=8).fit(module(), data(batch_size=2), ckpt_path=tmp_path / "a.ckpt")


def test_a_routed_cell_in_a_stack_is_dense() -> None:
    stack = Stack([RecurrentMoE(3, 4, 3, 2)])
    with pytest.raises(ValueError, match="Stack is none: use RTRL"):
        BlockRTRL(window=4).init(stack, 2)
    assert one_window(stack).used is None
    assert one_window(RecurrentMoE(3, 4, 3, 2)).used is not None


class RandomSlot(RoutedCell):
    """The last slot of two is read, the first is written at random."""

    def __init__(self) -> None:
        super().__init__(3, num_slots=2, slot_size=3, read_slots=1, write_slots=1)
        self.layer = nn.Linear(3, 3)

    def route(self, x: Tensor, s: Tensor) -> Routing:
        first = torch.zeros(len(x), 1, dtype=torch.long)
        return Routing(first + 1, first, first[:, :0])

    def update(self, x: Tensor, read: Tensor, old: Tensor, routing: Routing) -> Tensor:
        return nn.functional.dropout(torch.tanh(self.layer(x)[:, None] + old))


def test_routed_cells_have_no_slow_path() -> None:
    cell, inputs = RandomSlot(), torch.randn(2, 4, 3)
    algorithm, readout = BlockRTRL(window=4), nn.Linear(6, 1)
    with pytest.raises(ValueError, match=r"cannot be trained by its rows: it draws random numbers.*use RTRL"):
        algorithm.step(cell, readout, inputs, inputs[:, :, :1], squared, algorithm.init(cell, 2))
    with pytest.warns(UserWarning, match="exact but slow"):
        one_window(cell)


def test_the_gradient_of_a_puzzle_embedding_is_dense() -> None:
    shape = PuzzleShape(3, 1, 1, identities=1000)
    encoder = PuzzleEmbedding(shape, 4, 1)
    cell, no_demos = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 0, 1)
    one = Puzzles(cell, cell, no_demos, no_demos, no_demos, torch.tensor([7]))
    (grad,) = torch.autograd.grad(encoder(one).context.sum(), encoder.table)
    assert grad.shape == (1000, 4)
    assert grad.any(1).nonzero().tolist() == [[7]]


def test_bf16_mixed_changes_nothing_in_reasoning(tmp_path: Path) -> None:
    weights = []
    for precision in ("32-true", "bf16-mixed", "64-true"):
        model = reasoning.module()
        reasoning.run(tmp_path, model, 2, trainer={"precision": precision})
        weights.append(torch.cat([p.detach().float().flatten() for p in model.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_routed_cells_are_not_compiled() -> None:
    algorithm, graphs = BlockRTRL(window=2), []
    algorithm.compile(lambda graph, _: graphs.append(graph) or graph.forward)
    cell, inputs = RecurrentMoE(3, 2, 2, 2), torch.randn(2, 4, 3)
    readout, memory = nn.Linear(cell.state_size, 1), algorithm.init(cell, 2)
    for _ in range(2):
        memory = algorithm.run(cell, readout, inputs, inputs[:, :, :1], squared, memory).memory
    assert not graphs
