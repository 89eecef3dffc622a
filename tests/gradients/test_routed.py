"""Block and lazy RTRL of routed cells equal backpropagation through time under the same routing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rtrl_moe_pl.cells import GRU, RecurrentMoE, RoutedCell, Routing, Stack
from rtrl_moe_pl.cells.experts import expert_linear
from rtrl_moe_pl.cells.routed import put_slots, take_slots
from rtrl_moe_pl.gradients import (
    BPTT,
    RTRL,
    TBPTT,
    BlockRTRL,
    LazyExpertRTRL,
    MemoryForecastError,
    sequence_gradient,
)
from rtrl_moe_pl.gradients import rtrl as rtrl_module
from rtrl_moe_pl.linearization import step as step_module
from rtrl_moe_pl.sensitivities import LazyExpertSensitivity
from tests.gradients.problem import (
    Problem,
    assert_exact,
    make_problem,
    plain_autograd,
    weighted_squares,
    worst_error,
)

Draw = Callable[[st.SearchStrategy[Any]], Any]
RINGS = (2, 5, 64)


@st.composite
def cells(draw: Draw, width: int) -> RecurrentMoE:
    slots, experts = draw(st.integers(1, 9)), draw(st.integers(1, 12))
    cell = RecurrentMoE(
        width,
        slot_size=draw(st.integers(2, 4)),
        num_slots=slots,
        num_experts=experts,
        read_slots=draw(st.integers(1, min(slots, 3))),
        write_slots=draw(st.integers(1, min(slots, 3))),
        active_experts=draw(st.integers(1, min(experts, 3))),
        temperature=draw(st.sampled_from([1.0, 0.5])),
        drift_penalty=draw(st.sampled_from([0.0, 0.0, 0.3])),
        expert_penalty=draw(st.sampled_from([0.0, 0.0, 0.2])),
        orthogonal=draw(st.booleans()),
        learned_initial_state=draw(st.booleans()),
    ).double()
    with torch.no_grad():
        for name, buffer in cell.named_buffers():
            buffer.copy_(0.3 * torch.randn(buffer.shape, dtype=torch.float64))
            assert name.endswith("bias")
        if cell.initial is not None:
            cell.initial.normal_()
    return cell


@st.composite
def problems(draw: Draw) -> tuple[Problem, int]:
    """A problem of a routed cell, and a window."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    batch, steps, width = draw(st.sampled_from([1, 3, 7])), draw(st.integers(1, 14)), draw(st.integers(1, 3))
    cell = draw(cells(width))
    starts = torch.rand(batch, steps) < 0.15 if draw(st.booleans()) else None
    weights = (torch.rand(batch, steps) < draw(st.sampled_from([0.2, 1.0]))).double()
    state = torch.randn(batch, cell.state_size, dtype=torch.float64) if draw(st.booleans()) else None
    inputs = torch.randn(batch, steps, width, dtype=torch.float64)
    window = draw(st.sampled_from([1, 2, 3, 5]))
    return make_problem(cell, inputs=inputs, weights=weights, starts=starts, state=state), window


def shortest(kind: type[BlockRTRL], window: int, **options: Any) -> Any:
    """P is advanced after every window."""
    return kind(window=window, chunk=window, **options)


@settings(max_examples=60, deadline=None)
@given(problems())
def test_block(case: tuple[Problem, int]) -> None:
    problem, window = case
    assert_exact(problem, BlockRTRL(window=window))


@settings(max_examples=120, deadline=None)
@given(problems(), st.sampled_from(RINGS), st.sampled_from(["walk", "tree", "block"]))
def test_lazy(case: tuple[Problem, int], ring: int, catch_up: Any) -> None:
    problem, window = case
    assert_exact(problem, LazyExpertRTRL(window=window, ring=ring, catch_up=catch_up))


@settings(max_examples=30, deadline=None)
@given(problems())
def test_dense(case: tuple[Problem, int]) -> None:
    problem, window = case
    assert_exact(problem, RTRL(window=window), BPTT())


