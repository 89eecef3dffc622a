"""Windows that are not in P yet: what is kept of them, and what happens to it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rtrl_moe_pl.cells import GRU, LeakyIntegrator, VanillaRNN, expert_linear
from rtrl_moe_pl.gradients import RTRL, Memory, rtrl
from rtrl_moe_pl.linearization import pending
from tests.gradients.problem import Problem, assert_exact, make_problem, plain_autograd, total_error, weighted_squares
from tests.gradients.test_memory import through_a_file
from tests.gradients.user_cells.base import UserCell

STEPS, WINDOW = 24, 2


class OpensLater(UserCell):
    """Its way past the layer is shut at first: the plan made then does not know it."""

    def __init__(self) -> None:
        super().__init__(5)
        self.layer = nn.Linear(5, 5)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return torch.tanh(self.input(x) + self.layer(s)) + 0.5 * s * torch.relu(x[:, :1])


class Coded(UserCell):
    """A layer that reads a buffer."""

    code: Tensor

    def __init__(self) -> None:
        super().__init__(5)
        self.layer, self.read = nn.Linear(5, 5), nn.Linear(4, 5)
        self.register_buffer("code", torch.randn(4))

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return torch.tanh(self.input(x) + self.layer(s) + self.read(self.code.expand(len(x), -1)))


class Tabled(UserCell):
    """Its expert is named by a buffer."""

    code: Tensor

    def __init__(self) -> None:
        super().__init__(5)
        self.layer, self.bank = nn.Linear(5, 5), nn.Parameter(torch.randn(3, 5, 5))
        self.register_buffer("code", torch.zeros(1, dtype=torch.long))

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        experts = self.code.expand(len(x), 1)
        return torch.tanh(self.input(x) + expert_linear(self.layer(s)[:, None], self.bank, None, experts)[:, 0])


CELLS: dict[str, Callable[[], Any]] = {
    "weight alone": lambda: VanillaRNN(3, 5),
    "weight and diagonal": OpensLater,
    "diagonal alone": lambda: LeakyIntegrator(3, 5),
    "matrix": lambda: GRU(3, 5),
}


def a_problem(cell: Any, batch: int = 3) -> Problem:
    starts = torch.zeros(batch, STEPS, dtype=torch.bool)
    starts[:, 0] = starts[0, 5] = starts[-1, 12] = True
    return make_problem(cell.double(), batch=batch, steps=STEPS, starts=starts)


def stream(
    problem: Problem, algorithm: RTRL, memory: Memory, begin: int, end: int, rate: float = 0.0
) -> list[dict[str, Tensor]]:
    """The gradient of each window, with a step of gradient descent after each."""
    assert problem.starts is not None
    grads = []
    for t in range(begin, end, WINDOW):
        part = slice(t, t + WINDOW)
        targets = tuple(target[:, part] for target in problem.targets)
        data = problem.cell, problem.readout, problem.inputs[:, part], targets, weighted_squares
        grads.append(algorithm.step(*data, memory, problem.starts[:, part]).grads)
        with torch.no_grad():
            for name, p in problem.names.items():
                p -= rate * grads[-1][name]
    return grads


@pytest.mark.parametrize("batch", [1, 2])
def test_a_plan_that_is_widened_in_mid_chunk(batch: int) -> None:
    torch.manual_seed(0)
    problem = a_problem(OpensLater(), batch)
    problem.inputs[:, :9, 0] = -problem.inputs[:, :9, 0].abs()
    problem.inputs[:, 9:, 0] = problem.inputs[:, 9:, 0].abs()
    assert_exact(problem, *(RTRL(window=WINDOW, chunk=chunk) for chunk in (2, 4, STEPS)), RTRL(window=1))


@pytest.mark.parametrize("kind", sorted(CELLS))
def test_resumed_in_mid_chunk(kind: str) -> None:
    """With weights that change after every window, and after an odd number of advances: bit for bit the same."""
    for begin in (6, 10, 16):
        torch.manual_seed(0)
        problem = a_problem(CELLS[kind]())
        algorithm = RTRL(window=WINDOW, chunk=6)
        memory = algorithm.init(problem.cell, 3)
        stream(problem, algorithm, memory, 0, begin, rate=1e-3)
        weights = {name: p.detach().clone() for name, p in problem.names.items()}
        saved = memory.state_dict()
        loaded = through_a_file(saved)
        unbroken = stream(problem, algorithm, memory, begin, STEPS, rate=1e-3)
        for name, value in through_a_file(saved)["tail"].get("backward", {}).items():
            assert str(value) == str(loaded["tail"]["backward"][name])  # what was saved is not written to afterwards
        with torch.no_grad():
            for name, p in problem.names.items():
                p.copy_(weights[name])
        resumed = algorithm.init(problem.cell, 3)
        resumed.load_state_dict(loaded)
        again = stream(problem, algorithm, resumed, begin, STEPS, rate=1e-3)
        assert all(bool(g.isfinite().all()) for grads in unbroken for g in grads.values())
        for found, expected in zip(again, unbroken, strict=True):
            assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_saved_tail_matters() -> None:
    """Control of the test above: without the pending steps, or with one weight for all of them, it would differ."""
    torch.manual_seed(0)
    problem = a_problem(VanillaRNN(3, 5))
    algorithm = RTRL(window=WINDOW, chunk=STEPS)
    memory = algorithm.init(problem.cell, 3)
    stream(problem, algorithm, memory, 0, 10, rate=0.02)
    saved = memory.state_dict()
    whole = copy.deepcopy(saved)
    grads = []
    for change in ("nothing", "weights", "tail"):
        state = copy.deepcopy(whole)
        if change == "weights":
            state["tail"]["backward"]["weights"] = [state["tail"]["backward"]["weights"][-1]]
            state["tail"]["backward"]["changes"] = [0]
        elif change == "tail":
            state["tail"] = {}
        fresh = algorithm.init(problem.cell, 3)
        fresh.load_state_dict(state)
        grads.append(stream(problem, algorithm, fresh, 10, 12)[0])
    assert total_error(grads[1], grads[0]) > 1e-3
    assert total_error(grads[2], grads[0]) > 1e-3


@pytest.mark.parametrize(
    ("make", "change"),
    [(Coded, lambda code: code.copy_(torch.randn(4))), (Tabled, lambda code: code.copy_((code + 1) % 3))],
)
def test_buffers_may_change_between_windows(make: Any, change: Callable[[Tensor], Tensor]) -> None:
    """A tap that reads a buffer keeps what it read."""
    results = []
    for chunk in (WINDOW, STEPS):
        torch.manual_seed(0)
        problem = a_problem(make())
        algorithm = RTRL(window=WINDOW, chunk=chunk)
        memory = algorithm.init(problem.cell, 3)
        grads = []
        for begin in range(0, STEPS, WINDOW):
            grads += stream(problem, algorithm, memory, begin, begin + WINDOW)
            change(problem.cell.code)  # type: ignore[arg-type]
        results.append(grads)
    assert all(total_error(a, b) <= 1e-12 for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("where", ["pull_back", "multiply_out"])
def test_an_interrupted_write_is_not_built_on(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    problem = a_problem(GRU(3, 5))
    algorithm = RTRL(window=WINDOW, chunk=4)
    memory = algorithm.init(problem.cell, 3)
    stream(problem, algorithm, memory, 0, 4)
    saved = copy.deepcopy(memory.state_dict())
    with monkeypatch.context() as patch:

        def fails(*arguments: Any) -> Any:
            raise torch.OutOfMemoryError("no room")

        patch.setattr(rtrl, where, fails)
        with pytest.raises(torch.OutOfMemoryError):
            stream(problem, algorithm, memory, 4, 8)
    for use in (lambda: stream(problem, algorithm, memory, 4, 6), lambda: memory.sensitivity, memory.state_dict):
        with pytest.raises(RuntimeError, match="interrupted an earlier step while it wrote this memory"):
            use()
    memory.load_state_dict(saved)
    grads = stream(problem, algorithm, memory, 4, STEPS)
    memory.reset()
    grads = stream(problem, algorithm, memory, 0, STEPS)
    total = {name: torch.stack([g[name] for g in grads]).sum(0) for name in grads[0]}
    assert total_error(total, plain_autograd(problem)[2]) <= 1e-12


def test_an_error_before_any_write_does_no_harm() -> None:
    torch.manual_seed(0)
    problem = a_problem(GRU(3, 5))
    algorithm = RTRL(window=WINDOW)
    memory = algorithm.init(problem.cell, 3)
    stream(problem, algorithm, memory, 0, 4)
    part = slice(4, 6)
    assert problem.starts is not None
    data = problem.cell, problem.readout, problem.inputs[:, part], problem.targets[0][:, part]
    with pytest.raises(ValueError, match="loss_fn returned"):
        algorithm.step(*data, lambda outputs, targets: outputs, memory, problem.starts[:, part])
    assert not memory.half_written
    assert len(stream(problem, algorithm, memory, 4, 8)) == 2


def test_a_refused_load_changes_nothing() -> None:
    torch.manual_seed(0)
    problem = a_problem(VanillaRNN(3, 5))
    algorithm = RTRL(window=WINDOW, chunk=STEPS)
    memory = algorithm.init(problem.cell, 3)
    stream(problem, algorithm, memory, 0, 6)
    state, wrong = memory.state.clone(), copy.deepcopy(memory.state_dict())
    wrong["state"] += 1
    wrong["tail"] = {}
    wrong["sensitivity"] = {"cell.elsewhere": torch.zeros(3, 5, 1)}
    with pytest.raises(ValueError, match=r"covers 'cell\.elsewhere', which this cell does not have"):
        memory.load_state_dict(wrong)
    assert torch.equal(memory.state, state)
    assert memory.tail is not None
    assert len(memory.tail) == 6


def test_loading_and_resetting_forget_the_tail() -> None:
    torch.manual_seed(0)
    problem = a_problem(VanillaRNN(3, 5))
    algorithm = RTRL(window=WINDOW, chunk=STEPS)
    truth = stream(problem, algorithm, algorithm.init(problem.cell, 3), 0, STEPS)
    memory = algorithm.init(problem.cell, 3)
    empty = copy.deepcopy(memory.state_dict())
    for forget in (memory.reset, lambda: memory.load_state_dict(empty)):
        stream(problem, algorithm, memory, 0, 6)
        forget()
        assert memory.tail is None or not len(memory.tail)
        again = stream(problem, algorithm, memory, 0, STEPS)
        assert all(torch.equal(a[name], b[name]) for a, b in zip(again, truth, strict=True) for name in b)


def test_a_start_cuts_pending_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: with the starts of pending steps forgotten, gradients are wrong."""
    torch.manual_seed(0)
    problem = a_problem(GRU(3, 5))
    truth = assert_exact(problem, RTRL(window=WINDOW, chunk=STEPS))
    for name in ("loss_sweep", "state_sweep"):
        sweep = getattr(pending, name)

        def without(tail: Any, *rest: Any, sweep: Any = sweep, **more: Any) -> Any:
            starts, tail.starts = tail.starts, [None] * len(tail.starts)
            try:
                return sweep(tail, *rest, **more)
            finally:
                tail.starts = starts

        monkeypatch.setattr(pending, name, without)
    assert total_error(problem.solve(RTRL(window=WINDOW, chunk=STEPS)).grads, truth) > 1e-3


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e20])
def test_the_gradient_is_linear_in_the_loss(scale: float) -> None:
    """Nothing is rounded to zero because the loss is measured in small units."""
    torch.manual_seed(0)
    problem = a_problem(GRU(3, 5))
    modules = nn.ModuleList([problem.cell, problem.readout]).float()
    algorithm = RTRL(window=WINDOW)
    grads = []
    for factor in (1.0, scale):
        memory = algorithm.init(modules[0], 3)
        targets = (problem.targets[0].float(), problem.targets[1].float() * factor)
        run = algorithm.run(modules[0], modules[1], problem.inputs.float(), targets, weighted_squares, memory)
        grads.append({name: g.double() / factor for name, g in run.grads.items()})
    assert total_error(grads[1], grads[0]) <= 1e-5
