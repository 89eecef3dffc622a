"""Decide, on a cell's first window, how each of its parameters is differentiated."""

from __future__ import annotations

import torch
from torch import Tensor

from rtrl_moe_pl.cells.routed import RoutedCell
from rtrl_moe_pl.linearization.routed import RoutedInputs, RoutedUpdate
from rtrl_moe_pl.linearization.sparse import Pattern, colour_rows, compress
from rtrl_moe_pl.linearization.step import Evaluation, Plan, StepLinearizer, batched_vjp

PROBE_ROWS = 64


def make_plan(step: StepLinearizer, x: Tensor | RoutedInputs, state: Tensor, previous: Plan | None = None) -> Plan:
    """A plan for rows like x [N, ..], state [N, S].

    Args:
        previous: a plan that did not fit these rows: its patterns are widened by what all of them show (a unit that
            was silent so far, for example).

    Any failure of the cell to run over such rows is the caller's to catch.
    """
    run = step.evaluate(None, x, state, cut=True)
    outside = step.outside_taps(run, None)
    tapped = {name for tap in run.taps for name in (tap.weight, tap.bias) if name}
    per_row = {n for n in outside - tapped if step.parameters[n].ndim <= 1 and _works_per_row(step, x, state, n)}
    plan = _with_patterns(step, x, state, frozenset(per_row), frozenset(outside - per_row), previous)
    # a scalar, or a parameter normalised over its entries, makes derivatives dense: rather keep the state's sparse
    vectors = {name for name in per_row if step.parameters[name].numel() > 1}
    for fewer in (vectors, set()):
        if plan.patterns is None and fewer != per_row:
            other = _with_patterns(step, x, state, frozenset(fewer), frozenset(outside - fewer), previous)
            plan = other if other.patterns is not None else plan
    return plan


def without_taps(step: StepLinearizer, plan: Plan, names: set[str], x: Tensor | RoutedInputs, state: Tensor) -> Plan:
    """A plan that leaves some more parameters to the functional path."""
    return _with_patterns(step, x, state, plan.per_row - names, plan.untapped | names, plan)


def probing_rows(step: StepLinearizer, x: Tensor | RoutedInputs, state: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of some rows, and states for them, every other one random: zeros of a first state hide dependence."""
    rows = torch.linspace(0, state.shape[0] - 1, PROBE_ROWS, device=state.device).round().long()
    states = state[rows]
    states[::2] = step.probe(states[::2])
    return rows, states


def _works_per_row(step: StepLinearizer, x: Tensor | RoutedInputs, state: Tensor, name: str) -> bool:
    """Whether the parameter acts on each row alone: at another value, one copy a row must give the same states.

    At its own value a constant parameter would hide any mixing of its entries, and a single row any mixing of rows.
    """
    rows, state = probing_rows(step, x, state)
    x = x[rows]
    parameter = step.parameters[name].detach()
    value = parameter + 0.05 * (parameter.abs().max() + 1) * step.probe(parameter)
    truth = step.with_value(name, value, x, state)
    tolerance = 1e-10 if truth.dtype == torch.float64 else 1e-4
    for between in range(3):  # dimensions between the rows and its own
        copies = value.expand(state.shape[0], *(1,) * (1 - value.ndim + between), *value.shape)
        try:
            found = step.with_value(name, copies, x, state)
        except Exception:  # whatever a cell raises when its parameter has another shape: it is not element-wise
            continue
        if found.shape == truth.shape and torch.allclose(found, truth, rtol=tolerance, atol=tolerance):
            step.copies_ndim[name] = copies.ndim
            return True
    return False


def _with_patterns(
    step: StepLinearizer,
    x: Tensor | RoutedInputs,
    state: Tensor,
    per_row: frozenset[str],
    untapped: frozenset[str],
    previous: Plan | None,
) -> Plan:
    while True:  # hiding a weight from the taps can show a use of its bias
        plan = Plan((), per_row, untapped)
        run = step.evaluate(plan, x, state, cut=True)
        more = step.outside_taps(run, plan)
        if not more:
            break
        per_row, untapped = per_row - more, untapped | more
    signature = tuple(tap.signature for tap in run.taps)
    own = isinstance(step.cell, RoutedCell | RoutedUpdate) or any(tap.experts is not None for tap in run.taps)
    if own:  # every row has slots or weights of its own: nothing to compose
        return Plan(signature, per_row, untapped)
    rows, states = probing_rows(step, x, state)
    present, batched = _present(step.evaluate(plan, x[rows], states, cut=True), True)
    if previous is not None:
        for begin in range(0, state.shape[0], PROBE_ROWS):
            part = slice(begin, begin + PROBE_ROWS)
            more, batched = _present(step.evaluate(plan, x[part], state[part], cut=True), batched)
            present = [[a | b for a, b in zip(*pair, strict=True)] for pair in zip(present, more, strict=True)]
        if previous.signature == signature and previous.patterns is not None:
            known = [[p.to_bool() for p in row] for row in previous.patterns]
            present = [[a | b for a, b in zip(*pair, strict=True)] for pair in zip(present, known, strict=True)]
    return Plan(signature, per_row, untapped, _compressed(present, state.device), batched)


def _present(run: Evaluation, batched: bool) -> tuple[list[list[Tensor]], bool]:
    """Where every sink depends on every source, bool [V, U]; and whether vmap worked."""
    result: list[list[Tensor]] = []
    for sink in run.sinks:
        size = sink[0].numel()
        eye = torch.eye(size, dtype=sink.dtype, device=sink.device)
        cotangents = eye[:, None].expand(size, sink.shape[0], size).reshape(size, *sink.shape)
        try:
            jacobians = batched_vjp(sink, run.sources, cotangents, batched)
        except RuntimeError:
            batched = False
            jacobians = batched_vjp(sink, run.sources, cotangents, batched)
        result.append([(j.flatten(2) != 0).any(1).cpu() for j in jacobians])
    return result, batched


def _compressed(present: list[list[Tensor]], device: torch.device) -> list[list[Pattern]] | None:
    """Coloured patterns, or None where they are not sparse."""
    result = []
    for row in present:
        colours = colour_rows(row)
        if colours is None:
            return None
        result.append([compress(pattern, colours).to(device) for pattern in row])
    return result