@pytest.fixture
def idle() -> Problem:
    """Twelve experts of which one is used at a time: most are idle for longer than a small ring; starts in between."""
    torch.manual_seed(0)
    cell = RecurrentMoE(2, 2, num_slots=6, num_experts=12, write_slots=1, active_experts=1).double()
    starts = torch.zeros(3, 40, dtype=torch.bool)
    starts[1, [9, 23]] = True
    return make_problem(cell, batch=3, steps=40, width=2, starts=starts)


def ages(problem: Problem, algorithm: LazyExpertRTRL) -> list[int]:
    """How far behind the pairs of lane and expert are, after each window."""
    memory, found = algorithm.init(problem.cell, len(problem.inputs)), []
    for t in range(problem.inputs.shape[1]):
        targets = tuple(target[:, t : t + 1] for target in problem.targets)
        algorithm.run(
            problem.cell,
            problem.readout,
            problem.inputs[:, t : t + 1],
            targets,
            lambda outputs, targets: ((outputs - targets[0]) ** 2).sum(),
            memory,
            None if problem.starts is None else problem.starts[:, t : t + 1],
        )
        assert isinstance(memory.base, LazyExpertSensitivity)
        found.append(max(pool.oldest(memory.base.windows) for pool in memory.base.pools.values()))
    return found


@pytest.fixture
def rare() -> Problem:
    """Five of twelve experts are used, some of them once in more than 64 steps."""
    torch.manual_seed(1)
    cell = RecurrentMoE(2, 3, num_slots=5, num_experts=12, write_slots=1, active_experts=1).double()
    cell.expert_bias.copy_(-torch.linspace(0, 3, 12))
    starts = torch.zeros(3, 110, dtype=torch.bool)
    starts[1, [9, 23]] = True
    return make_problem(cell, batch=3, steps=110, width=2, starts=starts)


@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize("catch_up", ["walk", "tree"])
def test_experts_idle_for_longer_than_the_ring(rare: Problem, ring: int, catch_up: str) -> None:
    algorithm = shortest(LazyExpertRTRL, 1, ring=ring, catch_up=catch_up)
    assert_exact(rare, algorithm)
    assert max(ages(rare, algorithm)) == ring


def test_some_experts_are_idle_for_longer_than_the_largest_ring(rare: Problem) -> None:
    algorithm = shortest(LazyExpertRTRL, 1, ring=200)
    assert max(ages(rare, algorithm)) > max(RINGS)
    memory = algorithm.init(rare.cell, 3)
    algorithm.run(rare.cell, rare.readout, rare.inputs, rare.targets, weighted_squares, memory, rare.starts)
    assert memory.used is not None
    assert int((memory.used.experts > 0).sum()) >= 5


def test_a_block_leaves_no_expert_behind(idle: Problem) -> None:
    assert max(ages(idle, shortest(LazyExpertRTRL, 1, catch_up="block"))) == 0


@pytest.mark.parametrize("kind", [RTRL, BlockRTRL, LazyExpertRTRL])
def test_steps_are_differentiated_some_at_a_time(
    idle: Problem, kind: type[RTRL], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_module, "TILE_BYTES", 1)  # eight rows; a window has 24
    assert_exact(idle, kind(window=8, chunk=16))


def test_truncation_differs(idle: Problem) -> None:
    _, _, truth = plain_autograd(idle)
    assert worst_error(idle.solve(TBPTT(window=3)).grads, truth) > 1e-2


def test_lanes_choose_for_themselves(idle: Problem) -> None:
    """What the cases above rest on: read, written and experts differ from lane to lane."""
    cell, state = idle.cell, idle.cell.initial_state(3)
    differ = torch.zeros(3, dtype=torch.long)
    for x in idle.inputs.unbind(1):
        state, routing = cell.advance(x, state)
        differ += torch.tensor([bool((index.sort(1)[0] != index.sort(1)[0][:1]).any()) for index in routing])
    assert differ.min() > 10


