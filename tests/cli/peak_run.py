"""Print forecast and peak of gradients, in bytes, each measured in a process of its own."""

from __future__ import annotations

import json
import multiprocessing
import resource
import sys
from collections.abc import Callable
from typing import Any

import torch

from rtrl_moe_pl.cells import GRU, RecurrentMoE, Stack
from rtrl_moe_pl.cli.trial import forecast_memory, forecast_reasoning
from rtrl_moe_pl.data import Batch
from rtrl_moe_pl.gradients import BPTT, RTRL, BlockRTRL, GradientAlgorithm, LazyExpertRTRL
from rtrl_moe_pl.modules import ReasoningModule, SequenceModule
from rtrl_moe_pl.modules.reasoning_audit import TrialRun
from rtrl_moe_pl.reasoning import TRM
from tests.modules.reasoning_helpers import data

INPUTS, CLASSES = 6, 3
# algorithm, cell of a width, width, lanes, steps of a batch, batches
SEQUENCES: dict[str, tuple[GradientAlgorithm, Callable[[int], Any], int, int, int, int]] = {
    "BPTT": (BPTT(), lambda n: GRU(INPUTS, n), 64, 32, 1000, 1),
    "BPTT of small operations": (BPTT(), lambda d: RecurrentMoE(INPUTS, d, 4, 8), 16, 1, 800, 1),
    "RTRL": (RTRL(window=32), lambda n: GRU(INPUTS, n), 96, 16, 320, 1),
    "RTRL of a stack": (RTRL(window=64), lambda n: Stack([GRU(INPUTS, n), GRU(n, n)]), 32, 16, 64, 6),
    "BlockRTRL": (BlockRTRL(window=32), lambda d: RecurrentMoE(INPUTS, d, 4, 8), 24, 16, 128, 1),
    "BlockRTRL of many experts": (BlockRTRL(window=8), lambda d: RecurrentMoE(INPUTS, d, 4, 32), 32, 4, 32, 8),
    "LazyExpertRTRL": (LazyExpertRTRL(window=8), lambda d: RecurrentMoE(INPUTS, d, 4, 8), 32, 4, 16, 14),
}


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def batch(lanes: int, steps: int) -> Batch:
    labels = torch.randint(CLASSES, (lanes, steps))
    starts = torch.zeros(lanes, steps, dtype=torch.bool)
    return Batch(torch.randn(lanes, steps, INPUTS), (labels, torch.ones(lanes, steps)), starts)


def of_sequences(case: str) -> tuple[int, int]:
    algorithm, cell, width, lanes, steps, batches = SEQUENCES[case]

    def gradients(model: SequenceModule, parts: list[Batch]) -> None:
        memory = algorithm.init(model.cell, len(parts[0].inputs))
        for given in parts:
            inputs, targets = given.inputs, given.targets
            algorithm.run(model.cell, model.readout, inputs, targets, model.loss, memory, given.starts)

    gradients(SequenceModule(cell(4), CLASSES, algorithm), [batch(1, 4)])  # what is loaded once
    model, parts = SequenceModule(cell(width), CLASSES, algorithm), [batch(lanes, steps) for _ in range(batches)]
    before = peak()
    gradients(model, parts)
    measured = peak() - before
    return forecast_memory(model, algorithm, iter([batch(lanes, 16)]), steps, True).total_bytes, measured


def of_puzzles() -> tuple[int, int]:
    def model(lanes: int, width: int) -> TrialRun:
        source = data(batch_size=lanes, size=6, demos=1)
        made = ReasoningModule(source.shape, lambda shape: TRM(shape, width, prefix=4))
        return TrialRun(made, source.on_after_batch_transfer("train", 0))  # type: ignore[arg-type]

    model(1, 8).step()
    trial, before = model(48, 128), peak()
    trial.step()
    measured = peak() - before
    return forecast_reasoning(trial.model, trial.stream).workspace_bytes, measured


def measure(case: str) -> tuple[int, int]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return of_puzzles() if case == "puzzles" else of_sequences(case)


if __name__ == "__main__":
    cases = sys.argv[1:] or [*SEQUENCES, "puzzles"]
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:  # imports once
        print(json.dumps(dict(zip(cases, pool.map(measure, cases, chunksize=1), strict=True))))
