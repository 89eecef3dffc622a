"""Time of a window with its steps in graphs of torch.compile, over the same eagerly.

OMP_NUM_THREADS=1 python -m benchmarks.compiled
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import interleaved, ratio, write
from rtrl_moe_pl.cells import GRU
from rtrl_moe_pl.gradients import RTRL, TBPTT, GradientAlgorithm

LANES, STEPS = 8, 192


def squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum()


def row(kind: type[RTRL] | type[TBPTT], size: int, window: int, repetitions: int, device: torch.device) -> dict:
    """One algorithm and cell."""
    torch.manual_seed(0)
    cell, readout = GRU(8, size).to(device), nn.Linear(size, 4).to(device)
    inputs, targets = torch.randn(LANES, STEPS, 8, device=device), torch.randn(LANES, STEPS, 4, device=device)
    eager, compiled = kind(window), kind(window)
    compiled.compile()

    def call(algorithm: GradientAlgorithm) -> Any:
        memory = algorithm.init(cell, LANES, device)
        return lambda: algorithm.run(cell, readout, inputs, targets, squares, memory)

    calls, begin = [call(eager), call(compiled)], time.perf_counter()
    for run in calls * 3:
        run()
    first = time.perf_counter() - begin
    plain, graphs = interleaved(calls, repetitions, device)
    return {
        "algorithm": repr(eager),
        "size": size,
        "compiled_over_eager": ratio(graphs, plain),
        "us_per_step": [1e6 * min(times) / STEPS for times in (plain, graphs)],
        "first_windows_s": first,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--repetitions", type=int, default=15)
    arguments = parser.parse_args()
    rows = []
    for size in (32, 64):
        for window in (16, 64):
            for kind in (TBPTT, RTRL):
                rows.append(row(kind, size, window, arguments.repetitions, arguments.device))
                print(rows[-1], flush=True)
    print(f"written to {write('compiled', arguments.device, rows)}")


if __name__ == "__main__":
    main()
