"""What TF32 costs in the gradient and saves in time, on a GPU: RTRL of a GRU.

    python -m benchmarks.tf32

Error: norm of the difference to the float64 gradient of the last window, over its norm, after 1,024 steps. Time: median
ratio of neighbours in time.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import interleaved, ratio, write
from rtrl_moe_pl.cells import GRU
from rtrl_moe_pl.cli.tf32 import set_tf32, tf32_restored
from rtrl_moe_pl.gradients import RTRL

LANES, WINDOW, STEPS = 8, 64, 1024


def squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum()


def row(size: int, repetitions: int, device: torch.device) -> dict[str, Any]:
    """One size of cell."""
    algorithm = RTRL(WINDOW)

    def prepared(dtype: torch.dtype) -> tuple[Any, ...]:
        torch.manual_seed(0)  # on the CPU and in float32, whatever the device and type
        cell, readout = GRU(8, size).to(device, dtype), nn.Linear(size, 4).to(device, dtype)
        inputs, targets = torch.randn(LANES, STEPS, 8), torch.randn(LANES, STEPS, 4)
        data = [values.to(device, dtype) for values in (inputs, targets)]
        return cell, readout, *data, squares, algorithm.init(cell, LANES, device)

    def last_window(dtype: torch.dtype, tf32: bool) -> Tensor:
        set_tf32(tf32)
        cell, readout, inputs, targets, loss, memory = prepared(dtype)
        for begin in range(0, STEPS, WINDOW):
            here = slice(begin, begin + WINDOW)
            result = algorithm.step(cell, readout, inputs[:, here], targets[:, here], loss, memory)
        return torch.cat([grad.flatten().double() for grad in result.grads.values()])

    def timed(tf32: bool) -> Any:
        problem = prepared(torch.float32)

        def run() -> None:
            set_tf32(tf32)
            algorithm.run(*problem)

        return run

    exact = last_window(torch.float64, False)
    errors = [float((last_window(torch.float32, tf32) - exact).norm() / exact.norm()) for tf32 in (False, True)]
    plain, rounded = interleaved([timed(False), timed(True)], repetitions, device, warm_up=2)
    return {
        "size": size,
        "error": errors[0],
        "error_tf32": errors[1],
        "tf32_over_float32": ratio(rounded, plain),
        "us_per_step": [1e6 * min(times) / STEPS for times in (plain, rounded)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--repetitions", type=int, default=9)
    arguments = parser.parse_args()
    rows = []
    with tf32_restored():
        for size in (64, 128, 256):
            rows.append(row(size, arguments.repetitions, arguments.device))
            print(rows[-1], flush=True)
    print(f"written to {write('tf32', arguments.device, rows)}")


if __name__ == "__main__":
    main()
