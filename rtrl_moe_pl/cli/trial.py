"""Runs that train nothing: batches without a Trainer's loop, what a gradient of them takes, and tables of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.flop_counter import FlopCounterMode

from rtrl_moe_pl.data import Batch
from rtrl_moe_pl.data.batch import joined
from rtrl_moe_pl.data.puzzles import PuzzleStream
from rtrl_moe_pl.gradients import RTRL, Forecast, GradientAlgorithm, graph_bytes
from rtrl_moe_pl.modules import ManualModule, ReasoningModule, SequenceModule
from rtrl_moe_pl.modules.reasoning_audit import TrialRun

TIMED_BATCHES = 4
REPEATS = 3  # timed; their median counts
LONGEST = 10.0  # seconds, after which nothing is repeated
SAMPLE = 8  # steps; autograd keeps as much of each as of the next


def prepared(model: ManualModule, datamodule: LightningDataModule, trainer: Trainer) -> Iterator[Any]:
    """Training batches on the model's device, without end; the model is moved there."""
    model.to(trainer.strategy.root_device)
    datamodule.prepare_data()
    datamodule.setup("fit")
    return batches(model, datamodule)


def batches(model: ManualModule, datamodule: LightningDataModule) -> Iterator[Any]:
    while True:  # a loader's epoch may be shorter than what is needed
        for request in datamodule.train_dataloader():
            moved = datamodule.transfer_batch_to_device(request, model.device, 0)
            yield datamodule.on_after_batch_transfer(moved, 0)


def puzzles(model: ReasoningModule, source: Iterator[Any]) -> PuzzleStream:
    """The stream that training batches are."""
    stream = next(source)
    if not isinstance(stream, PuzzleStream):
        raise TypeError(f"a ReasoningModule needs a PuzzleDataModule, got batches of type {type(stream).__name__}")
    stream.device = model.device
    return stream


def delivered_by(source: Iterator[Batch], datamodule: LightningDataModule) -> tuple[list[Batch], bool]:
    """Some batches to be timed, and whether lanes go on from one to the next."""
    delivered = [next(source) for _ in range(TIMED_BATCHES)]
    return delivered, goes_on(datamodule, delivered[-1])


def goes_on(datamodule: LightningDataModule, batch: Batch) -> bool:
    """Whether lanes go on from batch to batch, rather than begin a sequence in each."""
    layout = getattr(datamodule, "layout", None)
    return layout == "stream" if layout else not bool(batch.starts[:, 0].all())


def first_steps(source: Iterator[Batch], steps: int) -> Batch:
    """The first ``steps`` steps of consecutive batches: lanes go on, or start anew, as in training."""
    parts = [next(source)]
    while sum(part.inputs.shape[1] for part in parts) < steps:
        parts.append(next(source))
    whole = joined(parts)
    labels, weights = whole.targets
    return Batch(whole.inputs[:, :steps], (labels[:, :steps], weights[:, :steps]), whole.starts[:, :steps])


def of_batches(algorithm: GradientAlgorithm, model: SequenceModule, lanes: int, steps: int, streams: bool) -> Forecast:
    """An algorithm's forecast for batches of some steps: where lanes go on, several fill a chunk."""
    found = algorithm.forecast(model.cell, lanes, model.dtype, steps)  # type: ignore[arg-type]  # refuses other cells
    if isinstance(algorithm, RTRL) and streams:
        longer = max(steps, algorithm.chunk_for(model.cell, batch_size=lanes))
        found = algorithm.forecast(model.cell, lanes, model.dtype, longer, steps)  # type: ignore[arg-type]
    return found


def forecast_memory(
    model: SequenceModule, algorithm: GradientAlgorithm, source: Iterator[Batch], steps: int, streams: bool
) -> Forecast:
    """What an algorithm takes beyond weights and optimizer: that of a run in reverse is measured on a few steps.

    Args:
        steps: that are delivered together.
        streams: whether lanes go on from batch to batch, and with them what is not in P yet.
    """
    sample = first_steps(source, 2 * SAMPLE)
    lanes = len(sample.inputs)
    found = of_batches(algorithm, model, lanes, steps, streams)
    if algorithm.carries_influence:
        return found
    steps, kept = min(algorithm.window or steps, steps), []
    for count in (SAMPLE, 2 * SAMPLE):
        inputs, targets, starts = (
            sample.inputs[:, :count].clone(),
            tuple(target[:, :count].clone() for target in sample.targets),
            sample.starts[:, :count].clone(),
        )
        memory = algorithm.init(model.cell, lanes)
        arguments = model.cell, model.readout, inputs, targets, model.loss, memory, starts
        kept.append(graph_bytes(lambda arguments=arguments: algorithm.step(*arguments)))
    more = (kept[1] - kept[0]) / SAMPLE
    return Forecast(0, int(kept[0] + (steps - SAMPLE) * more), found.operations_per_token)


