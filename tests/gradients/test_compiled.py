"""Windows run by torch.compile give what they give eagerly."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rtrl_moe_pl.cells import GRU, Cell, VanillaRNN
from rtrl_moe_pl.gradients import BPTT, RTRL, TBPTT, GradientAlgorithm, WindowResult
from rtrl_moe_pl.gradients.compiled import STEPS, CompiledUnroll
from tests.gradients.problem import Problem, make_problem, weighted_squares
from tests.modules.helpers import data, module, trainer

ALGORITHMS = [BPTT(), TBPTT(window=20), RTRL(window=20)]


def make(cell: Any, steps: int = 45) -> Problem:
    starts = torch.zeros(2, steps, dtype=torch.bool)
    starts[1, steps // 2] = True
    return make_problem(cell, steps=steps, starts=starts)


def run_twice(algorithm: GradientAlgorithm, problem: Problem, device: str = "cpu") -> WindowResult:
    """The second of two runs over the data: the first window of all is eager."""
    memory = algorithm.init(problem.cell, 2, device)
    for _ in range(2):
        result = algorithm.run(
            problem.cell, problem.readout, problem.inputs, problem.targets, weighted_squares, memory, problem.starts
        )
        memory = result.memory
    return result


def assert_equal(found: WindowResult, expected: WindowResult, error: float) -> None:
    pairs = {**found.grads, "outputs": found.outputs}, {**expected.grads, "outputs": expected.outputs}
    for name, truth in pairs[1].items():
        assert float((pairs[0][name] - truth).norm()) <= error * float(truth.norm()), name


class Counting:
    """torch.compile's backend "eager", with the number of times that its graphs were run; their results may be off."""

    def __init__(self, off: float = 0.0) -> None:
        self.runs, self.off = 0, off

    def __call__(self, graph: torch.fx.GraphModule, examples: list[Tensor]) -> Any:
        def run(*inputs: Tensor) -> tuple[Tensor, ...]:
            self.runs += 1
            return tuple(value * (1 + self.off) for value in graph(*inputs))

        return run


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()  # type: ignore[attr-defined]


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=repr)
def test_compiled_is_eager(algorithm: GradientAlgorithm) -> None:
    """Windows of 20 steps are graphs of 10, with starts and without; what is left over is eager."""
    problem, compiled, backend = make(GRU(3, 4, learned_initial_state=True).double()), copy.copy(algorithm), Counting()
    compiled.compile(backend)
    found = run_twice(compiled, problem)
    assert backend.runs == (2 if algorithm.window is None else 6)
    assert_equal(found, run_twice(algorithm, problem), 1e-10)


def test_the_backend_of_autograd_is_eager() -> None:
    problem, compiled = make(GRU(3, 4).double(), steps=4), TBPTT(window=2)
    compiled.compile("aot_eager")
    assert_equal(run_twice(compiled, problem), run_twice(TBPTT(window=2), problem), 1e-10)


def test_a_wrong_graph_shows() -> None:
    problem, compiled = make(GRU(3, 4).double()), TBPTT(window=20)
    compiled.compile(Counting(off=1e-6))
    with pytest.raises(AssertionError):
        assert_equal(run_twice(compiled, problem), run_twice(TBPTT(window=20), problem), 1e-10)


def test_rtrl_notices_a_wrong_graph() -> None:
    problem, compiled = make(GRU(3, 4).double()), RTRL(window=20)
    compiled.compile(Counting(off=1e-3))
    with pytest.warns(UserWarning, match="evaluated together they give other states"):
        found = run_twice(compiled, problem)
    assert_equal(found, run_twice(RTRL(window=20), problem), 1e-10)


class Branches(Cell):
    """A cell that looks at its numbers: no graph."""

    def __init__(self) -> None:
        super().__init__(3, 4)
        self.inner = VanillaRNN(3, 4)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        new = self.inner(x, state)
        return new if bool((x > -100).all()) else -new


def test_what_cannot_be_compiled_is_eager_with_one_warning() -> None:
    problem, compiled = make(Branches().double()), TBPTT(window=10)
    compiled.compile("eager")
    with pytest.warns(UserWarning, match="does not support Branches here") as warned:
        found = run_twice(compiled, problem)
    assert len(warned) == 1
    assert "\n" not in str(warned[0].message)
    assert_equal(found, run_twice(TBPTT(window=10), problem), 0.0)


@pytest.mark.parametrize(("window", "steps"), [(None, 16), (8, 8), (16, 16), (17, 8), (40, 13), (64, 16)])
def test_windows_are_cut_into_equal_graphs(window: int | None, steps: int) -> None:
    assert CompiledUnroll(window).steps == steps <= STEPS


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
def test_inductor_trains_to_the_same_weights(tmp_path: Path) -> None:
    weights = []
    for compile in (False, True):
        model = module(compile=compile)
        trainer(tmp_path).fit(model, datamodule=data(steps_per_batch=8))
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        assert isinstance(model.gradient.unroll, CompiledUnroll) == compile
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-5, atol=1e-6)


def test_no_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("/there/is/none",))
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", _no_compiler)
    problem, compiled = make(VanillaRNN(3, 4).double()), TBPTT(window=2)
    compiled.compile()
    with pytest.warns(UserWarning, match="torch.compile does not support VanillaRNN here"):
        found = run_twice(compiled, problem)
    assert_equal(found, run_twice(TBPTT(window=2), problem), 0.0)


def _no_compiler(*_: Any) -> str:
    from torch._inductor.exc import InvalidCxxCompiler

    raise InvalidCxxCompiler


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("algorithm", [*ALGORITHMS, TBPTT(window=10), RTRL(window=10)], ids=repr)
def test_cuda_graphs_are_eager(algorithm: GradientAlgorithm) -> None:
    """Also where a window is one graph, whose gradients the next window's would overwrite."""
    problem = make(GRU(3, 4).double())
    moved = Problem(
        problem.cell.cuda(),
        problem.readout.cuda(),
        problem.inputs.cuda(),
        (problem.targets[0].cuda(), problem.targets[1].cuda()),
        None if problem.starts is None else problem.starts.cuda(),
    )
    compiled = copy.copy(algorithm)
    compiled.compile()
    assert_equal(run_twice(compiled, moved, "cuda"), run_twice(algorithm, moved, "cuda"), 1e-10)
