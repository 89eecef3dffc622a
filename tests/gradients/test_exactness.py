"""RTRL equals backpropagation through time for random cells, shapes, windows, starts and losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rtrl_moe_pl.cells import GRU, LSTM, LeakyIntegrator, SimpleRNN, Stack, TorchCell, VanillaRNN
from rtrl_moe_pl.gradients import BPTT, RTRL, TBPTT
from tests.gradients.problem import (
    EXACT,
    Problem,
    assert_exact,
    make_problem,
    plain_autograd,
    total_error,
    worst_error,
)

Draw = Callable[[st.SearchStrategy[Any]], Any]

CELLS: dict[str, Callable[..., Any]] = {
    "vanilla": lambda d, h, **k: VanillaRNN(d, h, **k),
    "vanilla relu": lambda d, h, **k: VanillaRNN(d, h, nonlinearity="relu", recurrent_init="orthogonal", **k),
    "simple": lambda d, h, **k: SimpleRNN(d, h, **k),
    "gru": lambda d, h, **k: GRU(d, h, **k),
    "gru chrono": lambda d, h, **k: GRU(d, h, max_memory=20, **k),
    "lstm": lambda d, h, **k: LSTM(d, h, **k),
    "lstm chrono": lambda d, h, **k: LSTM(d, h, max_memory=20, **k),
    "integrator": lambda d, h, **k: LeakyIntegrator(d, h, decay=0.9, **k),
    "learned decay": lambda d, h, **k: LeakyIntegrator(d, h, decay=0.8, learned_decay=True, **k),
    "nn.RNNCell": lambda d, h, **k: TorchCell(nn.RNNCell(d, h), **k),
    "nn.GRUCell": lambda d, h, **k: TorchCell(nn.GRUCell(d, h), **k),
    "nn.LSTMCell": lambda d, h, **k: TorchCell(nn.LSTMCell(d, h), **k),
}


@st.composite
def single_cells(draw: Draw, width: int, hidden: st.SearchStrategy[int]) -> Any:
    kind = draw(st.sampled_from(sorted(CELLS)))
    return CELLS[kind](width, draw(hidden), learned_initial_state=draw(st.booleans()))


@st.composite
def stacks(draw: Draw, width: int) -> Any:
    """Two or three layers of any kind; a stack may be a layer, and a layer may stand in two places."""
    layers: list[Any] = []
    for depth in range(draw(st.integers(2, 3))):
        if depth and draw(st.integers(0, 4)) == 0:
            inner = draw(single_cells(width, st.integers(2, 4)))
            layers.append(Stack([inner, draw(single_cells(inner.output_size, st.integers(2, 4)))]))
        else:
            layers.append(draw(single_cells(width, st.integers(2, 5))))
        width = layers[-1].output_size
    if draw(st.integers(0, 4)) == 0:
        layers += [TorchCell(nn.GRUCell(width, width))] * 2
    return Stack(layers)


@st.composite
def problems(draw: Draw, cells: Callable[[int], st.SearchStrategy[Any]]) -> tuple[Problem, int]:
    """A problem and a window."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    batch, steps, width = draw(st.integers(1, 5)), draw(st.integers(1, 12)), draw(st.integers(1, 4))
    cell = draw(cells(width)).double()
    with torch.no_grad():
        for name, parameter in cell.named_parameters():
            if name.split(".")[-1] == "initial":
                parameter.normal_()
            else:
                parameter.mul_(draw(st.sampled_from([0.5, 1.0, 1.5])))
    window = draw(st.sampled_from([1, 2, 3, 5, steps, steps + 3]))
    problem = make_problem(
        cell,
        inputs=torch.randn(batch, steps, width, dtype=torch.float64),
        weights=_weights(draw, batch, steps),
        starts=_starts(draw, batch, steps),
        state=torch.randn(batch, cell.state_size, dtype=torch.float64) if draw(st.booleans()) else None,
        seed=draw(st.integers(0, 1000)),
    )
    return problem, window


def _weights(draw: Draw, batch: int, steps: int) -> Tensor:
    kind = draw(st.sampled_from(["all", "some", "some", "last", "zero"]))
    if kind == "some":
        return torch.rand(batch, steps, dtype=torch.float64) * (torch.rand(batch, steps) < 0.4)
    weights = torch.full((batch, steps), float(kind == "all"), dtype=torch.float64)
    weights[:, -1] = float(kind != "zero")
    return weights


def _starts(draw: Draw, batch: int, steps: int) -> Tensor | None:
    kind = draw(st.sampled_from(["none", "random", "random", "first", "all"]))
    if kind == "none":
        return None
    starts = torch.rand(batch, steps) < {"random": 0.25, "first": 0.0, "all": 1.0}[kind]
    starts[:, 0] |= kind == "first"
    return starts