def seconds_per_step(model: SequenceModule, algorithm: GradientAlgorithm, data: Sequence[Batch]) -> tuple[float, int]:
    """Seconds a time step of all lanes: the median of a few periods, each as long as P takes to be advanced once.

    Where a period would take longer than `LONGEST`, less is run, and an advance of P timed after it.

    Args:
        data: batches of equal size, taken in turn.

    Returns:
        seconds; and 0, or the number of steps that they were estimated from.
    """
    steps, memory = data[0].inputs.shape[1], algorithm.init(model.cell, len(data[0].inputs))

    def run(batches: Sequence[Batch]) -> float:
        began = time.perf_counter()
        for batch in batches:
            inputs, targets, starts = batch.inputs, batch.targets, batch.starts
            result = algorithm.run(model.cell, model.readout, inputs, targets, model.loss, memory, starts)
            float(result.loss)  # waits for the device
        return (time.perf_counter() - began) / sum(batch.inputs.shape[1] for batch in batches)

    few = [first_steps(iter(data[:1]), min(SAMPLE, steps))]
    run(few)  # chooses how the cell is differentiated
    shown = min(steps, max(SAMPLE, int(LONGEST / run(few))))
    source = cycle([first_steps(iter([batch]), shown) for batch in data])
    found = run([next(source)])
    capacity = shown if memory.tail is None else memory.tail.capacity
    period, affordable = max(1, round(capacity / shown)), max(1, int(LONGEST / (shown * found)))
    if period <= affordable:
        if period > 1:
            run(list(islice(source, period - 1)))
        return repeated(lambda: run(list(islice(source, period)))), shown if shown < steps else 0
    found, began = run(list(islice(source, affordable))), time.perf_counter()
    float(memory.sensitivity.norm())  # advances P
    return found + (time.perf_counter() - began) / capacity, affordable * shown


def repeated(run: Any) -> float:
    """The median of what some calls return, fewer where they take long."""
    began, found = time.perf_counter(), [run()]
    while len(found) < REPEATS and time.perf_counter() - began < LONGEST:
        found.append(run())
    return statistics.median(found)


def forecast_reasoning(model: ReasoningModule, stream: PuzzleStream) -> Forecast:
    """What autograd keeps of a batch in which every lane begins, as far as one and two lanes tell, and its operations.

    Returns:
        ``workspace_bytes``; and ``operations_per_token``, of a lane's batch for each of its cells.
    """

    def trial(lanes: int) -> TrialRun:
        found = TrialRun(model, PuzzleStream(stream.task, stream.seed, lanes, device=stream.device))
        found.model._carry = None  # which other lanes go on with
        return found

    with FlopCounterMode(display=False) as counter:
        one = graph_bytes(trial(1).step)
    two = graph_bytes(trial(2).step)
    operations = counter.get_total_flops() / model.shape.cells
    return Forecast(0, one + (stream.batch_size - 1) * (two - one), operations)


def seconds_per_batch(model: ReasoningModule, stream: PuzzleStream) -> float:
    """The mean over as many batches as the longest puzzle has: in mode "cached" few of them encode."""
    trial = TrialRun(model, stream)
    trial.step()
    began, done = time.perf_counter(), 0
    while done < model.halting.max_steps and (done == 0 or time.perf_counter() - began < LONGEST):
        trial.step()
        done += 1
        next(iter(trial.grads.values())).sum().item()  # waits for the device
    return (time.perf_counter() - began) / done


def figure(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The first and the last column to the left, numbers between them to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        cells = [f"{row[0]:{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(row[1:-1], widths[1:-1], strict=True)), row[-1]]
        print("  ".join(cells).rstrip())
