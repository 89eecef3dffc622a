"""Plans: what is decided on a first window, and that each guard of a later one fires."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rtrl_moe_pl.cells import GRU, LSTM, LeakyIntegrator, SimpleRNN, VanillaRNN
from rtrl_moe_pl.cli.tf32 import set_tf32, tf32_restored
from rtrl_moe_pl.gradients import RTRL
from rtrl_moe_pl.linearization import OuterTerm, slow
from rtrl_moe_pl.linearization import linearizer as linearizer_module
from rtrl_moe_pl.linearization import step as step_module
from rtrl_moe_pl.linearization.derivatives import PlanMismatch
from rtrl_moe_pl.linearization.linearizer import Linearizer
from rtrl_moe_pl.linearization.planner import make_plan
from rtrl_moe_pl.linearization.slow import functional_terms, pull_back
from rtrl_moe_pl.linearization.sparse import Pattern
from rtrl_moe_pl.linearization.step import Plan, StepLinearizer, require_close, tolerance
from tests.gradients.problem import Problem, assert_exact, make_problem, weighted_squares
from tests.gradients.user_cells import flow, graphs, matrices, vectors

ROWS = 12


def planned(cell: Any, rows: int = ROWS) -> tuple[StepLinearizer, Plan, Tensor, Tensor]:
    """A step linearizer, its plan, and the rows it was made for."""
    cell = cell.double()
    named = {f"cell.{n}": p for n, p in cell.named_parameters()}
    named |= {f"buffer.{n}": b for n, b in cell.named_buffers()}
    step = StepLinearizer(cell, {id(p): n for n, p in named.items()}, named)
    x = torch.randn(rows, 3, dtype=torch.float64)
    state = torch.randn(rows, cell.state_size, dtype=torch.float64)
    return step, make_plan(step, x, state), x, state


# -- decisions -----------------------------------------------------------------------------------------------------

SPARSE: dict[str, tuple[Callable[[], Any], bool]] = {
    "vanilla": (lambda: VanillaRNN(3, 20), True),
    "gru": (lambda: GRU(3, 20), True),
    "lstm": (lambda: LSTM(3, 20), True),
    "integrator": (lambda: LeakyIntegrator(3, 20), True),
    "relu": (lambda: VanillaRNN(3, 20, nonlinearity="relu"), True),
    "softmax gain": (vectors.SoftmaxGain, True),
    "small norm": (lambda: SimpleRNN(3, 6), True),
    "norm": (lambda: SimpleRNN(3, 20), False),
    "affine norm": (vectors.AffineNorm, False),
    "einsum": (matrices.LeftMatrix, True),
}


@pytest.mark.parametrize("name", sorted(SPARSE))
def test_sparse_where_it_can_be(name: str) -> None:
    make, sparse = SPARSE[name]
    _, plan, _, _ = planned(make())
    assert (plan.patterns is not None) == sparse
    assert plan.batched


def test_element_wise_parameters_are_copied_by_row() -> None:
    _, plan, _, _ = planned(vectors.ElementWise())
    assert plan.per_row == {"cell.gain", "cell.bias", "cell.leak"}
    assert plan.untapped == frozenset()


def test_normalised_parameters_are_not() -> None:
    _, plan, _, _ = planned(vectors.SoftmaxGain())
    assert plan.per_row == frozenset()
    assert plan.untapped == {"cell.logits"}


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("use", [lambda p: p.flip(0), lambda p: p.mean(0), lambda p: p.cumsum(0), lambda p: p[0]])
def test_uniform_parameters_are_not_taken_for_element_wise(use: Callable[[Tensor], Tensor], rows: int) -> None:
    """Their value hides how they are used; a zero state, and a single row, would too."""
    for cell in (vectors.UniformVector(use), vectors.ZeroVector(use)):
        step, _, x, state = planned(cell, rows)
        assert "cell.gain" in make_plan(step, x, torch.zeros_like(state)).untapped


def test_plans_ignore_the_global_random_state() -> None:
    cell = GRU(3, 5)
    step, plan, x, state = planned(cell)
    before = torch.get_rng_state()
    again = make_plan(step, x, state)
    step.derivatives(again, x, state)
    assert torch.equal(torch.get_rng_state(), before)
    assert again.signature == plan.signature


# -- guards of the local derivatives -------------------------------------------------------------------------------


def test_no_guard_fires_without_cause() -> None:
    for make, _ in SPARSE.values():
        step, plan, x, state = planned(make())
        outputs, _ = step.derivatives(plan, x, state)
        torch.testing.assert_close(outputs, step.cell(x, state).detach())


def test_other_taps_are_noticed() -> None:
    step, plan, x, state = planned(flow.OtherBranchLater())
    x = x.clamp(-1, 1)
    plan = make_plan(step, x, state)
    step.derivatives(plan, x, state)
    x[0, 0] = 3.0
    with pytest.raises(PlanMismatch, match="reached its parameters in another way than before"):
        step.derivatives(plan, x, state)


@pytest.mark.parametrize("make", [matrices.LeftMatrix, lambda: _NormedEinsum()])
def test_parameters_outside_the_taps_are_noticed(make: Callable[[], Any]) -> None:
    step, plan, x, state = planned(make())
    assert plan.untapped == {"cell.weight"}
    with pytest.raises(PlanMismatch, match="used outside its taps"):
        step.derivatives(replace(plan, untapped=frozenset()), x, state)


class _NormedEinsum(matrices.LeftMatrix):
    """The same with dense derivatives."""

    def __init__(self) -> None:
        super().__init__()
        self.state_size = 12
        self.input, self.weight = nn.Linear(3, 12), nn.Parameter(torch.randn(12, 12))
        self.norm = nn.LayerNorm(12)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return self.norm(super().forward(x, s))


def test_missing_entries_of_a_pattern_are_noticed() -> None:
    """A unit that was silent when the plan was made: its derivative is in no pattern."""
    step, plan, x, state = planned(VanillaRNN(3, 6))
    assert plan.patterns is not None
    row_of = plan.patterns[0][1].row_of.clone()
    row_of[0, 2] = -1
    patterns = [
        [plan.patterns[0][0], Pattern(row_of, plan.patterns[0][1].colour_of), *plan.patterns[0][2:]],
        *plan.patterns[1:],
    ]
    with pytest.raises(PlanMismatch, match="derivative differs from autograd's"):
        step.derivatives(replace(plan, patterns=patterns), x, state)


def test_other_dependence_between_taps_is_noticed() -> None:
    step, plan, x, state = planned(matrices.LayerTwice())
    assert plan.patterns is not None
    assert len(plan.patterns) > 1
    with pytest.raises(PlanMismatch, match="depend on each other in another way"):
        step.derivatives(replace(plan, patterns=plan.patterns[:-1]), x, state)


def test_inputs_changed_in_place_are_noticed() -> None:
    with pytest.raises(PlanMismatch, match="input of a layer is changed in place"):
        planned(graphs.InPlaceAfterFrozen())


def test_wrong_batched_derivatives_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense derivatives come from torch.func.vmap, which is wrong for some operations."""
    step, plan, x, state = planned(SimpleRNN(3, 12))
    step.derivatives(plan, x, state)
    right = step_module.batched_vjp

    def wrong(*args: Any) -> list[Tensor]:
        found = right(*args)
        found[0][3, 5] *= 1.001
        return found

    monkeypatch.setattr(step_module, "batched_vjp", wrong)
    with pytest.raises(PlanMismatch, match="derivative differs from autograd's"):
        step.derivatives(plan, x, state)