class Plain(RoutedCell):
    """A routed cell of a user's: parameters met element-wise and by a norm with gain, one bank without a bias."""

    def __init__(self) -> None:
        super().__init__(3, num_slots=5, slot_size=3, num_experts=4, read_slots=1, write_slots=2, active_experts=2)
        self.embed = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)
        self.gain = nn.Parameter(torch.randn(3))
        self.bank = nn.Parameter(torch.randn(4, 3, 6))

    def route(self, x: Tensor, s: Tensor) -> Routing:
        scores = s.unflatten(1, (5, 3)) @ x.unsqueeze(-1) + torch.arange(5)[:, None] * x.sum(1)[:, None, None].sin()
        order = scores.squeeze(-1).argsort(1)
        return Routing(order[:, :1], order[:, -2:], order[:, :2] % 4)

    def update(self, x: Tensor, read: Tensor, old: Tensor, routing: Routing) -> Tensor:
        both = torch.cat([self.norm(read[:, 0] + self.embed(x)), x], -1)[:, None]
        return torch.tanh(self.gain * old + expert_linear(both, self.bank, None, routing.experts))


@pytest.mark.parametrize("kind", [BlockRTRL, LazyExpertRTRL])
def test_a_users_own_cell(kind: type[BlockRTRL]) -> None:
    torch.manual_seed(0)
    problem = make_problem(Plain().double(), batch=3, steps=15)
    with pytest.raises(AssertionError):
        assert_exact(problem, TBPTT(window=2))
    assert_exact(problem, kind(window=2), RTRL(window=2))


class Bankless(RoutedCell):
    """Slots without experts, which depend on each other densely or number by number."""

    def __init__(self, dense: bool) -> None:
        super().__init__(3, num_slots=4, slot_size=3, read_slots=1, write_slots=1)
        self.input, self.read = nn.Linear(3, 3), nn.Linear(3, 3) if dense else nn.Identity()
        self.keep, self.scale = nn.Parameter(torch.randn(3)), nn.Parameter(torch.tensor(0.7))

    def route(self, x: Tensor, s: Tensor) -> Routing:
        scores = (s.unflatten(1, (4, 3)) @ x.unsqueeze(-1)).squeeze(-1) + torch.arange(4) * x.sum(1, keepdim=True).sin()
        order = scores.argsort(1)
        return Routing(order[:, :1], order[:, -1:], order[:, :0])

    def update(self, x: Tensor, read: Tensor, old: Tensor, routing: Routing) -> Tensor:
        return torch.tanh(self.input(x)[:, None] + self.read(read) + self.keep * old) * self.scale


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("chunk", [2, None])
def test_a_cell_without_experts(dense: bool, chunk: int | None) -> None:
    torch.manual_seed(1)
    problem = make_problem(Bankless(dense).double(), batch=2, steps=9)
    with pytest.raises(AssertionError):
        assert_exact(problem, TBPTT(window=2))
    assert_exact(problem, BlockRTRL(window=2, chunk=chunk), RTRL(window=2))


