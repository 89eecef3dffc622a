"""Block and lazy RTRL of routed cells equal backpropagation through time under the same routing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rtrl_moe_pl.cells import RecurrentMoE, RoutedCell, Routing
from rtrl_moe_pl.cells.experts import expert_linear
from rtrl_moe_pl.gradients import (
    BPTT,
    RTRL,
    TBPTT,
    BlockRTRL,
    LazyExpertRTRL,
    sequence_gradient,
)
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
from tests.gradients.user_cells.routed import Plain

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
    monkeypatch.setattr(step_module, "TILE_BYTES", 1)  # eight rows; windows have 21, 42 where two are run as one
    assert_exact(idle, kind(window=7, chunk=14))


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


def test_frozen_parameters_keep_none() -> None:
    torch.manual_seed(0)
    cell = RecurrentMoE(3, 3, 4, 5).double()
    for parameter in (cell.expert_weight, cell.address, cell.write_norm.bias):
        parameter.requires_grad_(False)
    assert_exact(make_problem(cell, batch=2, steps=9), BlockRTRL(window=2), LazyExpertRTRL(window=2, ring=2))


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
