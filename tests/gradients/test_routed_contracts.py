"""What block and lazy RTRL forecast, save and refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rtrl_moe_pl.cells import GRU, RecurrentMoE, RoutedCell, Routing, Stack, expert_linear
from rtrl_moe_pl.cells.routed import put_slots, take_slots
from rtrl_moe_pl.gradients import BPTT, RTRL, TBPTT, BlockRTRL, LazyExpertRTRL, MemoryForecastError
from rtrl_moe_pl.gradients import rtrl as rtrl_module
from rtrl_moe_pl.gradients.routed import _kept_numbers
from tests.gradients.problem import Problem, assert_exact, make_problem, weighted_squares
from tests.gradients.user_cells.routed import Plain


def test_the_forecast_counts_what_a_chunk_keeps_and_the_ring() -> None:
    """Of cells with and without as many experts as numbers in a slot."""
    for experts in (7, 8, 9):
        cell = RecurrentMoE(3, 8, 4, experts).double()
        problem = make_problem(cell, batch=2, steps=32)
        algorithm = BlockRTRL(window=32, chunk=32)
        memory = algorithm.init(cell, 2)
        targets = tuple(target[:, :16] for target in problem.targets)
        algorithm.step(cell, problem.readout, problem.inputs[:, :16], targets, lambda o, t: (o - t[0]).sum(), memory)
        assert memory.tail is not None
        kept = sum(leaf.nbytes for leaf in memory.tail.state_dict()["leaves"])
        derivatives = 16 * 2 * 8 * _kept_numbers(cell)
        assert 0.8 < derivatives / kept < 1.5
        assert derivatives < algorithm.forecast(cell, 2, torch.float64, 16).workspace_bytes < 3 * derivatives
    walk, tree = (LazyExpertRTRL(window=4, ring=9, catch_up=kind) for kind in ("walk", "tree"))  # type: ignore[arg-type]
    block = BlockRTRL(window=4).forecast(cell, 2, torch.float64, 16).influence_bytes
    assert walk.forecast(cell, 2, torch.float64, 16).influence_bytes == block + 9 * 2 * 32**2 * 8
    assert tree.forecast(cell, 2, torch.float64, 16).influence_bytes == block + 4 * 9 * 2 * 32**2 * 8


def test_the_advice_on_lanes_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A smaller batch has longer chunks: what is advised is tried, not extrapolated."""
    cell = RecurrentMoE(3, 8, 16, 4)
    algorithm = BlockRTRL(window=8)
    size = algorithm.forecast(cell, 40, torch.float32, algorithm.chunk_for(cell, batch_size=40)).total_bytes
    for free in (size - 1, size // 2, size // 5):
        monkeypatch.setattr(rtrl_module, "free_memory", lambda device, free=free: free)
        with pytest.raises(MemoryForecastError, match="lower batch_size to") as caught:
            algorithm.init(cell, 40)
        lanes = int(str(caught.value).split("batch_size to ")[1].split(",")[0])
        algorithm.init(cell, lanes)
        with pytest.raises(MemoryForecastError):
            algorithm.init(cell, lanes + 1)


class Disobedient(Plain):
    """Changes a slot that it does not say it writes."""

    def advance(self, x: Tensor, s: Tensor) -> tuple[Tensor, Routing]:
        new, routing = super().advance(x, s)
        return 0.6 * s + 0.4 * new, routing


class Squared(Plain):
    """Meets a bank in a form without a rule."""

    def update(self, x: Tensor, read: Tensor, old: Tensor, routing: Routing) -> Tensor:
        return super().update(x, read, old, routing) + 0.1 * torch.tanh(self.bank.square().sum((0, 2)))


@pytest.mark.parametrize(
    ("cell", "reason"),
    [(Disobedient(), "changes slots that it does"), (Squared(), "form without a rule")],
)
def test_what_cannot_be_right_is_refused(cell: RoutedCell, reason: str) -> None:
    problem = make_problem(cell.double(), batch=2, steps=6)
    with pytest.raises(ValueError, match=rf"cannot be trained by its rows: .*{reason}.*; use RTRL\(window=\.\.\)"):
        problem.solve(BlockRTRL(window=2))
    if isinstance(cell, Squared):
        assert_exact(problem, RTRL(window=2))


@pytest.mark.parametrize("kind", [BlockRTRL, LazyExpertRTRL])
@pytest.mark.parametrize("chunk", [2, 6])
def test_a_saved_memory_goes_on_bit_for_bit(idle: Problem, kind: type[BlockRTRL], chunk: int) -> None:
    algorithm = kind(window=2, chunk=chunk)
    data = idle.cell, idle.readout

    def part(memory: Any, begin: int, end: int) -> Any:
        targets = tuple(target[:, begin:end] for target in idle.targets)
        assert idle.starts is not None
        return algorithm.run(
            *data,
            idle.inputs[:, begin:end],
            targets,
            lambda o, t: ((o - t[0]) ** 2).sum(),
            memory,
            idle.starts[:, begin:end],
        )

    memory, again = algorithm.init(idle.cell, 3), algorithm.init(idle.cell, 3)
    part(memory, 0, 22)
    again.load_state_dict(memory.state_dict())
    for begin in (22, 30):
        one, other = part(memory, begin, begin + 8), part(again, begin, begin + 8)
        for name in one.grads:
            assert torch.equal(one.grads[name], other.grads[name]), name
    assert float(memory.base.norm()) > 0


@pytest.mark.parametrize("kind", [BlockRTRL, LazyExpertRTRL])
def test_a_reset_forgets_numbers_that_are_not_finite(idle: Problem, kind: type[BlockRTRL]) -> None:
    algorithm = kind(window=2, chunk=2)
    memory = algorithm.init(idle.cell, 3)

    def run(inputs: Tensor) -> dict[str, Tensor]:
        data = inputs[:, :12], tuple(target[:, :12] for target in idle.targets)
        return algorithm.run(idle.cell, idle.readout, *data, weighted_squares, memory).grads

    truth = run(idle.inputs)
    assert not all(gradient.isfinite().all() for gradient in run(idle.inputs / 0).values())
    memory.reset()
    for name, gradient in run(idle.inputs).items():
        torch.testing.assert_close(gradient, truth[name])


class TwoMeetings(Plain):
    """Two banks whose outputs are added as they are, or one of them doubled: with one Jacobian, or with two."""

    doubled = False

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Parameter(torch.randn(4, 3, 6))

    def update(self, x: Tensor, read: Tensor, old: Tensor, routing: Routing) -> Tensor:
        both = torch.cat([self.norm(read[:, 0] + self.embed(x)), x], -1)[:, None]
        one, other = (expert_linear(both, bank, None, routing.experts) for bank in (self.bank, self.other))
        return torch.tanh(self.gain * old + one + (2 * other if self.doubled else other))


@pytest.mark.parametrize("algorithm", [BlockRTRL(3, chunk=3), LazyExpertRTRL(3, chunk=3, ring=2)], ids=repr)
def test_a_norm_counts_a_bank_once(algorithm: BlockRTRL) -> None:
    """Also where its influence is kept in two parts."""
    cell = TwoMeetings().double()
    problem = make_problem(cell, batch=2, steps=12)
    memory = algorithm.init(cell, 2)
    for begin in range(0, 12, 3):
        part = slice(begin, begin + 3)
        cell.doubled = begin % 2 == 1
        targets = tuple(target[:, part] for target in problem.targets)
        algorithm.run(cell, problem.readout, problem.inputs[:, part], targets, weighted_squares, memory)
    dense = torch.cat([part.flatten() for part in memory.sensitivity.to_dense().values()])
    assert float(memory.sensitivity.norm()) == pytest.approx(float(dense.norm()), rel=1e-12)


@pytest.mark.parametrize("saved", [RTRL(window=2), LazyExpertRTRL(window=2), TBPTT(window=2)])
def test_another_algorithm_does_not_go_on(idle: Problem, saved: Any) -> None:
    message = f"the saved influence is that of {type(saved).__name__}, the one configured is of BlockRTRL: resume with"
    with pytest.raises(ValueError, match=message):
        BlockRTRL(window=2).init(idle.cell, 3).load_state_dict(saved.init(idle.cell, 3).state_dict())


def test_bad_input() -> None:
    moe, gru = RecurrentMoE(2, 3, 4, 4), GRU(2, 3)
    with pytest.raises(
        ValueError, match=r"BlockRTRL needs a cell that chooses slots .* GRU is none: use RTRL\(window=4\)"
    ):
        BlockRTRL(window=4).init(gru, 1)
    with pytest.raises(ValueError, match=r"LazyExpertRTRL needs a cell that chooses slots .* GRU is none"):
        LazyExpertRTRL(window=4).forecast(gru, 1, torch.float32, 8)
    with pytest.raises(ValueError, match=r"Stack is none: use RTRL\(window=4\)"):
        LazyExpertRTRL(window=4).init(Stack([moe]), 1)

    cell = Plain()
    cell.num_experts = 0
    with pytest.raises(ValueError, match=r"needs a cell with experts, and Plain has none: use BlockRTRL\(window=4\)"):
        LazyExpertRTRL(window=4).init(cell, 1)
    with pytest.raises(ValueError, match="ring must be at least 2, got 1"):
        LazyExpertRTRL(window=4, ring=1)
    with pytest.raises(ValueError, match="catch_up must be 'walk', 'tree' or 'block', got 'never'"):
        LazyExpertRTRL(window=4, catch_up="never")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"new contents of slots must be \[1, 2, 3\], got \[1, 1, 3\]"):
        put_slots(torch.zeros(1, 4, 3), torch.tensor([[0, 1]]), torch.zeros(1, 1, 3))
    with pytest.raises(TypeError, match=r"indices of slots must be int64, got torch\.float32"):
        take_slots(torch.zeros(1, 4, 3), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="window"):
        BlockRTRL(window=0)
    with pytest.raises(MemoryForecastError, match=r"ring=100000000, .* of the state's derivatives.*smaller ring"):
        LazyExpertRTRL(window=4, ring=100_000_000).init(moe, 1)
    with pytest.raises(MemoryForecastError, match=r"influence matrix .* make the cell smaller, or use TBPTT"):
        LazyExpertRTRL(window=4).init(RecurrentMoE(2, 4, 100_000, 4), 1)

    cell = Plain()
    for banks in (("bank", "banque"), ("bank", "gain")):
        cell.banks = banks
        with pytest.raises(ValueError, match=rf"Plain\.banks names '{banks[1]}', which is no parameter \[experts"):
            BlockRTRL(window=4).init(cell, 1)


@pytest.mark.parametrize("algorithm", [BPTT(), BlockRTRL(window=2), LazyExpertRTRL(window=2)])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"written": torch.tensor([[3, 3], [1, 2]])}, r"Wrong\.route must not write a slot twice in a step"),
        ({"experts": torch.tensor([[0, 1], [-1, 2]])}, r"Wrong\.route must choose \.experts from 0 to 3, got -1 to 2"),
    ],
)
def test_a_wrong_choice_is_refused(algorithm: Any, wrong: dict[str, Tensor], message: str) -> None:
    """Autograd through such a write would be wrong without a word."""

    class Wrong(Plain):
        def route(self, x: Tensor, s: Tensor) -> Routing:
            return super().route(x, s)._replace(**wrong)

    problem = make_problem(Wrong().double(), batch=2, steps=4)
    with pytest.raises(ValueError, match=message):
        problem.solve(algorithm)


def test_a_step_is_overridden_in_one_place() -> None:
    with pytest.raises(TypeError, match="Doubled overrides forward: a RoutedCell's step is advance"):

        class Doubled(Plain):  # pyright: ignore[reportUnusedClass]
            def forward(self, x: Tensor, s: Tensor) -> Tensor:
                return 2 * super().forward(x, s)
