"""One gradient problem, its gradient by a plain autograd loop written here alone, and the comparison."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rtrl_moe_pl.gradients import RTRL, GradientAlgorithm, SequenceResult, sequence_gradient

EXACT = 1e-9
OUTPUTS = 2


def weighted_squares(outputs: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
    """sum_t weight_t |output_t - target_t|^2 / 2, over outputs [B, k, O]."""
    wanted, weights = targets
    return 0.5 * (weights * (outputs - wanted).square().sum(-1)).sum()


@dataclass
class Problem:
    """Everything that ``sequence_gradient`` is given but the algorithm."""

    cell: Any
    readout: nn.Module
    inputs: Tensor  # [B, T, ..]
    targets: tuple[Tensor, Tensor]  # [B, T, O] and weights [B, T]
    starts: Tensor | None = None  # [B, T]
    state: Tensor | None = None  # [B, S]
    names: dict[str, nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.names = dict(nn.ModuleDict({"cell": self.cell, "readout": self.readout}).named_parameters())

    def solve(self, algorithm: GradientAlgorithm) -> SequenceResult:
        return sequence_gradient(
            algorithm,
            self.cell,
            self.readout,
            self.inputs,
            self.targets,
            weighted_squares,
            starts=self.starts,
            state=self.state,
        )


def make_problem(
    cell: Any,
    batch: int = 2,
    steps: int = 9,
    inputs: Tensor | None = None,
    width: int = 3,
    seed: int = 0,
    **settings: Any,
) -> Problem:
    """A problem with random data for a float64 cell; a loss at every step unless ``settings`` say otherwise."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if inputs is None:
        inputs = draw(batch, steps, width)
    batch, steps = inputs.shape[:2]
    if "readout" not in settings:
        readout = nn.Linear(cell.state_size, OUTPUTS).double()
        with torch.no_grad():
            for parameter in readout.parameters():
                parameter.copy_(draw(*parameter.shape))
        settings["readout"] = readout
    weights = settings.pop("weights", torch.ones(batch, steps, dtype=torch.float64))
    return Problem(cell, inputs=inputs, targets=(draw(batch, steps, OUTPUTS), weights), **settings)


def plain_autograd(problem: Problem) -> tuple[float, Tensor, dict[str, Tensor]]:
    """Loss, outputs [B, T, O] and gradients by one loop over all steps, a readout at a time."""
    cell, inputs = problem.cell, problem.inputs
    batch, steps = inputs.shape[:2]
    state = cell.initial_state(batch) if problem.state is None else problem.state
    outputs, penalties = [], []
    for t in range(steps):
        if problem.starts is not None:
            keep = (~problem.starts[:, t, None]).to(state.dtype)
            state = keep * state + (1 - keep) * cell.initial_state(batch)
        if hasattr(cell, "auxiliary"):
            penalties.append(cell.auxiliary(inputs[:, t], state))
        state = cell(inputs[:, t], state)
        takes_input = getattr(problem.readout, "takes_input", False)
        outputs.append(problem.readout(state, inputs[:, t]) if takes_input else problem.readout(state))
    joined = torch.stack(outputs, 1)
    loss = weighted_squares(joined, problem.targets)
    loss = loss + sum(penalty.sum() for penalty in penalties if penalty is not None)
    trained = {name: p for name, p in problem.names.items() if p.requires_grad}
    found = torch.autograd.grad(loss, list(trained.values()), materialize_grads=True)
    grads = {name: torch.zeros_like(p) for name, p in problem.names.items()}
    grads |= dict(zip(trained, found, strict=True))
    return float(loss.detach()), joined.detach(), grads


def worst_error(grads: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Largest relative error of any parameter; one whose gradient is below 1e-4 of the whole is held to that."""
    assert grads.keys() == truth.keys()
    total = float(torch.stack([g.norm() for g in truth.values()]).norm())
    errors = [0.0]
    for name, expected in truth.items():
        difference = float((grads[name] - expected).norm())
        if difference:
            errors.append(difference / max(float(expected.norm()), 1e-4 * total, 1e-300))
    return max(errors)


def total_error(grads: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Relative error of all parameters together."""
    difference = torch.cat([(grads[n] - g).flatten() for n, g in truth.items()])
    return float(difference.norm() / torch.cat([g.flatten() for g in truth.values()]).norm())


def assert_exact(problem: Problem, *algorithms: GradientAlgorithm, tolerance: float = EXACT) -> dict[str, Tensor]:
    """The algorithms' losses, outputs, states and gradients are those of the plain loop, which are returned.

    RTRL is also run with P advanced after every window, and after every other one.
    """
    loss, outputs, truth = plain_autograd(problem)
    chunked = []
    for algorithm in algorithms:
        if isinstance(algorithm, RTRL) and algorithm.window and algorithm.chunk is None:
            for count in (1, 2):
                chunked.append(copy.copy(algorithm))
                chunked[-1].chunk = count * algorithm.window
    for algorithm in (*algorithms, *chunked):
        result = problem.solve(algorithm)
        assert worst_error(result.grads, truth) <= tolerance, algorithm
        assert abs(result.loss - loss) <= tolerance * max(1.0, abs(loss)), algorithm
        torch.testing.assert_close(result.outputs, outputs, rtol=tolerance, atol=tolerance)
    return truth
