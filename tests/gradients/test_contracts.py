"""What ``sequence_gradient`` and the algorithms promise: keys, shapes, totals, and errors in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rtrl_moe_pl.cells import GRU
from rtrl_moe_pl.gradients import (
    BPTT,
    RTRL,
    TBPTT,
    GradientAlgorithm,
    SequenceResult,
    sequence_gradient,
)
from tests.gradients.problem import (
    Problem,
    assert_exact,
    make_problem,
    plain_autograd,
    total_error,
    weighted_squares,
    worst_error,
)
from tests.gradients.user_cells.base import UserCell
from tests.gradients.user_cells.flow import OtherBranchLater
from tests.gradients.user_cells.modules import Tokens

ALGORITHMS = [BPTT(), TBPTT(window=3), RTRL(window=3)]
each_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=repr)


def squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum()


# -- the result ----------------------------------------------------------------------------------------------------


class Spare(GRU):
    """A GRU with a parameter that nothing uses and one that is frozen."""

    def __init__(self) -> None:
        super().__init__(3, 4, learned_initial_state=True)
        self.spare = nn.Parameter(torch.ones(2, 3))
        self.input.bias.requires_grad_(False)


@each_algorithm
def test_result(algorithm: GradientAlgorithm) -> None:
    problem = make_problem(Spare().double(), batch=2, steps=8)
    for p in problem.names.values():
        p.grad = torch.full_like(p, 7.0)
    before = {name: p.detach().clone() for name, p in problem.names.items()}
    result = problem.solve(algorithm)
    assert isinstance(result, SequenceResult)
    assert isinstance(result.loss, float)
    assert result.outputs.shape == (2, 8, 2)
    assert result.state.shape == (2, 4)
    assert not result.outputs.requires_grad
    assert not result.state.requires_grad
    assert list(result.grads) == list(problem.names)
    assert {n: g.shape for n, g in result.grads.items()} == {n: p.shape for n, p in before.items()}
    assert not any(g.requires_grad for g in result.grads.values())
    for name in ("cell.spare", "cell.input.bias"):
        assert torch.equal(result.grads[name], torch.zeros_like(before[name]))
    for name, p in problem.names.items():
        assert torch.equal(p, before[name])
        assert p.grad is not None
        assert bool((p.grad == 7.0).all())
    loss, outputs, _ = plain_autograd(problem)
    assert result.loss == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(result.outputs, outputs)


class TiedReadout(nn.Module):
    def __init__(self, weight: Any) -> None:
        super().__init__()
        self.weight = weight
        self.bias = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, s: Tensor) -> Tensor:
        return s @ self.weight[:2].T + self.bias


@each_algorithm
def test_shared_parameter_once_under_the_cell(algorithm: GradientAlgorithm) -> None:
    cell = Tokens().double()
    problem = make_problem(cell, inputs=torch.randint(0, 5, (2, 9)), readout=TiedReadout(cell.table.weight))
    _, _, truth = plain_autograd(problem)
    grads = problem.solve(algorithm).grads
    assert "cell.table.weight" in grads
    assert [name for name in grads if name.startswith("readout.")] == ["readout.bias"]
    if algorithm.exact:
        assert worst_error(grads, truth) <= 1e-9
    else:
        assert total_error(grads, truth) > 1e-3


class WholeModel(nn.Module):
    """A readout that holds the cell as a part of itself."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.model = cell
        self.out = nn.Linear(4, 2).double()

    def forward(self, s: Tensor) -> Tensor:
        return self.out(s)


def test_readout_that_holds_the_cell() -> None:
    cell = GRU(3, 4).double()
    problem = make_problem(cell, readout=WholeModel(cell))
    truth = assert_exact(problem, RTRL(window=3))
    assert set(truth) == {f"cell.{n}" for n, _ in cell.named_parameters()} | {"readout.out.weight", "readout.out.bias"}


class ReadsInput(nn.Module):
    takes_input = True

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4 + 3, 2).double()

    def forward(self, s: Tensor, x: Tensor) -> Tensor:
        return self.out(torch.cat([s, x], -1))


@pytest.mark.parametrize("algorithm", [BPTT(), RTRL(window=2)], ids=repr)
def test_readout_that_takes_the_input(algorithm: GradientAlgorithm) -> None:
    assert_exact(make_problem(GRU(3, 4).double(), batch=3, readout=ReadsInput()), algorithm)


