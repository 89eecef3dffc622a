"""Local derivatives of one step of a cell, for all rows (time x lane) of a window at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rtrl_moe_pl.linearization.derivatives import Jacobian, PlanMismatch, StepDerivatives, detached, in_tiles
from rtrl_moe_pl.linearization.routed import RoutedInputs
from rtrl_moe_pl.linearization.sparse import Pattern, SparseJacobian
from rtrl_moe_pl.linearization.taps import Tap, TapRecorder

TILE_BYTES = 64 * 1024 * 1024  # of a tile's derivatives: with more, every operation on them passes through memory


@dataclass
class Plan:
    """How a cell's parameters are reached, found on its first window.

    Args:
        signature: the taps it met, in order.
        per_row: parameters replaced by one copy a row (element-wise use).
        untapped: parameters left in the graph: differentiated by the functional path.
        patterns: per sink (0 is the new state), per source (0 is the old state), or None where the cell's own
            derivatives are not sparse and S cotangents are batched instead.
        batched: whether those may go through vmap.
    """

    signature: tuple[tuple[Any, ...], ...]
    per_row: frozenset[str] = frozenset()
    untapped: frozenset[str] = frozenset()
    patterns: list[list[Pattern]] | None = None
    batched: bool = True


@dataclass
class Evaluation:
    """One run of the cell over N rows, with its taps."""

    state: Tensor  # leaf [N, S]
    output: Tensor  # [N, S]
    taps: list[Tap]
    sinks: list[Tensor] = field(init=False)
    sources: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.sources = [self.state, *(tap.output for tap in self.taps)]
        self.sinks = [self.output]
        for tap in self.taps:
            z = tap.input
            if z is not None and z.requires_grad and all(z is not known for known in (self.state, *self.sinks)):
                self.sinks.append(z)

    def sink_of(self, tap: Tap) -> int:
        """Index of the tap's input among the sinks; -1 for the old state itself."""
        if tap.input is self.state:
            return -1
        return next(i for i, sink in enumerate(self.sinks) if sink is tap.input)


