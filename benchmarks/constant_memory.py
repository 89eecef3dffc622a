"""Peak memory of RTRL training at 1,000 and at 100,000 tokens of one stream, each in a fresh process.

    OMP_NUM_THREADS=1 python -m benchmarks.constant_memory

Every lane is a stream that never restarts; weights are updated after every window. BPTT over the shorter stream is
given beside it.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import write
from rtrl_moe_pl.cells import GRU
from rtrl_moe_pl.gradients import BPTT, RTRL

LANES, INPUTS, HIDDEN, WINDOW = 8, 8, 32, 32


def train(method: str, tokens: int) -> dict[str, Any]:
    """Train on a stream of ``tokens`` steps a lane; peak memory of this process so far."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    cell, readout = GRU(INPUTS, HIDDEN), nn.Linear(HIDDEN, 1)
    optimizer = torch.optim.Adam([*cell.parameters(), *readout.parameters()], 1e-3)
    algorithm = RTRL(window=WINDOW) if method == "RTRL" else BPTT()
    step = WINDOW if method == "RTRL" else tokens
    memory = algorithm.init(cell, LANES)
    named = {f"cell.{n}": p for n, p in cell.named_parameters()}
    named |= {f"readout.{n}": p for n, p in readout.named_parameters()}

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs - targets) ** 2).sum()

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    for _ in range(0, tokens, step):
        inputs = torch.randn(LANES, step, INPUTS)
        result = algorithm.run(cell, readout, inputs, inputs[:, :, :1], loss, memory)
        for name, parameter in named.items():
            parameter.grad = result.grads[name] / (LANES * step)
        optimizer.step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "method": method,
        "tokens": tokens,
        "peak_MiB": peak / 1024,
        "of_training_MiB": (peak - before) / 1024,
        "us_per_token": (time.perf_counter() - begin) / tokens * 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--point", nargs=2, metavar=("METHOD", "TOKENS"), help="measure one point in this process")
    arguments = parser.parse_args()
    if arguments.point:
        print(json.dumps(train(arguments.point[0], int(arguments.point[1]))))
        return
    rows = []
    for method, tokens in (("RTRL", 1_000), ("RTRL", 10_000), ("RTRL", 100_000), ("BPTT", 1_000), ("BPTT", 10_000)):
        command = [sys.executable, "-m", "benchmarks.constant_memory", "--point", method, str(tokens)]
        rows.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
        print(f"{method} {tokens:>7,d} tokens: peak {rows[-1]['peak_MiB']:.1f} MiB")
    print(f"RTRL, 100,000 over 1,000 tokens: {rows[2]['peak_MiB'] / rows[0]['peak_MiB']:.4f}")
    print(f"written to {write('constant_memory', torch.device('cpu'), rows)}")


if __name__ == "__main__":
    main()
