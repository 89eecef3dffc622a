"""What is carried: saved in plain values, resumed to the last bit, copied, forgotten."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rtrl_moe_pl.cells import GRU, LSTM, RoutedCell, Routing, SimpleRNN, Stack, expert_linear
from rtrl_moe_pl.gradients import RTRL, TBPTT, BlockRTRL, GradientAlgorithm, LazyExpertRTRL, Memory
from rtrl_moe_pl.sensitivities import dense
from tests.gradients.problem import Problem, make_problem, plain_autograd, total_error, weighted_squares, worst_error
from tests.gradients.user_cells import flow, matrices, vectors
from tests.gradients.user_cells.modules import Tokens

STEPS, HALF, WINDOW = 18, 9, 3

CELLS: dict[str, Callable[[], Any]] = {
    "stack": lambda: Stack([GRU(3, 4, learned_initial_state=True), LSTM(4, 3)]),
    "dense derivatives": lambda: SimpleRNN(3, 12, learned_initial_state=True),
    "functional": matrices.LeftMatrix,
    "initial from step": vectors.InitialFromStep,
    "other branch later": flow.OtherBranchLater,
}


def a_problem(kind: str) -> Problem:
    torch.manual_seed(2)
    starts = torch.zeros(2, STEPS, dtype=torch.bool)
    starts[0, 4] = starts[1, 13] = True
    return make_problem(CELLS[kind]().double(), steps=STEPS, starts=starts)


def run(
    problem: Problem, algorithm: GradientAlgorithm, memory: Memory, begin: int, end: int
) -> list[dict[str, Tensor]]:
    """The gradient of each window."""
    grads = []
    assert problem.starts is not None
    for t in range(begin, end, WINDOW):
        part = slice(t, t + WINDOW)
        targets = tuple(target[:, part] for target in problem.targets)
        data = problem.cell, problem.readout, problem.inputs[:, part], targets, weighted_squares
        grads.append(algorithm.step(*data, memory, problem.starts[:, part]).grads)
    return grads


def through_a_file(saved: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_plain(value: Any) -> None:
    """Tensors, numbers, strings, lists and dicts only."""
    if isinstance(value, dict):
        assert all(isinstance(key, str) for key in value)
        for part in value.values():
            assert_plain(part)
    elif isinstance(value, list):
        for part in value:
            assert_plain(part)
    else:
        assert isinstance(value, Tensor | bool | int | float | str)
        assert not isinstance(value, Tensor) or not value.requires_grad


@pytest.mark.filterwarnings("ignore:.*exact but slow")
@pytest.mark.parametrize("algorithm", [RTRL(window=WINDOW), TBPTT(window=WINDOW)], ids=repr)
@pytest.mark.parametrize("kind", sorted(CELLS))
def test_resumed_equals_unbroken(kind: str, algorithm: GradientAlgorithm) -> None:
    """Saved in mid-stream, loaded in a fresh memory of the same cell: every later gradient is the same, bit for bit."""
    problem = a_problem(kind)
    memory = algorithm.init(problem.cell, 2)
    run(problem, algorithm, memory, 0, HALF)
    saved = memory.state_dict()
    assert_plain(saved)
    loaded = through_a_file(saved)
    unbroken = run(problem, algorithm, memory, HALF, STEPS)
    resumed = algorithm.init(problem.cell, 2)
    resumed.load_state_dict(loaded)
    for found, expected in zip(run(problem, algorithm, resumed, HALF, STEPS), unbroken, strict=True):
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(resumed.state, memory.state)


def test_state_without_influence_is_not_enough() -> None:
    """Control: resumed from the state alone, the gradient is another."""
    problem = a_problem("stack")
    algorithm = RTRL(window=WINDOW)
    memory = algorithm.init(problem.cell, 2)
    run(problem, algorithm, memory, 0, HALF)
    forgetful = algorithm.init(problem.cell, 2)
    forgetful.load_state_dict({**memory.state_dict(), "sensitivity": {}})
    found = run(problem, algorithm, forgetful, HALF, STEPS)[0]
    assert total_error(found, run(problem, algorithm, memory, HALF, STEPS)[0]) > 1e-3


def test_saved_values_are_not_written_to_afterwards() -> None:
    problem = a_problem("stack")
    algorithm = RTRL(window=WINDOW)
    memory = algorithm.init(problem.cell, 2)
    run(problem, algorithm, memory, 0, HALF)
    saved = memory.state_dict()
    kept = copy.deepcopy(saved)
    run(problem, algorithm, memory, HALF, STEPS)
    assert torch.equal(saved["state"], kept["state"])
    assert all(torch.equal(p, kept["sensitivity"][name]) for name, p in saved["sensitivity"].items())


def test_fresh_memory_survives_saving() -> None:
    """Nothing seen yet: the first step after loading is still a start."""
    problem = a_problem("stack")
    algorithm = RTRL(window=WINDOW)
    resumed = algorithm.init(problem.cell, 2)
    resumed.load_state_dict(through_a_file(algorithm.init(problem.cell, 2).state_dict()))
    grads = run(problem, algorithm, resumed, 0, STEPS)
    total = {name: torch.stack([g[name] for g in grads]).sum(0) for name in grads[0]}
    assert worst_error(total, plain_autograd(problem)[2]) <= 1e-9


@pytest.mark.filterwarnings("ignore:.*exact but slow")
@pytest.mark.parametrize("size", [8, 200, 900])
def test_exact_in_any_tiling(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "CPU_TILE_BYTES", size)
    for kind in CELLS:
        problem = a_problem(kind)
        grads = problem.solve(RTRL(window=2)).grads
        assert worst_error(grads, plain_autograd(problem)[2]) <= 1e-9, kind


def test_reset_is_a_new_beginning() -> None:
    problem = a_problem("stack")
    algorithm = RTRL(window=WINDOW)
    memory = algorithm.init(problem.cell, 2)
    first = run(problem, algorithm, memory, 0, STEPS)
    held = memory.sensitivity.nbytes
    memory.reset()
    assert float(memory.sensitivity.norm()) == 0.0
    for found, expected in zip(run(problem, algorithm, memory, 0, STEPS), first, strict=True):
        assert worst_error(found, expected) <= 1e-12
    assert memory.sensitivity.nbytes == held


def test_copies_go_their_own_way() -> None:
    """A deep copy serves a deep copy of the cell; the original is not touched."""
    problem = a_problem("stack")
    algorithm = RTRL(window=WINDOW)
    memory = algorithm.init(problem.cell, 2)
    run(problem, algorithm, memory, 0, HALF)
    other, twin = copy.deepcopy(problem), copy.deepcopy(memory)
    expected = run(problem, algorithm, memory, HALF, STEPS)
    for found, truth in zip(run(other, algorithm, twin, HALF, STEPS), expected, strict=True):
        assert worst_error(found, truth) <= 1e-12
    assert torch.equal(twin.state, memory.state)


def test_what_does_not_fit_is_refused() -> None:
    problem = a_problem("stack")
    algorithm = RTRL(window=WINDOW)
    memory = algorithm.init(problem.cell, 2)
    run(problem, algorithm, memory, 0, HALF)
    saved = memory.state_dict()
    with pytest.raises(ValueError, match=r"saved carry has shape \(2, 10\), this run needs \(3, 10\).*resume with"):
        algorithm.init(problem.cell, 3).load_state_dict(saved)
    wider = Stack([GRU(4, 4), LSTM(4, 3)]).double()
    with pytest.raises(ValueError, match=r"covers 'cell\.cells\.0\.initial', which this cell does not have"):
        algorithm.init(wider, 2).load_state_dict(saved)
    wider = Stack([GRU(4, 4, learned_initial_state=True), LSTM(4, 3)]).double()
    with pytest.raises(ValueError, match=r"saved influence of cell\.cells\.0\.input\.weight has shape"):
        algorithm.init(wider, 2).load_state_dict(saved)


class NamedExperts(RoutedCell):
    """The input is the number of the expert."""

    def __init__(self) -> None:
        super().__init__(None, num_slots=3, slot_size=2, num_experts=5, read_slots=1, write_slots=1, active_experts=1)
        self.bank = nn.Parameter(torch.randn(5, 2, 4))

    def route(self, x: Tensor, s: Tensor) -> Routing:
        return Routing((x[:, None] + 1) % 3, x[:, None] % 3, x[:, None])

    def update(self, x: Tensor, read: Tensor, old: Tensor, routing: Routing) -> Tensor:
        return torch.tanh(1 + old + expert_linear(torch.cat([read, old], -1), self.bank, None, x[:, None]) / 2)


@pytest.mark.parametrize(("window", "batch"), [(1, 2), (3, 1), (3, 2)])
@pytest.mark.parametrize(
    ("kind", "algorithm"),
    [("embedding", RTRL), ("gru", RTRL), ("experts", RTRL), ("experts", BlockRTRL), ("experts", LazyExpertRTRL)],
)
def test_buffers_of_the_caller_may_be_used_again(kind: str, algorithm: Any, window: int, batch: int) -> None:
    """What a window was given is overwritten after it: windows that are not in P yet have copies."""
    torch.manual_seed(1)
    cell = {"embedding": Tokens, "gru": lambda: GRU(3, 5), "experts": NamedExperts}[kind]().double()
    inputs = None if kind == "gru" else torch.randint(0, 5, (batch, 12))
    starts = torch.rand(batch, 12) < (0.0 if kind == "experts" else 0.2)  # which would hide what came before
    problem = make_problem(cell, inputs=inputs, batch=batch, steps=12, starts=starts)
    truth = plain_autograd(problem)[2]
    algorithm = algorithm(window=window, chunk=12)
    memory = algorithm.init(cell, batch)
    buffer, starting = problem.inputs[:, :window].clone(), starts[:, :window].clone()
    total: dict[str, Tensor] = {}
    for begin in range(0, 12, window):
        part = slice(begin, begin + window)
        buffer.copy_(problem.inputs[:, part])
        starting.copy_(starts[:, part])
        targets = tuple(t[:, part] for t in problem.targets)
        result = algorithm.step(cell, problem.readout, buffer, targets, weighted_squares, memory, starting)
        buffer.zero_()
        starting.fill_(True)
        total = {name: g + total[name] if total else g for name, g in result.grads.items()}
    assert worst_error(total, truth) <= 1e-10


@pytest.mark.parametrize("factor", [0.5, 0.0])
def test_influence_is_scaled_with_what_is_pending_and_the_state_is_not(factor: float) -> None:
    problem, algorithm = a_problem("stack"), RTRL(WINDOW, chunk=2 * WINDOW)
    memory = algorithm.init(problem.cell, 2)
    run(problem, algorithm, memory, 0, HALF)
    assert memory.tail is not None
    assert len(memory.tail) == WINDOW
    state, dense = memory.state.clone(), copy.deepcopy(memory).sensitivity.to_dense()
    memory.scale_influence_(factor)
    assert torch.equal(memory.state, state)
    assert not memory.fresh
    found = memory.sensitivity.to_dense()
    assert all(torch.equal(found[name], factor * p) for name, p in dense.items())
