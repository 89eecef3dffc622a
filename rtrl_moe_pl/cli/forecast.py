"""The subcommand forecast: what does each way to the gradient take on the configured model, and which is to be used?"""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer
from tqdm import tqdm

from rtrl_moe_pl.cells import RoutedCell
from rtrl_moe_pl.cells.base import at_least, positive
from rtrl_moe_pl.cli.trial import (
    delivered_by,
    figure,
    first_steps,
    forecast_memory,
    forecast_reasoning,
    of_batches,
    prepared,
    print_table,
    puzzles,
    seconds_per_batch,
    seconds_per_step,
)
from rtrl_moe_pl.data import Batch, CurriculumDataModule
from rtrl_moe_pl.gradients import (
    BPTT,
    RTRL,
    TBPTT,
    BlockRTRL,
    Forecast,
    GradientAlgorithm,
    LazyExpertRTRL,
    MemoryForecastError,
)
from rtrl_moe_pl.gradients.memory import free_memory, readable
from rtrl_moe_pl.modules import ReasoningModule, SequenceModule

AFFORDABLE = 10  # times the cheapest
NOISE = 1.1  # times as long is about as long


@dataclass(frozen=True)
class Row:
    """What one algorithm takes.

    Args:
        memory: None if it is not known.
        seconds: a step of one lane; None if it was not run.
        note: why not, or what is to be known.
    """

    algorithm: GradientAlgorithm
    memory: Forecast | None = None
    seconds: float | None = None
    note: str = ""


def forecast(
    model: SequenceModule, datamodule: LightningDataModule, trainer: Trainer, steps: int, memory: float | None
) -> None:
    """Print memory and time of every algorithm that can train the model's cell, and recommend one. Trains nothing.

    Args:
        steps: most time steps of a batch that are timed.
        memory: GB that may be taken; None: what is free.
    """
    at_least(1, "--steps", steps)
    allowed = limit(model, trainer, memory)
    source = prepared(model, datamodule, trainer)
    if isinstance(datamodule, CurriculumDataModule):
        datamodule.stage = len(datamodule.tasks) - 1  # what training comes to
    delivered, streams = delivered_by(source, datamodule)
    lanes, columns = delivered[0].starts.shape
    length = sequence_length(datamodule, columns, streams)
    timed = [first_steps(iter([batch]), min(columns, steps)) for batch in delivered]
    longest = [first_steps(source, min(length, steps))] if length else timed
    print(
        f"forecast for {type(model.cell).__name__}, {sum(p.numel() for p in model.cell.parameters()):,} parameters, "
        f"state {model.cell.state_size}, {lanes} lanes x {columns} steps a batch"
        + (f", sequences of up to {length:,} steps" if length else "")
        + f"; {readable(allowed)} may be taken"
    )
    rows = []
    for algorithm in tqdm(candidates(model, columns), "timing", leave=False, disable=None):
        whole = algorithm.window is None
        data, together = (longest, length) if whole else (timed, columns)
        rows.append(examine(model, algorithm, source, data, together, streams and not whole, allowed))
        shorter = with_chunk_that_fits(rows[-1], model, lanes, columns, streams, allowed)
        if shorter and repr(shorter) not in {repr(row.algorithm) for row in rows}:
            rows.append(examine(model, shorter, source, data, together, streams, allowed))
        if whole and streams and rows[-1].seconds is not None:
            notes = "needs data.layout: sequences", rows[-1].note
            rows[-1] = replace(rows[-1], note="; ".join(filter(None, notes)))
    if all(row.memory is None for row in rows):
        raise ValueError(f"no algorithm runs on {type(model.cell).__name__}: {rows[0].note.removeprefix('not run: ')}")
    print_rows(rows, {repr(model.gradient)})
    print(f"recommended: {recommend(rows, model.gradient, length, allowed)}")


def limit(model: Any, trainer: Trainer, memory: float | None) -> int:
    """Bytes that may be taken."""
    free = free_memory(trainer.strategy.root_device)
    return free if memory is None else min(free, int(1e9 * positive("--memory", memory)))


