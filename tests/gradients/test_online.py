"""With an update after every window: what the carried influence then means, against an independent oracle.

The gradient of window w is d loss_w / d delta for one offset delta added to the parameters of all windows up to w,
while the increments between them are held: theta_v = theta_0 + delta + (frozen increments before v).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from rtrl_moe_pl.cells import GRU, LSTM, RecurrentMoE, SimpleRNN, Stack, VanillaRNN
from rtrl_moe_pl.gradients import RTRL, TBPTT, BlockRTRL, GradientAlgorithm, LazyExpertRTRL, rtrl
from rtrl_moe_pl.linearization import Tail
from rtrl_moe_pl.linearization.backward import MatrixBackward, TapBackward
from tests.gradients.problem import Problem, make_problem, total_error, weighted_squares, worst_error
from tests.gradients.user_cells.matrices import LeftMatrix, TiedForwardAndBack
from tests.gradients.user_cells.modules import Tokens
from tests.gradients.user_cells.vectors import InitialFromStep, NormTwice

STEPS, WINDOW = 12, 3
Values = dict[str, Tensor]


class _Run(nn.Module):
    """A window under the public names, so that parameters can be replaced by numbers."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.cell, self.readout = problem.cell, problem.readout

    def forward(self, inputs: Tensor, state: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for t in range(inputs.shape[1]):
            state = torch.where(starts[:, t, None], self.cell.initial_state(inputs.shape[0]), state)
            state = self.cell(inputs[:, t], state)
            outputs.append(self.readout(state))
        return torch.stack(outputs, 1), state


def window_gradient(problem: Problem, values: list[Values]) -> Values:
    """d (loss of the last window) / d delta, with ``values[v] + delta`` in window v."""
    run = _Run(problem)
    deltas = {name: torch.zeros_like(p, requires_grad=True) for name, p in problem.names.items()}
    state = problem.cell.initial_state(problem.inputs.shape[0]).detach()
    assert problem.starts is not None
    loss = torch.zeros(())
    for v, numbers in enumerate(values):
        part = slice(v * WINDOW, (v + 1) * WINDOW)
        shifted = {name: numbers[name] + delta for name, delta in deltas.items()}
        data = problem.inputs[:, part], state, problem.starts[:, part]
        outputs, state = functional_call(run, shifted, data)
        wanted, weights = problem.targets
        loss = weighted_squares(outputs, (wanted[:, part], weights[:, part]))
    found = torch.autograd.grad(loss, list(deltas.values()), materialize_grads=True)
    return dict(zip(deltas, found, strict=True))


def train(problem: Problem, algorithm: GradientAlgorithm, rate: float = 0.05) -> tuple[list[Values], list[Values]]:
    """Online gradient descent: the values used in every window, and the gradient found there."""
    memory = algorithm.init(problem.cell, problem.inputs.shape[0])
    assert problem.starts is not None
    wanted, weights = problem.targets
    values, grads = [], []
    for begin in range(0, STEPS, WINDOW):
        part = slice(begin, begin + WINDOW)
        values.append({name: p.detach().clone() for name, p in problem.names.items()})
        result = algorithm.step(
            problem.cell,
            problem.readout,
            problem.inputs[:, part],
            (wanted[:, part], weights[:, part]),
            weighted_squares,
            memory,
            problem.starts[:, part],
        )
        grads.append(result.grads)
        with torch.no_grad():
            for name, p in problem.names.items():
                p -= rate * result.grads[name]
    return values, grads


CELLS: dict[str, Callable[[], Any]] = {
    "vanilla": lambda: VanillaRNN(3, 5, learned_initial_state=True),
    "gru": lambda: GRU(3, 5, learned_initial_state=True),
    "simple, dense": lambda: SimpleRNN(3, 10, learned_initial_state=True),
    "stack": lambda: Stack([LSTM(3, 3), GRU(3, 4, learned_initial_state=True)]),
    "functional": LeftMatrix,
    "tied": TiedForwardAndBack,
    "initial from step": InitialFromStep,
    "norms": NormTwice,
}


ROUTED: dict[str, Callable[[], Any]] = {
    "mixture": lambda: RecurrentMoE(3, 4, num_slots=4, num_experts=6, write_slots=1, active_experts=1),
    "mixture, learned start": lambda: RecurrentMoE(3, 4, num_slots=3, num_experts=4, learned_initial_state=True),
}


def _problem(kind: str) -> Problem:
    torch.manual_seed(4)
    cell = (CELLS | ROUTED)[kind]().double()
    starts = torch.zeros(3, STEPS, dtype=torch.bool)
    starts[:, 0] = True
    starts[1, 4] = starts[2, 9] = True
    weights = torch.ones(3, STEPS, dtype=torch.float64)
    weights[:, 3:6] = 0.0
    return make_problem(cell, batch=3, steps=STEPS, starts=starts, weights=weights)


@pytest.mark.parametrize("chunk", [None, 1, WINDOW, 2 * WINDOW])
@pytest.mark.parametrize("kind", sorted(CELLS))
def test_shared_offset(kind: str, chunk: int | None) -> None:
    problem = _problem(kind)
    values, grads = train(problem, RTRL(window=WINDOW, chunk=chunk))
    for w in range(len(values)):
        truth = window_gradient(problem, values[: w + 1])
        assert worst_error(grads[w], truth) <= 1e-10
    # controls: neither a replay of the past at the present weights, nor forgetting it, gives this
    last = len(values) - 1
    replayed = window_gradient(problem, [values[last]] * len(values))
    assert total_error(replayed, window_gradient(problem, values)) > 1e-3
    used, truncated = train(_problem(kind), TBPTT(window=WINDOW))
    assert total_error(truncated[last], window_gradient(problem, used)) > 1e-3


@pytest.mark.parametrize("chunk", [None, WINDOW])
@pytest.mark.parametrize("catch_up", [None, "walk", "tree", "block"])
@pytest.mark.parametrize("kind", sorted(ROUTED))
def test_shared_offset_of_what_is_chosen(kind: str, catch_up: Any, chunk: int | None) -> None:
    """By blocks and with lazy experts; the oracle chooses as the run did, for its values are the same."""
    algorithm = BlockRTRL(WINDOW, chunk)
    if catch_up is not None:
        algorithm = LazyExpertRTRL(WINDOW, ring=2, chunk=chunk, catch_up=catch_up)
    problem = _problem(kind)
    values, grads = train(problem, algorithm)
    for w in range(len(values)):
        assert worst_error(grads[w], window_gradient(problem, values[: w + 1])) <= 1e-10
    last = len(values) - 1
    used, truncated = train(_problem(kind), TBPTT(window=WINDOW))
    assert total_error(truncated[last], window_gradient(problem, used)) > 1e-3


@pytest.mark.parametrize("forgetful", [False, True])
@pytest.mark.parametrize("cell", [VanillaRNN, GRU])
def test_a_chunk_keeps_the_weights_it_was_run_with(
    cell: type[VanillaRNN | GRU], forgetful: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows not yet part of P go on as they were differentiated; with the weights of today (control) it fails."""
    if forgetful:
        pull_back = rtrl.pull_back

        def with_the_weights_of_today(tail: Tail, *rest: Any) -> Any:
            steps = tail.backward
            if isinstance(steps, TapBackward):
                steps.weight = [steps.weight[-1]] * len(tail)
            elif isinstance(steps, MatrixBackward):
                steps.transitions = [steps.transitions[-1]] * len(tail)
            return pull_back(tail, *rest)

        monkeypatch.setattr(rtrl, "pull_back", with_the_weights_of_today)
    torch.manual_seed(4)
    starts = torch.zeros(3, STEPS, dtype=torch.bool)
    starts[:, 0] = True
    problem = make_problem(cell(3, 5).double(), batch=3, steps=STEPS, starts=starts)
    values, grads = train(problem, RTRL(window=WINDOW, chunk=STEPS))
    errors = [total_error(grads[w], window_gradient(problem, values[: w + 1])) for w in range(len(values))]
    assert max(errors) > 1e-3 if forgetful else max(errors) <= 1e-10


def test_parameter_shared_with_the_readout() -> None:
    """A table that is also the readout's weight: offset in its use as input, in the cell and in the readout."""

    class Tied(nn.Module):
        def __init__(self, table: nn.Parameter) -> None:
            super().__init__()
            self.table = table

        def forward(self, s: Tensor) -> Tensor:
            return s @ self.table[:2].T

    torch.manual_seed(0)
    cell = Tokens().double()
    table = cell.table.weight
    assert isinstance(table, nn.Parameter)
    starts = torch.zeros(2, STEPS, dtype=torch.bool)
    starts[:, 0] = starts[1, 7] = True
    problem = make_problem(cell, inputs=torch.randint(0, 5, (2, STEPS)), readout=Tied(table), starts=starts)
    values, grads = train(problem, RTRL(window=WINDOW, chunk=2 * WINDOW))
    for w in range(len(values)):
        truth = window_gradient(problem, values[: w + 1])
        assert truth.keys() == {"cell.input.weight", "cell.input.bias", "cell.table.weight"} | {
            "cell.layer.weight",
            "cell.layer.bias",
        }
        assert worst_error(grads[w], truth) <= 1e-10