class TwoBanks(Plain):
    """One bank meets all chosen experts, another only the first of them: the same memory, seen twice."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Parameter(torch.randn(4, 3, 6))

    def update(self, x: Tensor, read: Tensor, old: Tensor, routing: Routing) -> Tensor:
        first = torch.cat([self.norm(read[:, 0] + self.embed(x)), x], -1)[:, None]
        alone = expert_linear(first, self.other, None, routing.experts[:, :1])
        return super().update(x, read, old, routing) + 0.5 * torch.tanh(alone)


@pytest.mark.parametrize("kind", [BlockRTRL, LazyExpertRTRL])
def test_banks_that_meet_other_numbers_of_experts(kind: type[BlockRTRL]) -> None:
    torch.manual_seed(0)
    problem = make_problem(TwoBanks().double(), batch=3, steps=12)
    assert_exact(problem, kind(window=2), RTRL(window=2))


def test_the_forecast_counts_what_a_chunk_keeps_and_the_ring() -> None:
    """Of cells with and without as many experts as numbers in a slot, within half and twice what is kept."""
    for experts in (7, 8, 9):
        cell = RecurrentMoE(3, 8, 4, experts).double()
        problem = make_problem(cell, batch=2, steps=32)
        algorithm = BlockRTRL(window=32, chunk=32)
        memory = algorithm.init(cell, 2)
        targets = tuple(target[:, :16] for target in problem.targets)
        algorithm.step(cell, problem.readout, problem.inputs[:, :16], targets, lambda o, t: (o - t[0]).sum(), memory)
        assert memory.tail is not None
        kept = sum(leaf.nbytes for leaf in memory.tail.state_dict()["leaves"])
        assert 0.5 < algorithm.forecast(cell, 2, torch.float64, 16).workspace_bytes / kept < 2
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


def test_frozen_parameters_keep_none() -> None:
    torch.manual_seed(0)
    cell = RecurrentMoE(3, 3, 4, 5).double()
    for parameter in (cell.expert_weight, cell.address, cell.write_norm.bias):
        parameter.requires_grad_(False)
    assert_exact(make_problem(cell, batch=2, steps=9), BlockRTRL(window=2), LazyExpertRTRL(window=2, ring=2))


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


@pytest.mark.parametrize("saved", [RTRL(window=2), LazyExpertRTRL(window=2), TBPTT(window=2)])
def test_another_algorithm_does_not_go_on(idle: Problem, saved: Any) -> None:
    message = f"the saved influence is that of {type(saved).__name__}, this run's is of BlockRTRL: resume with"
    with pytest.raises(ValueError, match=message):
        BlockRTRL(window=2).init(idle.cell, 3).load_state_dict(saved.init(idle.cell, 3).state_dict())


@pytest.mark.parametrize("kind", [BlockRTRL, LazyExpertRTRL])
def test_float32(kind: type[BlockRTRL]) -> None:
    torch.manual_seed(0)
    cell, readout = RecurrentMoE(3, 8, 4, 6), nn.Linear(32, 2)
    x, y = torch.randn(3, 60, 3), torch.randn(3, 60, 2)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs - targets) ** 2).sum()

    found = sequence_gradient(kind(window=4, chunk=8), cell, readout, x, y, loss)
    truth = sequence_gradient(BPTT(), cell, readout, x, y, loss)
    for name, gradient in truth.grads.items():
        assert (found.grads[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares the CPU with a GPU")
@pytest.mark.parametrize(
    "algorithm",
    [BlockRTRL(2, chunk=2), *(LazyExpertRTRL(2, 3, 2, kind) for kind in ("walk", "tree", "block"))],  # type: ignore[arg-type]
    ids=repr,
)
def test_on_a_gpu(idle: Problem, algorithm: BlockRTRL) -> None:
    """The CPU's gradients, saved and loaded on the way."""
    truth = idle.solve(algorithm).grads
    cell, readout, inputs = idle.cell.cuda(), idle.readout.cuda(), idle.inputs.cuda()
    targets, starts = tuple(target.cuda() for target in idle.targets), idle.starts.cuda()  # type: ignore[union-attr]

    memory, found = algorithm.init(cell, 3, "cuda"), []
    for part in (slice(0, 22), slice(22, 40)):
        again = algorithm.init(cell, 3, "cuda")
        again.load_state_dict(to_cpu(memory.state_dict()))
        cut = tuple(target[:, part] for target in targets)
        result = algorithm.run(cell, readout, inputs[:, part], cut, weighted_squares, again, starts[:, part])
        memory, found = result.memory, [*found, result.grads]
    for name, gradient in truth.items():
        torch.testing.assert_close((found[0][name] + found[1][name]).cpu(), gradient, rtol=1e-8, atol=1e-10)


def to_cpu(saved: Any) -> Any:
    if isinstance(saved, dict):
        return {name: to_cpu(value) for name, value in saved.items()}
    if isinstance(saved, list):
        return [to_cpu(value) for value in saved]
    return saved.cpu() if isinstance(saved, Tensor) else saved


def test_bad_input() -> None:
    moe, gru = RecurrentMoE(2, 3, 4, 4), GRU(2, 3)
    with pytest.raises(
        ValueError, match=r"BlockRTRL needs a cell that chooses slots .* GRU is none: use RTRL\(window=4\)"
    ):
        BlockRTRL(window=4).init(gru, 1)
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
