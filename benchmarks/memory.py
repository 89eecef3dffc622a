"""Peak memory against the length of a sequence, every point in a fresh process.

    OMP_NUM_THREADS=1 python -m benchmarks.memory                 # to 1,048,576 tokens; hours
    python -m benchmarks.memory --longest 16384 --only "BPTT" "BlockRTRL"
    python -m benchmarks.memory --device cuda --again

Points are added to benchmarks/results/memory.json as they end; a point that is there is left out.

A recurrent mixture of experts (d = 16, 4 slots, 4 experts, 1 lane) reads one Haystack sequence, delivered in windows of
512 tokens (BPTT: whole), and takes one gradient. BPTT stops at the first length above the budget. Peaks are those of
the process above what it takes before its first step, imports and weights; on a GPU those of the allocator.
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
from torch import nn
from tqdm import tqdm

from benchmarks.common import RESULTS, read, write
from rtrl_moe_pl.cells import RecurrentMoE
from rtrl_moe_pl.data import Cursor, window
from rtrl_moe_pl.gradients import BPTT, RTRL, TBPTT, BlockRTRL, GradientAlgorithm, LazyExpertRTRL
from rtrl_moe_pl.modules import WeightedCrossEntropy
from rtrl_moe_pl.tasks import Haystack

DELIVERED = 512
BUDGET_MB = 2000
ALGORITHMS: dict[str, GradientAlgorithm] = {
    "BPTT": BPTT(),
    "TBPTT": TBPTT(window=16),
    "RTRL": RTRL(window=64),
    "BlockRTRL": BlockRTRL(window=64),
    "LazyExpertRTRL": LazyExpertRTRL(window=64),
}
SHORT, LONG = (64, 256, 1024, 4096, 16384, 65536), (1024, 16384, 131072, 1048576)


def peak_mb(device: torch.device) -> float:
    """So far, of this process or of the GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def point(name: str, tokens: int, device: torch.device) -> dict[str, float]:
    """One gradient over one sequence, in this process."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    task, algorithm = Haystack(tokens), ALGORITHMS[name]
    cell = RecurrentMoE(task.vocabulary_size, 16, 4, 4).to(device)
    readout, loss = nn.Linear(cell.state_size, task.num_classes).to(device), WeightedCrossEntropy()
    memory = algorithm.init(cell, 1, device)
    steps = tokens if name == "BPTT" else min(DELIVERED, tokens)
    cursor = Cursor(*torch.zeros(2, 1, dtype=torch.long, device=device))
    before, begin = peak_mb(device), time.perf_counter()
    for _ in range(tokens // steps):
        batch, cursor = window(task, 0, cursor, steps, 1)
        inputs = batch.one_hot(task.vocabulary_size).inputs.float()
        memory = algorithm.run(cell, readout, inputs, batch.targets, loss, memory, batch.starts).memory
    return {
        "peak_mb": peak_mb(device) - before,
        "process_mb": peak_mb(device),
        "influence_mb": memory.base.nbytes / 1e6,
        "chunk_mb": 0.0 if memory.tail is None else memory.tail.workspace.nbytes / 1e6,
        "seconds": time.perf_counter() - begin,
    }


def draw(rows: list[dict[str, Any]]) -> None:
    """benchmarks/results/memory.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for name in ALGORITHMS:
        mine = [row for row in rows if row["algorithm"] == name]
        if mine:
            look: dict[str, Any] = {"linewidth": 6, "markersize": 12} if name == "BlockRTRL" else {}  # Lazy.. is on it
            axes.plot([r["tokens"] for r in mine], [r["peak_mb"] for r in mine], "o-", label=name, **look)
    axes.axhline(BUDGET_MB, color="0.4", linestyle="--", label=f"budget ({BUDGET_MB:,} MB)")
    axes.set(xlabel="tokens in the sequence", ylabel="peak memory of one gradient (MB)", yscale="log")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(RESULTS / "memory.png", dpi=120)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| algorithm | tokens | peak of one gradient, MB | of it P | of it a chunk | whole process, MB | ms a token |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        sparse = "" if "BPTT" in row["algorithm"] else f"{row['influence_mb']:.1f}"
        chunk = "" if "BPTT" in row["algorithm"] else f"{row['chunk_mb']:.1f}"
        lines.append(
            f"| {row['algorithm']} | {row['tokens']:,} | {row['peak_mb']:,.1f} | {sparse} | {chunk} | "
            f"{row['process_mb']:,.1f} | {row['seconds'] / row['tokens'] * 1e3:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--only", nargs="+", choices=list(ALGORITHMS), default=list(ALGORITHMS))
    parser.add_argument("--longest", type=int, default=LONG[-1], help="tokens")
    parser.add_argument("--again", action="store_true", help="also the points that the results have already")
    parser.add_argument("--point", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        print(json.dumps(point(options.point[0], int(options.point[1]), options.device)))
        return
    path = RESULTS / "memory.json"
    rows: list[dict[str, Any]] = read("memory", options.device) if path.exists() else []
    rows = [row for row in rows if not options.again or row["algorithm"] not in options.only]
    done = {(row["algorithm"], row["tokens"]) for row in rows}
    grid = [(tokens, name) for name in options.only for tokens in (SHORT if "BPTT" in name else LONG)]
    for tokens, name in tqdm([(n, name) for n, name in sorted(grid) if n <= options.longest and (name, n) not in done]):
        if any(row["algorithm"] == name and row["peak_mb"] > BUDGET_MB for row in rows):
            continue
        command = [sys.executable, "-m", "benchmarks.memory", "--device", str(options.device)]
        found = subprocess.run([*command, "--point", name, str(tokens)], capture_output=True, text=True, check=True)
        rows.append({"algorithm": name, "tokens": tokens, **json.loads(found.stdout)})
        tqdm.write(
            str({key: round(value, 1) if isinstance(value, float) else value for key, value in rows[-1].items()})
        )
        rows.sort(key=lambda row: (list(ALGORITHMS).index(row["algorithm"]), row["tokens"]))
        write("memory", options.device, rows)
    draw(rows)


if __name__ == "__main__":
    main()
