"""Cells that are random, keep something beside their state, mix lanes or precisions: exact, or refused in one line."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from rtrl_moe_pl.cells import GRU, Stack
from rtrl_moe_pl.gradients import BPTT, RTRL, TBPTT, GradientAlgorithm, Memory, parameter_paths, sequence_gradient
from tests.gradients.problem import Problem, make_problem, plain_autograd, total_error, weighted_squares, worst_error
from tests.gradients.user_cells.base import UserCell
from tests.gradients.user_cells.graphs import MixedPrecision
from tests.gradients.user_cells.lanes import Dropped, LaneMean, NormalisedBatch

STEPS = 9


@contextmanager
def announced() -> Iterator[None]:
    with pytest.warns(UserWarning, match="exact but slow"):
        yield


def run(problem: Problem, algorithm: GradientAlgorithm, memory: Memory, steps: int = STEPS) -> dict[str, Tensor]:
    targets = tuple(part[:, :steps] for part in problem.targets)
    result = algorithm.run(
        problem.cell, problem.readout, problem.inputs[:, :steps], targets, weighted_squares, memory, problem.starts
    )
    return result.grads


# -- random cells --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.03, 0.5])
@pytest.mark.parametrize("window", [1, 2, 4])
def test_dropout_uses_one_mask(rate: float, window: int) -> None:
    """With the same random numbers RTRL and BPTT see the same masks, and give the same gradient."""
    torch.manual_seed(0)
    problem = make_problem(Dropped(rate).double(), batch=3, steps=STEPS)
    algorithm = RTRL(window=window)
    memory = algorithm.init(problem.cell, 3)
    with announced():
        run(problem, algorithm, memory)
    assert set(parameter_paths(memory).values()) == {"window"}
    memory.reset()
    torch.manual_seed(5)
    grads = run(problem, algorithm, memory)
    torch.manual_seed(5)
    truth = problem.solve(BPTT()).grads
    assert worst_error(grads, truth) <= 1e-9
    torch.manual_seed(6)
    assert total_error(problem.solve(BPTT()).grads, truth) > 1e-3  # other masks, another gradient


@pytest.mark.parametrize("rate", [0.03, 0.5])
def test_dropout_in_the_first_window(rate: float) -> None:
    """Also while the cell is not yet known to be random: gradient and outputs belong to the same masks.

    The first state is zero, and so is what dropout makes of it: the states alone do not show the masks.
    """
    for seed in range(12):
        torch.manual_seed(seed)
        problem = make_problem(Dropped(rate).double(), batch=2, steps=2)
        with announced():
            result = problem.solve(RTRL(window=2))
        torch.manual_seed(seed)
        make_problem(Dropped(rate).double(), batch=2, steps=2)
        candidates = [problem.solve(BPTT()) for _ in range(2)]  # the window may have been run once before
        same = [c for c in candidates if torch.allclose(c.outputs, result.outputs, rtol=0, atol=1e-12)]
        assert same
        assert min(worst_error(result.grads, c.grads) for c in same) <= 1e-9


def test_dropout_in_evaluation_is_ordinary() -> None:
    problem = make_problem(Dropped(0.5).double().eval(), batch=2, steps=STEPS)
    memory = RTRL(window=3).init(problem.cell, 2)
    _, _, truth = plain_autograd(problem)
    assert worst_error(run(problem, RTRL(window=3), memory), truth) <= 1e-9
    assert "window" not in parameter_paths(memory).values()


class PowerIteration(UserCell):
    """Spectral normalisation in training: every step refines a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = parametrizations.spectral_norm(nn.Linear(4, 4))

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return torch.tanh(self.input(x) + 2 * self.layer(s))


class Counting(UserCell):
    """A cell that counts its steps in a buffer and forgets more and more."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        steps = self.get_buffer("steps")
        steps += 1
        return torch.tanh(self.input(x) + self.layer(s)) / (1 + 0.1 * steps.clone())


class Averaging(UserCell):
    """Puts a new tensor in a buffer's place at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        s = torch.tanh(self.input(x) + self.layer(s))
        self.mean = 0.9 * self.mean + 0.1 * s.detach().mean(0)
        return s - 0.5 * self.mean


@pytest.mark.parametrize("make", [PowerIteration, Counting, Averaging])
def test_cells_that_change_their_buffers(make: type[UserCell]) -> None:
    torch.manual_seed(0)
    problem = make_problem(make().double(), batch=2, steps=STEPS)
    before = copy.deepcopy(problem.cell.state_dict())
    truth = problem.solve(BPTT()).grads
    after = copy.deepcopy(problem.cell.state_dict())
    problem.cell.load_state_dict(before)
    algorithm = RTRL(window=3)
    with announced():
        found = run(problem, algorithm, algorithm.init(problem.cell, 2))
    assert worst_error(found, truth) <= 1e-9
    assert all(torch.equal(value, after[name]) for name, value in problem.cell.state_dict().items())