@pytest.mark.parametrize("silent", [False, True])
def test_pull_back_does_not_trust_vmap(silent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any wrong cotangent is found, also where the last one, the loss's, is zero; what vmap refuses is looped over."""
    a = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    output = torch.tanh(a).square()
    cotangents = torch.randn(5, 4, 3, dtype=torch.float64)
    cotangents[-1] = 0.0
    expected = torch.stack([torch.autograd.grad(output, a, c, retain_graph=True)[0] for c in cotangents])
    right = slow.batched_vjp

    def wrong(output: Tensor, inputs: Any, cotangents: Tensor, batched: bool) -> list[Tensor]:
        found = right(output, inputs, cotangents, batched)
        if batched and not silent:
            raise RuntimeError("no batching rule")
        if batched:
            found[0][1] *= 2.0
        return found

    monkeypatch.setattr(slow, "batched_vjp", wrong)
    torch.testing.assert_close(pull_back(output, [a], cotangents)[0], expected)


def test_functional_lanes_must_give_the_same_states() -> None:
    cell = flow.DividedByBatch().double()
    inputs, given = torch.randn(1, 2, 3, dtype=torch.float64), torch.randn(1, 2, 4, dtype=torch.float64)
    returned = cell(inputs[0], given[0]).detach()[None]
    states, losses = torch.eye(4, dtype=torch.float64).expand(1, 2, 4, 4), torch.zeros(1, 2, 4, dtype=torch.float64)
    with pytest.raises(PlanMismatch):
        functional_terms(cell, {"cell.weight": cell.weight}, inputs, given, states, losses, returned)


def test_close_is_relative() -> None:
    """Numbers of any size are held to the same digits; what is not finite is reported elsewhere."""
    for size in (1e-12, 1.0, 1e12):
        truth = size * torch.randn(5, dtype=torch.float64)
        require_close(truth * (1 + 1e-13), truth)
        with pytest.raises(PlanMismatch):
            require_close(truth * (1 + 1e-8), truth)
    require_close(torch.full((3,), torch.nan), torch.zeros(3))
    require_close(torch.zeros(0), torch.zeros(0))


# -- guards of a window --------------------------------------------------------------------------------------------


def _run(problem: Problem, window: int = 3) -> tuple[Linearizer, list[str]]:
    memory = RTRL(window=window).init(problem.cell, problem.inputs.shape[0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        RTRL(window=window).run(
            problem.cell, problem.readout, problem.inputs, problem.targets, weighted_squares, memory
        )
    assert memory.linearizer is not None
    return memory.linearizer, [str(w.message) for w in caught]


def test_wrong_factors_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tap whose input is not what autograd says: the parameter is left to the functional path."""
    right = linearizer_module.tap_terms

    def wrong(*args: Any) -> Any:
        terms = right(*args)
        for found in terms.values():
            for term in found:
                if isinstance(term, OuterTerm) and term.inputs is not None:
                    term.inputs = 2 * term.inputs
        return terms

    problem = make_problem(VanillaRNN(3, 4).double())
    assert_exact(problem, RTRL(window=3))
    monkeypatch.setattr(linearizer_module, "tap_terms", wrong)
    linearizer, _ = _run(problem)
    assert set(linearizer.paths.values()) == {"functional"}
    assert_exact(problem, RTRL(window=3))


def test_one_odd_window_is_not_for_good() -> None:
    """A cell that once could not be evaluated in rows takes the fast path again afterwards."""
    cell = flow.OtherBranchLater().double()
    inputs = torch.randn(2, 30, 3, dtype=torch.float64).clamp(-1, 1)
    inputs[0, 10, 0] = 3.0
    linearizer, messages = _run(make_problem(cell, inputs=inputs))
    assert len(messages) == 1
    assert "this window is differentiated as it ran" in messages[0]
    assert not linearizer.needs_graph()
    assert linearizer.paths["cell.layer.weight"] == "taps"


def test_always_odd_is_for_good() -> None:
    problem = make_problem(flow.DividedByBatch().double(), batch=2, steps=20)
    linearizer, messages = _run(problem)
    assert len(messages) == 1
    assert "each window is differentiated as it ran" in messages[0]
    assert linearizer.needs_graph()
    assert set(linearizer.paths.values()) == {"window"}


def test_tolerances_know_of_tf32() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    with tf32_restored():
        set_tf32(False)
        assert tolerance(torch.float32, gpu) == tolerance(torch.float32, cpu) == 1e-4
        set_tf32(True)
        assert tolerance(torch.float32, gpu) == 1e-2
        assert tolerance(torch.float32, cpu) == 1e-4
        assert tolerance(torch.float64, gpu) == 1e-10


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tf32_takes_no_slower_path() -> None:
    """A warning of a slower path would be an error."""
    problem = make_problem(GRU(3, 64).double(), batch=8, steps=64)
    truth = problem.solve(RTRL(window=8)).grads
    cell, readout, inputs = problem.cell.float().cuda(), problem.readout.float().cuda(), problem.inputs.float().cuda()
    targets = tuple(target.float().cuda() for target in problem.targets)
    with tf32_restored():
        set_tf32(True)
        memory = RTRL(window=8).init(cell, 8, "cuda")
        found = RTRL(window=8).run(cell, readout, inputs, targets, weighted_squares, memory).grads
    for name, gradient in truth.items():
        error = (found[name].double().cpu() - gradient).norm() / gradient.norm()
        assert error < 1e-2, name
