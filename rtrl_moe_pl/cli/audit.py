"""The subcommand audit: is the configured gradient what it claims to be, and what will it cost?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import torch
from lightning.pytorch import LightningDataModule, Trainer

from rtrl_moe_pl.cells.base import at_least
from rtrl_moe_pl.data import Batch
from rtrl_moe_pl.gradients import AuditReport, audit_gradient
from rtrl_moe_pl.gradients.memory import readable
from rtrl_moe_pl.modules import SequenceModule

TIMED_BATCHES = 3


def audit(model: SequenceModule, datamodule: LightningDataModule, trainer: Trainer, steps: int) -> bool:
    """Print the comparison with BPTT in float64 on ``steps`` steps of training data, and a forecast.

    Returns:
        False if an algorithm that claims to be exact is off.
    Raises:
        ValueError: for ``steps`` below 1, or if these steps give no gradient to compare.
    Cost: that of one BPTT over ``steps`` steps, and of one run of the algorithm, in float64.
    """
    at_least(1, "--steps", steps)
    model.to(trainer.strategy.root_device)
    datamodule.prepare_data()
    datamodule.setup("fit")
    window = model.gradient.window
    data = joined(batches(model, datamodule), steps if window is None else max(steps, window + 1))
    print(f"audit of {model.gradient!r}, {type(model.cell).__name__}, {describe(data)}, float64 against BPTT")
    report = audit_gradient(
        model.gradient, model.cell, model.readout, data.inputs, data.targets, model.loss, data.starts
    )
    if len(report.zero_gradients) == len(report.parameters):
        raise ValueError(
            f"--steps {steps}: nothing to compare, BPTT gives no parameter a gradient on {describe(data)}: take more "
            "steps, so that some of them have a label, or shorter sequences"
        )
    print_gradients(report)
    print_norms(report, window or data.inputs.shape[1], data.inputs.shape[1])
    print_forecast(model, datamodule, trainer)
    verdict = "exact" if report.exact and report.passed else "OFF, though it claims to be exact"
    print(f"verdict: {verdict if report.exact else 'approximate, as it claims'}")
    return report.passed


def batches(model: SequenceModule, datamodule: LightningDataModule) -> Iterator[Batch]:
    """Training batches, on the model's device, without a running trainer."""
    while True:  # a loader's epoch may be shorter than what is needed
        for request in datamodule.train_dataloader():
            moved = datamodule.transfer_batch_to_device(request, model.device, 0)
            yield datamodule.on_after_batch_transfer(moved, 0)


def joined(source: Iterator[Batch], steps: int) -> Batch:
    """The first ``steps`` steps of consecutive batches: lanes go on, or start anew, as in training."""
    parts = [next(source)]
    while sum(part.inputs.shape[1] for part in parts) < steps:
        parts.append(next(source))
    inputs, labels, weights, starts = (
        torch.cat(pieces, 1)[:, :steps]
        for pieces in zip(*((part.inputs, *part.targets, part.starts) for part in parts), strict=True)
    )
    return Batch(inputs, (labels, weights), starts)


def describe(batch: Batch) -> str:
    lanes, steps = batch.starts.shape
    return f"{lanes} lanes x {steps} steps with {int(batch.starts.sum())} starts"


def print_gradients(report: AuditReport) -> None:
    width = max(len(name) for name in report.parameters)
    print(f"{'parameter':{width}}  relative error     cosine       norm  path")
    for name, p in report.parameters.items():
        print(f"{name:{width}}  {p.relative_error:14.2e}  {p.cosine:9.6f}  {p.norm:9.3g}  {p.path}")
    print(f"{'all':{width}}  {report.relative_error:14.2e}  {report.cosine:9.6f}")
    print(f"parameters without gradient: {', '.join(report.zero_gradients) or 'none'}")


def print_norms(report: AuditReport, window: int, steps: int) -> None:
    """State and influence norms after every window, thinned to about ten."""
    stride = -(-len(report.state_norms) // 10)
    print("after step  state norm  influence norm")
    for index in reversed(range(len(report.state_norms) - 1, -1, -stride)):
        step = min((index + 1) * window, steps)
        print(f"{step:10d}  {report.state_norms[index]:10.3g}  {report.influence_norms[index]:14.4g}")


def print_forecast(model: SequenceModule, datamodule: LightningDataModule, trainer: Trainer) -> None:
    """Memory from the algorithm's forecast, time measured on this machine, in the precision of training."""
    source = batches(model, datamodule)
    first = next(source)
    lanes, steps = first.starts.shape
    forecast = model.gradient.forecast(model.cell, lanes, model.dtype, steps)  # type: ignore[arg-type]
    print(
        f"memory: {readable(forecast.influence_bytes)} for the influence, "
        f"about {readable(forecast.workspace_bytes)} for a window"
    )
    memory = model.gradient.init(model.cell, lanes)
    seconds = []
    for batch in (first, *(next(source) for _ in range(TIMED_BATCHES))):
        began = time.perf_counter()
        result = model.gradient.run(
            model.cell, model.readout, batch.inputs, batch.targets, model.loss, memory, batch.starts
        )
        float(result.loss)  # waits for the device
        seconds.append(time.perf_counter() - began)
    per_batch = statistics.median(seconds[1:])  # the first one chooses how the cell is differentiated
    total = f", {trainer.max_steps * model.update_every * per_batch:.3g} s for {trainer.max_steps} updates"
    print(
        f"time: {1e3 * per_batch:.3g} ms a batch, {1e6 * per_batch / (lanes * steps):.3g} us a token"
        + (total if trainer.max_steps > 0 else "")
    )