# -- lanes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e-11])
@pytest.mark.parametrize("window", [1, 3])
def test_lanes_that_mix_are_refused(window: int, scale: float) -> None:
    problem = make_problem(LaneMean(scale).double(), batch=3, steps=STEPS)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*exact but slow")
        with pytest.raises(ValueError, match=r"lane 0's state depends on other lanes' states"):
            problem.solve(RTRL(window=window))


class FunctionalBatchNorm(UserCell):
    """Batch statistics without a module that could be recognised."""

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return torch.tanh(F.batch_norm(self.input(x) + s, None, None, training=True))


@pytest.mark.parametrize("window", [1, 3])
def test_functional_batch_norm_is_refused(window: int) -> None:
    problem = make_problem(FunctionalBatchNorm().double(), batch=4, steps=STEPS)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*exact but slow")
        with pytest.raises(ValueError, match="depends on other lanes' states"):
            problem.solve(RTRL(window=window))


def test_batch_norm_is_refused() -> None:
    cell = NormalisedBatch()
    with pytest.raises(ValueError, match=r"layer\.1 is a BatchNorm1d: it mixes the lanes.*use LayerNorm or GroupNorm"):
        RTRL(window=3).init(cell, 4)
    with pytest.raises(ValueError, match=r"cells\.0\.layer\.1 is a BatchNorm1d"):
        RTRL(window=3).init(Stack([cell, GRU(4, 2)]), 4)
    for algorithm in (BPTT(), TBPTT(window=3)):  # which have no influence of single lanes
        algorithm.init(cell, 4)


# -- precision -----------------------------------------------------------------------------------------------------


def test_mixed_precision() -> None:
    """Weights in float32, state in float64: right to float32's rounding, and each gradient in its parameter's type."""
    torch.manual_seed(0)
    cell, readout = MixedPrecision(), nn.Linear(4, 2).double()
    inputs = torch.randn(2, STEPS, 3)
    problem = make_problem(cell, inputs=inputs, readout=readout)
    truth = problem.solve(BPTT()).grads
    with announced():
        grads = problem.solve(RTRL(window=2)).grads
    assert {n: g.dtype for n, g in grads.items()} == {n: p.dtype for n, p in problem.names.items()}

    def double(values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.double() for name, value in values.items()}

    assert worst_error(double(grads), double(truth)) <= 1e-5
    assert total_error(double(problem.solve(TBPTT(window=2)).grads), double(truth)) > 1e-2


@pytest.mark.parametrize("hidden", [5, 12])
def test_float32_is_close_to_float64(hidden: int) -> None:
    torch.manual_seed(0)
    cell = Stack([GRU(3, hidden, learned_initial_state=True), UserCellAsLayer(hidden)]).double()
    problem = make_problem(cell, batch=3, steps=60)
    truth = problem.solve(BPTT()).grads
    single = copy.deepcopy(nn.ModuleList([cell, problem.readout])).float()
    targets = problem.targets[0].float(), problem.targets[1].float()
    errors = []
    for algorithm in (RTRL(window=7), BPTT()):
        data = single[0], single[1], problem.inputs.float(), targets
        grads = sequence_gradient(algorithm, *data, weighted_squares).grads
        assert all(g.dtype == torch.float32 for g in grads.values())
        errors.append(total_error({n: g.double() for n, g in grads.items()}, truth))
    assert errors[0] <= 1e-5
    assert errors[0] <= 5 * errors[1]  # no worse than float32 itself
    assert total_error(problem.solve(TBPTT(window=7)).grads, truth) > 1e-2


class UserCellAsLayer(UserCell):
    """A foreign cell on top of a stack."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input_size = width
        self.input, self.weight = nn.Linear(width, 4), nn.Parameter(0.5 * torch.randn(4, 4))

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return torch.tanh(self.input(x) + torch.einsum("ij,bj->bi", self.weight, s))


# -- refusals ------------------------------------------------------------------------------------------------------


class WritesItsState(UserCell):
    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        s += self.input(x)
        return s


class WritesAndForgets(UserCell):
    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        s[:, 0] = x[:, 0]
        return torch.tanh(self.input(x) + s)


@pytest.mark.parametrize("algorithm", [BPTT(), TBPTT(window=3), RTRL(window=3)], ids=repr)
@pytest.mark.parametrize("make", [WritesItsState, WritesAndForgets])
def test_writing_the_given_state_is_refused(make: type[UserCell], algorithm: GradientAlgorithm) -> None:
    """Else all outputs of a window would show its last state."""
    problem = make_problem(make().double())
    with pytest.raises(ValueError, match=r"changes the state it is given in place: return a new tensor"):
        problem.solve(algorithm)


def test_complex_parameters_are_refused() -> None:
    class Complex(UserCell):
        def __init__(self) -> None:
            super().__init__()
            self.decay = nn.Parameter(torch.ones(2, dtype=torch.complex64))

        def forward(self, x: Tensor, s: Tensor) -> Tensor:
            return torch.view_as_real(self.decay * torch.view_as_complex(s.view(-1, 2, 2))).reshape(-1, 4)

    with pytest.raises(ValueError, match=r"decay is complex: keep it as a real parameter"):
        RTRL(window=3).init(Complex(), 2)