@pytest.mark.parametrize("algorithm", [BPTT(), RTRL(window=3)], ids=repr)
def test_targets(algorithm: GradientAlgorithm) -> None:
    """One tensor [B, T, ..] of any type, or a tuple of them, cut along time together with the inputs."""
    problem = make_problem(GRU(3, 4).double(), steps=7)
    labels = torch.randint(0, 2, (2, 7))
    lengths: list[tuple[int, int]] = []

    def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
        lengths.append((outputs.shape[1], targets.shape[1]))
        return nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="sum")

    def weighted(outputs: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
        losses = nn.functional.cross_entropy(outputs.flatten(0, 1), targets[0].flatten(), reduction="none")
        return (losses * targets[1].flatten()).sum()

    data = problem.cell, problem.readout, problem.inputs
    one = sequence_gradient(algorithm, *data, labels, cross_entropy)
    two = sequence_gradient(algorithm, *data, (labels, torch.ones(2, 7, dtype=torch.float64)), weighted)
    assert set(lengths) == ({(7, 7)} if algorithm.window is None else {(3, 3), (1, 1)})
    assert one.loss == pytest.approx(two.loss, rel=1e-12)
    assert worst_error(one.grads, two.grads) <= 1e-12


def test_no_state_is_a_start_and_a_state_is_a_constant() -> None:
    torch.manual_seed(0)
    cell = GRU(3, 4, learned_initial_state=True).double()
    nn.init.normal_(cell.initial)  # type: ignore[arg-type]
    problem = make_problem(cell, steps=8)
    started = assert_exact(problem, BPTT(), RTRL(window=3))
    assert started["cell.initial"].abs().min() > 0
    problem.state = cell.initial_state(2).detach()
    explicit = assert_exact(problem, BPTT(), RTRL(window=3))
    assert not explicit["cell.initial"].any()
    assert worst_error({**started, "cell.initial": explicit["cell.initial"]}, explicit) <= 1e-12
    problem.starts = torch.zeros(2, 8, dtype=torch.bool)
    problem.starts[:, 0] = True
    problem.state = torch.randn(2, 4, dtype=torch.float64)  # replaced before it is seen
    assert worst_error(assert_exact(problem, BPTT(), RTRL(window=3)), started) <= 1e-12


@pytest.mark.parametrize("algorithm", [BPTT(), RTRL(window=2)], ids=repr)
def test_chaining_through_the_state_truncates(algorithm: GradientAlgorithm) -> None:
    problem = make_problem(GRU(3, 4).double(), steps=8)
    _, _, truth = plain_autograd(problem)
    first, second = (
        Problem(
            problem.cell,
            problem.readout,
            problem.inputs[:, part],
            (problem.targets[0][:, part], problem.targets[1][:, part]),
        )
        for part in (slice(0, 4), slice(4, 8))
    )
    begun = first.solve(algorithm)
    kept = begun.state.clone()
    second.state = begun.state
    ended = second.solve(algorithm)
    assert torch.equal(begun.state, kept)
    together = {name: begun.grads[name] + ended.grads[name] for name in truth}
    assert worst_error(together, problem.solve(TBPTT(window=4)).grads) <= 1e-9
    assert total_error(together, truth) > 1e-3
    assert begun.loss + ended.loss == pytest.approx(problem.solve(algorithm).loss, rel=1e-12)


@pytest.mark.parametrize("window", [1, 3, 5])
def test_carried_memory_is_one_sequence(window: int) -> None:
    """``run`` over parts with one memory equals one run: unlike chaining through ``state``."""
    problem = make_problem(GRU(3, 4, learned_initial_state=True).double(), steps=12)
    _, _, truth = plain_autograd(problem)
    algorithm = RTRL(window=window)
    memory = algorithm.init(problem.cell, 2)
    total = {name: torch.zeros_like(p) for name, p in problem.names.items()}
    for part in (slice(0, 5), slice(5, 6), slice(6, 12)):
        targets = tuple(t[:, part] for t in problem.targets)
        result = algorithm.run(
            problem.cell, problem.readout, problem.inputs[:, part], targets, weighted_squares, memory
        )
        assert result.memory is memory
        total = {name: total[name] + result.grads[name] for name in total}
    assert worst_error(total, truth) <= 1e-9


@each_algorithm
@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
def test_callers_grad_mode_does_not_matter(algorithm: GradientAlgorithm, context: Callable[[], Any]) -> None:
    problem = make_problem(GRU(3, 4).double())
    expected = problem.solve(algorithm).grads
    with context():
        assert worst_error(problem.solve(algorithm).grads, expected) == 0.0


def test_inputs_and_state_with_a_graph_are_constants() -> None:
    problem = make_problem(GRU(3, 4).double())
    problem.state = torch.zeros(2, 4, dtype=torch.float64)
    expected = problem.solve(RTRL(window=2)).grads
    problem.inputs = (2 * problem.inputs.clone().requires_grad_()) / 2
    problem.state = problem.state.clone().requires_grad_()
    for algorithm in (RTRL(window=2), BPTT()):
        assert worst_error(problem.solve(algorithm).grads, expected) <= 1e-9


# -- windows cut into chunks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 3, 4])
@pytest.mark.parametrize("kind", ["taps", "functional", "branch"])
def test_windows_longer_than_a_chunk(length: int, kind: str) -> None:
    """A window is differentiated in parts; the gradient is that of one window."""
    torch.manual_seed(0)

    class Functional(UserCell):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor, s: Tensor) -> Tensor:
            return torch.tanh(self.input(x) + torch.einsum("ij,bj->bi", self.weight, s))

    cells = {"taps": lambda: GRU(3, 4, learned_initial_state=True), "functional": Functional}
    cell = cells.get(kind, OtherBranchLater)().double()
    inputs = torch.randn(2, 13, 3, dtype=torch.float64).clamp(-1.5, 1.5)
    inputs[0, 7, 0] = 3.0  # the branch cell is found out in the middle of a window
    starts = torch.zeros(2, 13, dtype=torch.bool)
    starts[0, 4] = starts[1, 8] = starts[1, 9] = True
    problem = make_problem(cell, inputs=inputs, starts=starts)
    if kind == "branch" and length > 1:
        with pytest.warns(UserWarning, match="exact but slow"):
            truth = assert_exact(problem, RTRL(window=11, chunk=length))
    else:
        truth = assert_exact(problem, RTRL(window=11, chunk=length))
    assert total_error(problem.solve(TBPTT(window=length)).grads, truth) > 1e-3