def sequence_length(datamodule: LightningDataModule, columns: int, streams: bool) -> int:
    """Steps of the longest sequence; 0 if it is not known."""
    task = getattr(datamodule, "task", None)
    return columns if not streams else getattr(task, "max_length", 0)


def candidates(model: SequenceModule, columns: int) -> list[GradientAlgorithm]:
    """The configured algorithm, and those that can train such a cell; none twice."""
    cell, window = model.cell, model.gradient.window
    best = min(columns, int(cell.state_size))  # type: ignore[arg-type]
    windows = [best] if window is None else sorted({window, best})
    found = [model.gradient, BPTT(), TBPTT(windows[0] if window is None else window), RTRL(window=1)]
    found += [RTRL(window=size) for size in windows]
    if isinstance(cell, RoutedCell):
        found.append(BlockRTRL(window=windows[-1]))
        if cell.num_experts:
            found.append(LazyExpertRTRL(window=windows[-1]))
    return list({repr(algorithm): algorithm for algorithm in found}.values())


def examine(
    model: SequenceModule,
    algorithm: GradientAlgorithm,
    source: Iterator[Batch],
    data: list[Batch],
    together: int,
    streams: bool,
    allowed: int,
) -> Row:
    """One row: forecast, and timed if it fits."""
    if not together:
        return Row(algorithm, note="not run: it needs whole sequences, and how long they are is not known")
    try:
        needed = forecast_memory(model, algorithm, source, together, streams)
        if needed.total_bytes > allowed:
            return Row(algorithm, needed, note=f"not run: does not fit in {readable(allowed)}")
        seconds, estimated_from = seconds_per_step(model, algorithm, data)
    except MemoryForecastError as error:
        return Row(algorithm, needed, note=f"not run: {error}")
    except ValueError as error:
        return Row(algorithm, note=f"not run: {error}")
    note = f"time estimated from {estimated_from} steps" if estimated_from else ""
    return Row(algorithm, needed, seconds / len(data[0].inputs), note)


def with_chunk_that_fits(
    row: Row, model: SequenceModule, lanes: int, columns: int, streams: bool, allowed: int
) -> RTRL | None:
    """The row's algorithm with the longest chunk that fits, if its default one does not; None if none does."""
    algorithm = row.algorithm
    if not isinstance(algorithm, RTRL) or algorithm.chunk or row.memory is None or row.memory.total_bytes <= allowed:
        return None
    shorter = copy.copy(algorithm)

    def needed(chunk: int) -> int:
        shorter.chunk = chunk
        return of_batches(shorter, model, lanes, columns, streams).total_bytes

    default = algorithm.chunk_for(model.cell, batch_size=lanes)
    shorter.chunk = bisect_right(range(1, default), allowed, key=needed)
    return shorter if shorter.chunk else None


def print_rows(rows: list[Row], configured: set[str]) -> None:
    cheapest = min((row.seconds for row in rows if row.seconds is not None), default=1.0)
    header = ("algorithm", "exact", "influence", "workspace", "grows with length", "us a token", "ratio", "")
    cells = []
    for row in rows:
        memory, seconds = row.memory, row.seconds
        cells.append(
            (
                ("* " if repr(row.algorithm) in configured else "  ") + repr(row.algorithm),
                "yes" if row.algorithm.exact else "no",
                "" if memory is None else readable(memory.influence_bytes),
                "" if memory is None else readable(memory.workspace_bytes),
                "yes" if row.algorithm.window is None else "no",
                "" if seconds is None else figure(1e6 * seconds),
                "" if seconds is None else f"{seconds / cheapest:.1f}",
                row.note,
            )
        )
    print_table(header, cells)
    print("* configured; a token is one step of one lane; measured here, now, without the optimizer's step")


