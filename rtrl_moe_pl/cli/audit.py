"""The subcommand audit: is the configured gradient what it claims to be, and what will it cost?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import chain, repeat

import torch
from lightning.pytorch import LightningDataModule, Trainer

from rtrl_moe_pl.cells.base import at_least
from rtrl_moe_pl.cli.trial import (
    delivered_by,
    figure,
    first_steps,
    forecast_memory,
    forecast_reasoning,
    prepared,
    print_table,
    puzzles,
    seconds_per_batch,
    seconds_per_step,
)
from rtrl_moe_pl.data import Batch
from rtrl_moe_pl.gradients import BPTT, AuditReport, Comparison, audit_gradient
from rtrl_moe_pl.gradients.memory import free_memory, readable
from rtrl_moe_pl.modules import ReasoningModule, SequenceModule
from rtrl_moe_pl.modules.reasoning_audit import audit_reasoning
from rtrl_moe_pl.modules.requirements import warn_of_shorter_windows


def audit(model: SequenceModule, datamodule: LightningDataModule, trainer: Trainer, steps: int = 200) -> bool:
    """Print the comparison with BPTT in float64 on ``steps`` steps of training data, and a forecast.

    Returns:
        False if an algorithm that claims to be exact is off.
    Raises:
        ValueError: for ``steps`` below 1, or if these steps give no gradient to compare.
    Cost: that of one BPTT over ``steps`` steps, and of one run of the algorithm, in float64.
    """
    at_least(1, "--steps", steps)
    source = prepared(model, datamodule, trainer)
    first = next(source)
    require_room_for_bptt(model, repeat(first), steps)
    source = chain([first], source)
    window = model.gradient.window
    data = first_steps(source, steps if window is None else max(steps, window + 1))
    print(f"audit of {model.gradient!r}, {type(model.cell).__name__}, {describe(data)}, float64 against BPTT")
    report = audit_gradient(
        model.gradient, model.cell, model.readout, data.inputs, data.targets, model.loss, data.starts
    )
    if len(report.zero_gradients) == len(report.parameters):
        raise ValueError(
            f"--steps {steps}: nothing to compare, BPTT gives no parameter a gradient on {describe(data)}: take more "
            "steps, so that some of them have a label, or shorter sequences"
        )
    if not all(map(math.isfinite, report.state_norms)):
        raise ValueError(
            f"audit: the state of {type(model.cell).__name__} becomes NaN or infinite within {steps} steps: there "
            "is no gradient to compare; look at the cell, or take fewer --steps"
        )
    print_gradients(report, "path", {name: p.path for name, p in report.parameters.items()})
    print_norms(report, window or data.inputs.shape[1], data.inputs.shape[1])
    delivered, streams = delivered_by(source, datamodule)
    lanes, columns = delivered[0].starts.shape
    if streams:
        warn_of_shorter_windows(model.gradient, columns)
    forecast = forecast_memory(model, model.gradient, source, columns, streams)
    print(
        f"memory: {readable(forecast.influence_bytes)} for the influence, "
        f"about {readable(forecast.workspace_bytes)} for a window"
    )
    seconds, _ = seconds_per_step(model, model.gradient, delivered)
    print_time(columns * seconds, lanes * columns, "token", model, trainer)
    verdict = "exact" if report.exact and report.passed else "OFF, though it claims to be exact"
    rounded = getattr(model.gradient, "influence_dtype", None)
    why = f" (it rounds the influence to {rounded})" if rounded else ""
    print(f"verdict: {verdict if report.exact else f'approximate, as it claims{why}'}")
    return report.passed


def audit_puzzles(model: ReasoningModule, datamodule: LightningDataModule, trainer: Trainer, steps: int = 2) -> bool:
    """Print two comparisons in float64 on ``steps`` supervision steps, and a forecast.

    What training uses is held against another computation of the same, in which the first rounds are numbers and the
    others a model of their own; and against the gradient through all rounds, of which it is a truncation.

    Returns:
        False if it is not what it claims to be.
    Raises:
        TypeError, ValueError: for ``steps`` below 1, or data that are no puzzles.
    """
    stream, decoder = puzzles(model, prepared(model, datamodule, trainer)), model.decoder
    rounds = f"the last {decoder.grad_cycles} of {decoder.h_cycles} rounds"
    cached = " and the context of lanes that begin" if model.mode == "cached" else ""
    report = audit_reasoning(model, stream, steps)
    print(
        f"audit of {type(decoder).__name__}, {type(model.encoder).__name__}, mode {model.mode}, {stream.batch_size} "
        f"lanes x {steps} supervision steps, float64: gradients through {rounds}{cached}"
    )
    print("relative error: of the same computed otherwise; cosine and share of norm: beside gradients through all")
    shares = {
        name: p.norm / p.reference_norm if p.reference_norm else 0.0 for name, p in report.whole.parameters.items()
    }
    print_gradients(report.used, "share", {name: f"{share:.3f}" for name, share in shares.items()}, report.whole)
    kept = forecast_reasoning(model, stream).workspace_bytes
    print(f"memory: about {readable(kept)} for the way back of a batch")
    print_time(seconds_per_batch(model, stream), stream.batch_size * model.shape.cells, "cell", model, trainer)
    if not report.used.passed:
        verdict = f"OFF, though it claims to be the gradient through {rounds}{cached}"
    elif report.whole.exact:
        verdict = "exact within a supervision step"
    else:
        verdict = f"approximate, as it claims: through {rounds}{cached}; cosine {report.whole.cosine:.3f} with all"
    print(f"verdict: {verdict}")
    return report.used.passed


def require_room_for_bptt(model: SequenceModule, source: Iterator[Batch], steps: int) -> None:
    """Refuse more steps than BPTT in float64 has memory for."""
    needed, free = forecast_memory(model, BPTT(), source, steps, False).total_bytes, free_memory(model.device)
    needed = needed * torch.float64.itemsize // model.dtype.itemsize  # type: ignore[union-attr]
    if needed > free:
        raise ValueError(
            f"--steps {steps}: BPTT in float64 would take about {readable(needed)}, and {readable(free)} are free: "
            f"take at most about {steps * free // needed}"
        )


def describe(batch: Batch) -> str:
    lanes, steps = batch.starts.shape
    return f"{lanes} lanes x {steps} steps with {int(batch.starts.sum())} starts"


def print_gradients(
    report: Comparison, title: str, last: Mapping[str, str], directions: Comparison | None = None
) -> None:
    """A line per parameter.

    Args:
        title, last: of the last column, by parameter.
        directions: whose cosines are shown, if they are not the report's.
    """
    directions = report if directions is None else directions
    rows = [
        (name, f"{p.relative_error:.2e}", f"{directions.parameters[name].cosine:.6f}", f"{p.norm:.3g}", last[name])
        for name, p in report.parameters.items()
    ]
    rows.append(("all", f"{report.relative_error:.2e}", f"{directions.cosine:.6f}", "", ""))
    print_table(("parameter", "relative error", "cosine", "norm", title), rows)
    print(f"parameters without gradient: {', '.join(report.zero_gradients) or 'none'}")


def print_norms(report: AuditReport, window: int, steps: int) -> None:
    """State and influence norms after every window, thinned to about ten."""
    stride = -(-len(report.state_norms) // 10)
    print("after step  state norm  influence norm")
    for index in reversed(range(len(report.state_norms) - 1, -1, -stride)):
        step = min((index + 1) * window, steps)
        print(f"{step:10d}  {report.state_norms[index]:10.3g}  {report.influence_norms[index]:14.4g}")


def print_time(
    seconds: float, items: int, name: str, model: SequenceModule | ReasoningModule, trainer: Trainer
) -> None:
    """Measured on this machine, in the precision of training."""
    total = f", {figure(trainer.max_steps * model.update_every * seconds)} s for {trainer.max_steps} updates"
    print(
        f"time: {figure(1e3 * seconds)} ms a batch, {figure(1e6 * seconds / items)} us a {name}"
        + (total if trainer.max_steps > 0 else "")
    )