class StepLinearizer:
    """Evaluates and differentiates one step of a cell over many rows.

    Args:
        cell: the module.
        names: parameter and buffer names by ``id``.
        parameters: the same tensors by name; only those that require a gradient get one.
    """

    def __init__(self, cell: nn.Module, names: dict[int, str], parameters: dict[str, Tensor]) -> None:
        self.cell = cell
        self.names = names
        self.parameters = parameters
        self.local_names = {id(p): n for n, p in cell.named_parameters(remove_duplicate=False)}
        self.copies_ndim: dict[str, int] = {}  # of parameters that may be copied for every row
        self._probes: dict[tuple[object, ...], Tensor] = {}

    # -- running the cell ------------------------------------------------------------------------------------------

    def evaluate(self, plan: Plan | None, x: Tensor | RoutedInputs, state: Tensor, cut: bool) -> Evaluation:
        """Run the cell once over N rows: x [N, ..], state [N, S]."""
        leaf = state.detach().requires_grad_()
        hidden = plan.untapped | plan.per_row if plan else frozenset()
        names = {key: name for key, name in self.names.items() if name not in hidden}
        recorder = TapRecorder(names, leaf.shape[0], cut)
        copies = {}
        for name in sorted(plan.per_row) if plan else ():
            parameter = self.parameters[name]
            copies[self.local_names[id(parameter)]] = recorder.per_row(name, parameter, self.copies_ndim[name])
        if copies:
            output = recorder.run(lambda a, b: functional_call(self.cell, copies, (a, b)), x, leaf)
        else:
            output = recorder.run(self.cell, x, leaf)
        if not output.requires_grad:
            output = output + 0.0 * leaf.sum()  # a state that depends on nothing differentiable
        if not all(tap.is_unchanged for tap in recorder.taps):
            raise PlanMismatch("the input of a layer is changed in place after the layer has used it")
        return Evaluation(leaf, output, recorder.taps)

    def with_value(self, name: str, value: Tensor, x: Tensor | RoutedInputs, state: Tensor) -> Tensor:
        """The new states [N, S] with another value of a parameter."""
        local = self.local_names[id(self.parameters[name])]
        with torch.no_grad():
            return functional_call(self.cell, {local: value}, (x, state))

    def probe(self, value: Tensor, number: int = 0) -> Tensor:
        """Standard normal numbers of a tensor's shape, the same at every call; the global generators are left alone."""
        key = (value.shape, value.dtype, value.device, number)
        if key not in self._probes:
            generator = torch.Generator(value.device).manual_seed(number)
            self._probes[key] = torch.randn(value.shape, generator=generator, dtype=value.dtype, device=value.device)
        return self._probes[key]

    # -- differentiating it ----------------------------------------------------------------------------------------

    def derivatives(self, plan: Plan, x: Tensor | RoutedInputs, state: Tensor) -> tuple[Tensor, StepDerivatives]:
        """The new states [N, S] and their local derivatives.

        Raises:
            PlanMismatch: if the cell met other taps, or its derivatives do not fit the plan's patterns.
        """
        if plan.patterns is not None:
            return self._compressed(plan, self._run(plan, x, state, cut=True))
        each = state.shape[1] * (state.shape[1] + sum(shape.numel() for *_, shape in plan.signature))  # numbers a row
        rows = max(8, TILE_BYTES // (each * state.itemsize))
        return in_tiles(lambda x, state: self._dense(plan, x, state), x, state, rows)

    def _run(self, plan: Plan, x: Tensor | RoutedInputs, state: Tensor, cut: bool) -> Evaluation:
        """``evaluate``, if the cell meets the plan's taps."""
        run = self.evaluate(plan, x, state, cut)
        if tuple(tap.signature for tap in run.taps) != plan.signature:
            raise PlanMismatch("the cell reached its parameters in another way than before")
        return run

    def outside_taps(self, run: Evaluation, plan: Plan | None) -> set[str]:
        """Trainable parameters that a cut run still depends on: those met in no recognised form."""
        known = plan.untapped if plan else frozenset()
        free = {n: p for n, p in self.parameters.items() if n not in known and p.requires_grad}
        if not free:
            return set()
        probes = [self.probe(sink, i) for i, sink in enumerate(run.sinks)]
        found = torch.autograd.grad(run.sinks, list(free.values()), probes, retain_graph=True, allow_unused=True)
        return {name for name, gradient in zip(free, found, strict=True) if gradient is not None}

    def _dense(self, plan: Plan, x: Tensor | RoutedInputs, state: Tensor) -> tuple[Tensor, StepDerivatives]:
        run = self._run(plan, x, state, cut=False)
        if self.outside_taps(self.evaluate(plan, x, state, cut=True), plan):
            raise PlanMismatch("a parameter is used outside its taps")
        size = run.output.shape[1]
        eye = torch.eye(size, dtype=run.output.dtype, device=run.output.device)
        jacobians = batched_vjp(run.output, run.sources, eye[:, None].expand(-1, *run.output.shape), plan.batched)
        probe = self.probe(run.output)
        truth = torch.autograd.grad(run.output, run.sources, probe, retain_graph=True, materialize_grads=True)
        dense = [j.flatten(2).transpose(0, 1) for j in jacobians]  # [N, S, U]
        scale = torch.stack([expected.abs().max() for expected in truth]).max()
        for jacobian, expected in zip(dense, truth, strict=True):
            found = torch.bmm(probe[:, None], jacobian)[:, 0]
            require_close(found, expected.flatten(1), scale)
        taps: list[tuple[Tap, Jacobian]] = list(zip(detached(run.taps), dense[1:], strict=True))
        return run.output.detach(), StepDerivatives([], dense[0], taps)

    def _compressed(self, plan: Plan, run: Evaluation) -> tuple[Tensor, StepDerivatives]:
        assert plan.patterns is not None
        if len(run.sinks) != len(plan.patterns):
            raise PlanMismatch("the cell's taps depend on each other in another way than before")
        direct = [self._colours(sink, run.sources, row) for sink, row in zip(run.sinks, plan.patterns, strict=True)]
        self._check(plan, run, direct)
        return run.output.detach(), self._compose(run, direct)

    @staticmethod
    def _colours(sink: Tensor, sources: Sequence[Tensor], patterns: Sequence[Pattern]) -> list[SparseJacobian]:
        size = sink.shape[0]
        jacobians = [SparseJacobian(pattern, []) for pattern in patterns]
        for seed in patterns[0].seeds:
            cotangent = seed.to(sink.dtype).expand(size, -1).view_as(sink)
            parts = torch.autograd.grad(sink, sources, cotangent, retain_graph=True, allow_unused=True)
            for jacobian, source, part in zip(jacobians, sources, parts, strict=True):
                values = source.new_zeros(source.shape) if part is None else part
                jacobian.values.append(values.detach().flatten(1))
        return jacobians

    def _check(self, plan: Plan, run: Evaluation, direct: list[list[SparseJacobian]]) -> None:
        """Compare one random cotangent a row with autograd, and find uses of parameters outside the taps."""
        probes = [self.probe(sink, i) for i, sink in enumerate(run.sinks)]
        outside = [p for n, p in self.parameters.items() if n not in plan.untapped and p.requires_grad]
        found = torch.autograd.grad(
            run.sinks, [*run.sources, *outside], probes, retain_graph=bool(plan.untapped), allow_unused=True
        )
        if any(g is not None for g in found[len(run.sources) :]):
            raise PlanMismatch("a parameter is used outside its taps")
        for i, truth in enumerate(found[: len(run.sources)]):
            flat = [probe.flatten(1) for probe in probes]
            parts = [j[i].times_left(p) for p, j in zip(flat, direct, strict=True)]
            total = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
            require_close(total, torch.zeros(()) if truth is None else truth.flatten(1))

    def _compose(self, run: Evaluation, direct: list[list[SparseJacobian]]) -> StepDerivatives:
        """Chain the Jacobians between taps into those of the whole step, last tap first."""
        totals: list[Jacobian] = list(direct[0])
        sparse: list[tuple[SparseJacobian, Tensor | None]] = []
        if not direct[0][0].pattern.is_empty:
            sparse.append((direct[0][0], None))
        dense: Tensor | None = None
        for i in reversed(range(len(run.taps))):
            tap, total = run.taps[i], totals[i + 1]
            if tap.weight is None or tap.input is None or tap.is_lookup or not tap.input.requires_grad:
                continue
            weight = self._weight(tap)  # [U, V]
            sink = run.sink_of(tap)
            before = [] if sink < 0 else direct[sink]
            # where the input is the old state itself, or holds it unchanged, its part of the weight leads to the state
            to_state = weight if sink < 0 else None
            if before and not before[0].pattern.is_empty and _constant(before[0]):
                selection = SparseJacobian(before[0].pattern, [v[:1] for v in before[0].values])
                to_state = weight @ selection.to_dense()[0]
            if to_state is not None:
                if isinstance(total, SparseJacobian):
                    sparse.append((total, to_state))
                else:
                    dense = total @ to_state if dense is None else dense.add_(total @ to_state)
            rest = [j for j, part in enumerate(before) if not part.pattern.is_empty and (j or to_state is None)]
            if not rest:
                continue
            product = _times(total, weight)  # [N, S, V]
            for j in rest:
                if j == 0:
                    dense = run.output.new_zeros(len(product), *run.output.shape[1:] * 2) if dense is None else dense
                    before[0].add_left_product(product, dense)
                else:
                    whole = totals[j]
                    whole = whole.to_dense() if isinstance(whole, SparseJacobian) else whole
                    before[j].add_left_product(product, whole)
                    totals[j] = whole
        return StepDerivatives(sparse, dense, list(zip(detached(run.taps), totals[1:], strict=True)))

    def _weight(self, tap: Tap) -> Tensor:
        """d output / d input of an affine tap, [U, V]; block-diagonal where it acts on several vectors a row."""
        assert tap.weight is not None
        assert tap.input is not None
        weight = self.parameters[tap.weight].detach()
        weight = weight.T if tap.transposed else weight
        copies = tap.input[0].numel() // weight.shape[1]
        if copies == 1:
            return weight
        return torch.kron(torch.eye(copies, dtype=weight.dtype, device=weight.device), weight)


def _times(total: Jacobian, weight: Tensor) -> Tensor:
    """``total @ weight``, [N, S, V]."""
    if isinstance(total, Tensor):
        return total @ weight
    values, rows = total.by_row(weight)
    return torch.bmm(values, rows).transpose(0, 1)


def _constant(jacobian: SparseJacobian) -> bool:
    """Whether every row has the same values: a selection or copy, not a product."""
    return all(bool((values == values[:1]).all()) for values in jacobian.values)


def require_close(found: Tensor, expected: Tensor, scale: Tensor | float = 0.0) -> None:
    """Raise PlanMismatch if two tensors differ by more than rounding, on the scale of the largest expected entry.

    Args:
        scale: of what they are computed with: they may cancel out to something much smaller (a norm of few numbers).
    """
    if not expected.numel():
        return
    wrong = (found - expected).abs().max() > tolerance(expected.dtype, expected.device) * (
        expected.abs().max() + 0.1 * scale
    ) + 1e-30
    if bool(wrong):  # false for NaN: numbers that are not finite are reported where they are used
        raise PlanMismatch("a derivative differs from autograd's")


def tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """Relative to the largest entry, for what is computed in two ways."""
    if dtype == torch.float32 and device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32:
        return 1e-2  # factors are rounded to 10 bits, 5e-4 each
    return {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 5e-2)


def batched_vjp(output: Tensor, inputs: Sequence[Tensor], cotangents: Tensor, batched: bool) -> list[Tensor]:
    """Several cotangents of one output, [C, *output.shape], pulled back to each input: [C, *input.shape]."""

    def pull(cotangent: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, inputs, cotangent, retain_graph=True, materialize_grads=True)

    if batched:
        return list(torch.func.vmap(pull)(cotangents))
    return [torch.stack(parts) for parts in zip(*map(pull, cotangents), strict=True)]
