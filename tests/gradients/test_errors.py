"""Wrong arguments: one line that names what was given, what is valid, and what to do."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rtrl_moe_pl.cells import GRU, TorchCell
from rtrl_moe_pl.gradients import (
    BPTT,
    RTRL,
    TBPTT,
    GradientAlgorithm,
    MemoryForecastError,
    SequenceResult,
    rtrl,
    sequence_gradient,
)
from tests.gradients.problem import make_problem
from tests.gradients.user_cells.base import UserCell

ALGORITHMS = [BPTT(), TBPTT(window=3), RTRL(window=3)]
each_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=repr)
DOUBLE = torch.float64


def squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum()


def call(algorithm: GradientAlgorithm, cell: Any = None, **changes: Any) -> SequenceResult:
    """Eight steps of two lanes, with something wrong in them."""
    problem = make_problem(GRU(3, 4).double() if cell is None else cell, steps=8)
    data: dict[str, Any] = {"readout": problem.readout, "inputs": problem.inputs, "targets": problem.targets[0]}
    data |= {"loss_fn": squares} | changes
    return sequence_gradient(algorithm, problem.cell, **data)


@pytest.mark.parametrize("window", [0, -1, True, 2.0, "3", None])
@pytest.mark.parametrize("kind", [RTRL, TBPTT])
def test_window(kind: Any, window: Any) -> None:
    message = f"window must be a whole number of steps, at least 1; got {window!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        kind(window=window)


def _bools(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.bool)


def _reals(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=DOUBLE)


class _Readout(nn.Module):
    """Returns the wrong shape."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, s: Tensor) -> Tensor:
        return {"sum": s.sum(), "first": s[:, 0], "half": s[: len(s) // 2]}[self.kind]


STARTS = r"starts must be a bool tensor of shape \(2, 8\) \[batch, time\]"
BAD_DATA: dict[str, tuple[dict[str, Any], str]] = {
    "starts too short": ({"starts": _bools(2, 5)}, STARTS + r", got torch.bool of shape \(2, 5\)"),
    "starts too long": ({"starts": _bools(2, 12)}, STARTS),
    "starts of other lanes": ({"starts": _bools(3, 8)}, STARTS),
    "starts by lane": ({"starts": _bools(2)}, STARTS),
    "starts as numbers": ({"starts": torch.zeros(2, 8)}, STARTS + ", got torch.float32"),
    "no steps": ({"inputs": _reals(2, 0, 3)}, r"inputs must be \[batch, time, ..\] with at least one step"),
    "no time": ({"inputs": _reals(2)}, r"inputs must be \[batch, time, ..\]"),
    "targets too short": ({"targets": _reals(2, 4, 2)}, r"targets have shape \(2, 4, 2\), inputs are of \(2, 8\)"),
    "targets too long": ({"targets": _reals(2, 9, 2)}, "targets have shape"),
    "one target for all steps": ({"targets": _reals(2, 1, 2)}, "targets have shape"),
    "one target for a lane": ({"targets": _reals(2)}, "targets have shape"),
    "weights too short": ({"targets": (_reals(2, 8, 2), _reals(2, 7))}, r"targets have shape \(2, 7\)"),
    "state of other lanes": ({"state": _reals(3, 4)}, r"state has shape \(3, 4\), the cell's is \(2, 4\)"),
    "state too wide": ({"state": _reals(2, 5)}, r"state has shape \(2, 5\)"),
    "loss by lane": ({"loss_fn": lambda o, t: (o - t).sum((1, 2))}, r"loss_fn returned shape \(2,\): .*one number"),
    "loss without a tensor": ({"loss_fn": lambda o, t: 3.0}, "loss_fn returned float: it must return one number"),
    "readout of all": (
        {"readout": _Readout("sum")},
        r"_Readout returned shape \(\) for \d+ states: .*\[rows, outputs\]",
    ),
    "readout without width": ({"readout": _Readout("first")}, r"_Readout returned shape \(\d+,\) for \d+ states"),
    "readout of too few": ({"readout": _Readout("half")}, r"_Readout returned shape \(\d+, 4\) for \d+ states"),
}


@each_algorithm
@pytest.mark.parametrize("name", sorted(BAD_DATA))
def test_data(name: str, algorithm: GradientAlgorithm) -> None:
    changes, message = BAD_DATA[name]
    with pytest.raises(ValueError, match=message) as caught:
        call(algorithm, **changes)
    assert "\n" not in str(caught.value)


@each_algorithm
@pytest.mark.parametrize("targets", [None, {"labels": _reals(2, 8, 2)}, 3.0, (_reals(2, 8, 2), None)], ids=str)
def test_targets_of_another_type(targets: Any, algorithm: GradientAlgorithm) -> None:
    with pytest.raises(TypeError, match=r"targets must be a tensor \[batch, time, ..\] or a tuple of them, got"):
        call(algorithm, targets=targets)


class Returns(UserCell):
    """A cell whose step returns something else, from some step on."""

    def __init__(self, kind: str, step: int = 0) -> None:
        super().__init__()
        self.kind, self.left = kind, step

    def forward(self, x: Tensor, s: Tensor) -> Any:
        new = torch.tanh(self.input(x) + s)
        self.left -= 1
        if self.left >= 0:
            return new
        return {"wide": torch.cat([new, new], 1), "fewer": new[:1], "pair": (new, new), "none": None}[self.kind]


BAD_STEPS = {
    "wide": r"Returns\.forward returned shape \(2, 8\), .* state of shape \(2, 4\): a cell must return one tensor",
    "fewer": r"Returns\.forward returned shape \(1, 4\)",
    "pair": r"Returns\.forward returned a tuple",
    "none": r"Returns\.forward returned a NoneType",
}


@pytest.mark.filterwarnings("ignore:.*exact but slow")
@each_algorithm
@pytest.mark.parametrize("step", [0, 1, 4])
@pytest.mark.parametrize("kind", sorted(BAD_STEPS))
def test_step_of_the_wrong_shape(kind: str, step: int, algorithm: GradientAlgorithm) -> None:
    cell = Returns(kind, step).double()
    with pytest.raises(ValueError, match=BAD_STEPS[kind]):
        call(algorithm, cell)


class WrongStart(UserCell):
    def initial_state(self, batch_size: int) -> Tensor:
        return torch.zeros(4, dtype=DOUBLE)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return torch.tanh(self.input(x) + s)


@each_algorithm
def test_not_a_cell(algorithm: GradientAlgorithm) -> None:
    wrong = r"WrongStart\.initial_state\(2\) returned shape \(4,\), it must be \[batch_size, state_size\] = \(2, 4\)"
    with pytest.raises(ValueError, match=wrong):
        algorithm.init(WrongStart(), 2)
    with pytest.raises(ValueError, match=r"GRUCell is no cell: it has no state_size and no initial_state; .*TorchCell"):
        algorithm.init(nn.GRUCell(3, 4), 2)
    algorithm.init(TorchCell(nn.GRUCell(3, 4)), 2)


@each_algorithm
def test_other_lanes_under_a_live_memory(algorithm: GradientAlgorithm) -> None:
    problem, other = (make_problem(GRU(3, 4).double(), batch=batch) for batch in (4, 3))
    memory = algorithm.init(problem.cell, 4)
    data = problem.cell, problem.readout
    algorithm.run(*data, problem.inputs, problem.targets[0], squares, memory)
    message = r"got 3 lanes, but the carried state and influence are of 4: the batch size must stay the same"
    with pytest.raises(ValueError, match=message):
        algorithm.run(*data, other.inputs, other.targets[0], squares, memory)


def test_wrong_data_leave_the_memory_as_it_was() -> None:
    """Everything is checked before the first window is run."""
    problem = make_problem(GRU(3, 4).double(), steps=8)
    algorithm = RTRL(window=3)
    memory = algorithm.init(problem.cell, 2)
    data = problem.cell, problem.readout, problem.inputs
    algorithm.run(*data, problem.targets[0], squares, memory)
    state, norm = memory.state.clone(), float(memory.sensitivity.norm())
    for changes in ({"targets": _reals(2, 7, 2)}, {"starts": _bools(2, 7)}):
        arguments: dict[str, Any] = {"targets": problem.targets[0], "loss_fn": squares, "memory": memory, **changes}
        with pytest.raises(ValueError, match=r"\(2, 7"):
            algorithm.run(*data, **arguments)
    assert torch.equal(memory.state, state)
    assert float(memory.sensitivity.norm()) == norm > 0


# -- memory --------------------------------------------------------------------------------------------------------


def test_too_large_for_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before anything is allocated, with the numbers and the way out."""
    cell = GRU(6, 20)  # 1680 parameters, 20 states, float32
    monkeypatch.setattr(rtrl, "free_memory", lambda device: 4_000_000)
    forecast = RTRL(window=5).forecast(cell, 100, torch.float32, 5)
    assert forecast.influence_bytes == 100 * 20 * 1680 * 4
    with pytest.raises(MemoryForecastError) as caught:
        RTRL(window=5).init(cell, 100)
    message = str(caught.value)
    assert "\n" not in message
    assert "RTRL(window=5) needs 13.4 MB for the influence matrix (B=100, S=20, 1680 parameters)" in message
    assert "but 4 MB are free" in message
    found = re.search(r"lower batch_size to (\d+), or use TBPTT", message)
    assert found
    lanes = int(found[1])
    RTRL(window=5).init(cell, lanes)  # the advice holds, and no larger batch would do
    with pytest.raises(MemoryForecastError):
        RTRL(window=5).init(cell, lanes + 2)
    with pytest.raises(MemoryForecastError, match=r"needs 26\.9 MB"):
        RTRL(window=5).init(cell, 100, dtype=torch.float64)
    for algorithm in (BPTT(), TBPTT(window=5)):
        algorithm.init(cell, 100)


def test_too_long_a_chunk_for_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The influence matrix fits, the chunk does not: the advice is the longest that does."""
    cell = GRU(6, 20)
    needed = RTRL(window=5).forecast(cell, 4, torch.float32, 1000)
    monkeypatch.setattr(rtrl, "free_memory", lambda device: needed.total_bytes - 1)
    with pytest.raises(MemoryForecastError, match=r"free: set chunk to (\d+), lower batch_size to 3, or use") as caught:
        RTRL(window=5).init(cell, 4)
    found = re.search(r"set chunk to (\d+)", str(caught.value))
    assert found
    chunk = int(found[1])
    RTRL(window=5, chunk=chunk).init(cell, 4)
    with pytest.raises(MemoryForecastError):
        RTRL(window=5, chunk=chunk + 1).init(cell, 4)


def test_too_large_for_one_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rtrl, "free_memory", lambda device: 1000)
    with pytest.raises(MemoryForecastError, match=r"1 kB are free: make the cell smaller, or use TBPTT"):
        RTRL(window=5).init(GRU(6, 20), 2)


@pytest.mark.parametrize("window", [1, 4, 1000])
def test_forecast_is_what_is_allocated(window: int) -> None:
    """The influence forecast is exact once every parameter has been reached, and does not grow with the length."""
    problem = make_problem(GRU(3, 6, learned_initial_state=True).double(), batch=3, steps=20)
    algorithm = RTRL(window=window)
    memory = algorithm.init(problem.cell, 3)
    assert memory.sensitivity.nbytes == 0
    algorithm.run(problem.cell, problem.readout, problem.inputs, problem.targets[0], squares, memory)
    forecast = algorithm.forecast(problem.cell, 3, DOUBLE, 20)
    assert memory.sensitivity.nbytes == forecast.influence_bytes
    long = algorithm.forecast(problem.cell, 3, DOUBLE, 1_000_000)
    assert long.total_bytes <= algorithm.forecast(problem.cell, 3, DOUBLE, 64).total_bytes