def recommend(rows: list[Row], configured: GradientAlgorithm, length: int, allowed: int) -> str:
    """The cheapest exact algorithm that fits, unless it takes more than `AFFORDABLE` times the cheapest; and why."""
    time = {repr(row.algorithm): row.seconds for row in rows if row.seconds is not None}
    fitting = [row for row in rows if repr(row.algorithm) in time]
    if not fitting:
        return f"none fits in {readable(allowed)}: make data.batch_size or the cell smaller"
    cheapest = min(fitting, key=lambda row: time[repr(row.algorithm)])
    exact = [row for row in fitting if row.algorithm.exact]
    if exact:
        best = min(exact, key=lambda row: time[repr(row.algorithm)])
        kept = [row for row in exact if repr(row.algorithm) == repr(configured)]
        if kept and time[repr(configured)] <= NOISE * time[repr(best.algorithm)]:
            best = kept[0]
        ratio = time[repr(best.algorithm)] / time[repr(cheapest.algorithm)]
        if ratio <= AFFORDABLE:
            reason = "the cheapest" if ratio <= NOISE else f"{ratio:.1f} times {cheapest.algorithm!r}"
            if best.algorithm.window is None:
                assert best.memory is not None
                room = f"whole sequences of {length:,} steps fit ({readable(best.memory.total_bytes)})"
                return f"{best.algorithm!r}: exact, {reason}, and {room}; longer ones take more"
            return f"{best.algorithm!r}: exact, {reason}, in memory that does not grow with the length"
    lacking = "no exact algorithm fits" if not exact else f"exact ones take over {AFFORDABLE} times as long"
    return (
        f"{cheapest.algorithm!r}: {lacking}; biased, it gives no credit beyond {cheapest.algorithm.window} steps: "
        "see with audit what that costs"
    )


def forecast_puzzles(
    model: ReasoningModule, datamodule: LightningDataModule, trainer: Trainer, memory: float | None
) -> None:
    """Print memory and time of the modes of a ReasoningModule, and recommend one. Trains nothing."""
    allowed = limit(model, trainer, memory)
    stream = puzzles(model, prepared(model, datamodule, trainer))
    chosen, rounds = model.mode, model.decoder.grad_cycles
    modes = dict.fromkeys((chosen, "re_encode", *(() if model.encoder.recurrent else ("cached",))))
    print(
        f"forecast for {type(model.decoder).__name__}, {type(model.encoder).__name__}, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {stream.batch_size} lanes x "
        f"{model.shape.cells} cells; {readable(allowed)} may be taken"
    )
    needed: dict[tuple[str, int], Forecast] = {}
    time: dict[tuple[str, int], float] = {}
    ways = dict.fromkeys([*((mode, rounds) for mode in modes), (chosen, model.decoder.h_cycles)])
    try:
        for way in tqdm(ways, "timing", leave=False, disable=None):
            model.mode, model.decoder.grad_cycles = way  # type: ignore[assignment]
            needed[way] = forecast_reasoning(model, stream)
            if needed[way].workspace_bytes <= allowed:
                time[way] = seconds_per_batch(model, stream)
    finally:
        model.mode, model.decoder.grad_cycles = chosen, rounds
    rows = [
        (
            ("* " if way == (chosen, rounds) else "  ") + way[0],
            f"{way[1]} of {model.decoder.h_cycles}",
            readable(needed[way].workspace_bytes),
            figure(1e3 * time[way]) if way in time else "",
            figure(1e6 * time[way] / (stream.batch_size * model.shape.cells)) if way in time else "",
            "" if way in time else f"not run: does not fit in {readable(allowed)}",
        )
        for way in ways
    ]
    print_table(("mode", "rounds differentiated", "for the way back", "ms a batch", "us a cell", ""), rows)
    print("* configured; measured here, now, without the optimizer's step")
    best, cached = (chosen if chosen != "cached" else "re_encode", rounds), ("cached", rounds)
    if best not in time:
        lanes = stream.batch_size * allowed // needed[best].workspace_bytes
        fewer = f"{best[0]} with data.batch_size at most about {lanes}: what the way back takes grows with the lanes"
        print(f"recommended: {fewer if lanes else f'none fits in {readable(allowed)}: make the model smaller'}")
        return
    reason = "every lane's loss reaches the encoder"
    if cached in time:
        reason += f", for {time[best] / time[cached]:.1f} times the time of cached, in which few do"
    print(f"recommended: {best[0]}: {reason}")
