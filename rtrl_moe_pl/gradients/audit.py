"""Hold an algorithm's gradient against backpropagation through time, in float64."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rtrl_moe_pl.gradients.base import GradientAlgorithm, named_parameters
from rtrl_moe_pl.gradients.memory import Memory
from rtrl_moe_pl.gradients.reverse import BPTT
from rtrl_moe_pl.gradients.sequence import sequence_gradient
from rtrl_moe_pl.gradients.windows import LossFunction, Targets, slice_time, unroll

EXACT_TOLERANCE = 1e-9


@dataclass(frozen=True)
class ParameterAudit:
    """One parameter's gradient beside BPTT's.

    Args:
        relative_error: norm of the difference over the norm of BPTT's; 0 where both are zero.
        cosine: NaN where one of them is zero.
        norm, reference_norm: of the algorithm's gradient and of BPTT's.
        path: how the algorithm differentiates it, empty if it keeps no record.
    """

    relative_error: float
    cosine: float
    norm: float
    reference_norm: float
    path: str


@dataclass(frozen=True)
class Comparison:
    """Gradients beside those of a reference.

    Args:
        exact: whether they claim to be those of the reference.
        relative_error, cosine: of all parameters together.
        parameters: by public name.
    """

    exact: bool
    relative_error: float
    cosine: float
    parameters: dict[str, ParameterAudit]

    @property
    def zero_gradients(self) -> list[str]:
        """Parameters that the reference gives no gradient on this data."""
        return [name for name, p in self.parameters.items() if p.reference_norm == 0]

    @property
    def passed(self) -> bool:
        """False if what claims to be exact is off by more than 1e-9, or not finite."""
        return not self.exact or self.relative_error <= EXACT_TOLERANCE


@dataclass(frozen=True)
class AuditReport(Comparison):
    """The whole comparison of an algorithm with BPTT.

    Args:
        state_norms, influence_norms: mean over lanes of the state's norm, and norm of P as last advanced, after every
            window.
        loss: summed over lanes and steps.
    """

    state_norms: list[float]
    influence_norms: list[float]
    loss: float


def parameter_paths(memory: Memory) -> dict[str, str]:
    """Which path each recurrent parameter took: taps, functional, window, initial state or unused.

    Empty for algorithms that carry no influence, and before the first window.
    """
    return {} if memory.linearizer is None else memory.linearizer.paths


def audit_gradient(
    algorithm: GradientAlgorithm,
    cell: nn.Module,
    readout: nn.Module,
    inputs: Tensor,  # [B, T, ..]
    targets: Targets,
    loss_fn: LossFunction,
    starts: Tensor | None = None,  # [B, T] bool
) -> AuditReport:
    """Compare ``algorithm`` with BPTT over the whole sequence, on float64 copies of cell and readout.

    The copies are put in evaluation mode: with dropout no two runs would be comparable.

    Raises:
        ValueError: if the sequence is not longer than the algorithm's window, where every algorithm equals BPTT.
    """
    steps = inputs.shape[1]
    if algorithm.window is not None and steps <= algorithm.window:
        raise ValueError(
            f"an audit over {steps} steps says nothing about {algorithm}: within one window every algorithm equals "
            f"BPTT; give at least {algorithm.window + 1} steps"
        )
    algorithm = copy.copy(algorithm)
    algorithm.unroll = unroll  # of the copies nothing is compiled, and what training has compiled is left alone
    # one copy, so that tensors shared by cell and readout stay shared
    modules = copy.deepcopy(nn.ModuleDict({"cell": cell, "readout": readout})).double().eval()
    cell, readout = modules["cell"], modules["readout"]
    inputs, targets = _double(inputs), _double(targets)
    reference = sequence_gradient(BPTT(), cell, readout, inputs, targets, loss_fn, starts=starts).grads

    memory = algorithm.init(cell, inputs.shape[0], inputs.device, torch.float64)
    grads = {name: torch.zeros_like(p) for name, p in named_parameters(cell, readout).items()}
    length = algorithm.window or steps
    state_norms, influence_norms, loss = [], [], 0.0
    for begin in range(0, steps, length):
        end = min(begin + length, steps)
        part = None if starts is None else starts[:, begin:end]
        cut = slice_time(targets, begin, end)
        result = algorithm.step(cell, readout, inputs[:, begin:end], cut, loss_fn, memory, part)
        for name, gradient in result.grads.items():
            grads[name] += gradient
        loss += float(result.loss)
        state_norms.append(float(torch.linalg.vector_norm(memory.state, dim=1).mean()))
        # reading the influence advances it: every other window is compared through the tail, the rest through P
        reads = len(state_norms) % 2 == 1 or end == steps
        influence_norms.append(float((memory.sensitivity if reads else memory.base).norm()))

    compared = compare_gradients(grads, reference, algorithm.exact, parameter_paths(memory))
    return AuditReport(**vars(compared), state_norms=state_norms, influence_norms=influence_norms, loss=loss)


def compare_gradients(
    grads: Mapping[str, Tensor], reference: Mapping[str, Tensor], exact: bool, paths: Mapping[str, str] | None = None
) -> Comparison:
    """Gradients of the same parameters beside those of a reference, all in one dtype.

    Args:
        exact: whether they claim to be equal.
        paths: how each parameter is differentiated, where that is known.
    """
    flat = torch.cat([gradient.flatten() for gradient in grads.values()])
    truth = torch.cat([reference[name].flatten() for name in grads])
    parameters = {name: _audit(grads[name], reference[name], (paths or {}).get(name, "")) for name in grads}
    return Comparison(exact, *_compare(flat, truth), parameters)


def _audit(gradient: Tensor, reference: Tensor, path: str) -> ParameterAudit:
    error, cosine = _compare(gradient.flatten(), reference.flatten())
    return ParameterAudit(error, cosine, float(gradient.norm()), float(reference.norm()), path)


def _compare(gradient: Tensor, reference: Tensor) -> tuple[float, float]:
    difference, size = float((gradient - reference).norm()), float(reference.norm())
    error = 0.0 if difference == 0 else difference / size if size else float("inf")
    both = float(gradient.norm()) * size
    return error, float(gradient @ reference) / both if both else float("nan")


def _double(value: Targets) -> Targets:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return tuple(_double(part) for part in value)