def assert_all_exact(problem: Problem, window: int) -> None:
    truth = assert_exact(problem, RTRL(window=window))
    result = problem.solve(BPTT())
    assert worst_error(result.grads, truth) <= 1e-10
    if not problem.targets[1].any():
        assert not any(bool(g.any()) for g in problem.solve(RTRL(window=window)).grads.values())


@settings(max_examples=180)
@given(problems(lambda width: single_cells(width, st.integers(2, 12))))
def test_single_cells(case: tuple[Problem, int]) -> None:
    assert_all_exact(*case)


@settings(max_examples=80)
@given(problems(stacks))
def test_stacks(case: tuple[Problem, int]) -> None:
    assert_all_exact(*case)


class NormalisedGRU(nn.Module):
    """A GRU whose state is normalised with gain and bias: dense derivatives, affine LayerNorm, a gated residual."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.state_size = hidden
        self.cell = GRU(width, hidden)
        self.norm = nn.LayerNorm(hidden)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)
        self.first = nn.Parameter(torch.randn(hidden))

    def initial_state(self, batch_size: int) -> Tensor:
        return self.norm(self.first.expand(batch_size, -1))

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return self.norm(s + self.cell(x, s))


@settings(max_examples=60)
@given(
    problems(
        lambda width: st.one_of(
            st.integers(9, 14).map(lambda hidden: SimpleRNN(width, hidden, learned_initial_state=True)),
            st.integers(9, 14).map(lambda hidden: NormalisedGRU(width, hidden)),
        )
    )
)
def test_cells_without_sparse_derivatives(case: tuple[Problem, int]) -> None:
    problem, window = case
    assert_all_exact(problem, window)
    memory = RTRL(window=window).init(problem.cell, problem.inputs.shape[0])
    RTRL(window=window).run(
        problem.cell, problem.readout, problem.inputs, problem.targets, lambda o, t: o.sum(), memory
    )
    assert memory.linearizer is not None
    assert memory.linearizer.is_sparse is False


def _control(kind: str) -> Problem:
    torch.manual_seed(3)
    cell = CELLS[kind](3, 5, learned_initial_state=True).double()
    weights = torch.zeros(3, 11, dtype=torch.float64)
    weights[:, 5:] = 1.0
    starts = torch.zeros(3, 11, dtype=torch.bool)
    starts[0, 2] = starts[1, 6] = True
    return make_problem(cell, inputs=torch.randn(3, 11, 3, dtype=torch.float64), weights=weights, starts=starts)


@pytest.mark.parametrize("window", [1, 3, 4])
@pytest.mark.parametrize("kind", sorted(CELLS))
def test_truncation_is_noticed(kind: str, window: int) -> None:
    """Negative control: what is exact for RTRL is not for TBPTT with the same window."""
    problem = _control(kind)
    truth = assert_exact(problem, RTRL(window=window))
    assert total_error(problem.solve(TBPTT(window=window)).grads, truth) > 1e-3


@pytest.mark.parametrize("kind", sorted(CELLS))
def test_within_one_window_truncation_is_exact(kind: str) -> None:
    """Why every other test here uses windows shorter than the sequence."""
    problem = _control(kind)
    assert_exact(problem, TBPTT(window=11), BPTT())


def test_starts_matter() -> None:
    """Negative control: without them loss and gradient are others."""
    problem = _control("gru")
    _, _, truth = plain_autograd(problem)
    problem.starts = None
    assert total_error(problem.solve(RTRL(window=3)).grads, truth) > 1e-3


@pytest.mark.parametrize("window", [1, 7, 40])
def test_long_sequences(window: int) -> None:
    """Rounding does not pile up over 400 steps; a lane that starts anew forgets all that was before."""
    torch.manual_seed(0)
    cell = Stack([GRU(3, 6, max_memory=40, learned_initial_state=True), LSTM(6, 3, max_memory=40)]).double()
    starts = torch.zeros(3, 400, dtype=torch.bool)
    starts[1, 100] = starts[1, 101] = starts[2, 333] = True
    inputs = torch.randn(3, 400, 3, dtype=torch.float64)
    weights = torch.zeros(3, 400, dtype=torch.float64)
    weights[:, -1] = 1.0
    problem = make_problem(cell, inputs=inputs, starts=starts, weights=weights)
    truth = assert_exact(problem, RTRL(window=window), tolerance=EXACT)
    assert total_error(problem.solve(TBPTT(window=window)).grads, truth) > 1e-2
