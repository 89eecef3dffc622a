"""A million tokens in one run: does memory grow, does it slow down, does anything warn?

    OMP_NUM_THREADS=1 python -m benchmarks.long_stream           # about 14 minutes
    OMP_NUM_THREADS=1 python -m benchmarks.long_stream --tokens 65536

Four lanes of a^n b^n, learned online through the command line: an update after every 256 steps, figures, progress bar,
TensorBoard, warnings and checkpoints as a user has them. Every tenth of the tokens: the peak memory of the process, and
the tokens per second: by the wall, of the median batch, and by the time of the processor. Each run is a process. A run
of RTRL is over in 45 seconds, in which the machine itself speeds up or slows down by more than is looked for: it is
repeated, and its drift is the median.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from lightning.pytorch.callbacks import Callback

from benchmarks.common import RESULTS, write

LANES, STEPS = 4, 256
BATCH = LANES * STEPS  # tokens
CASES = {
    "RTRL": ["--model.cell", "GRU", "--model.cell.hidden_size", "32", "--model.gradient", "RTRL"],
    "LazyExpertRTRL": [
        *("--model.cell", "RecurrentMoE", "--model.cell.slot_size", "16", "--model.cell.num_slots", "4"),
        *("--model.cell.num_experts", "16", "--model.gradient", "LazyExpertRTRL"),
        *("--model.cell.slot_balance_rate", "0.01"),  # with .001 a slot is idle for 800 updates: warned of
    ],
}
RUNS = {"RTRL": 5, "LazyExpertRTRL": 1}


class Sampler(Callback):
    """Writes a line of JSON after every tenth of the batches.

    Args:
        path: where to.
        batches: of the whole run.
    """

    def __init__(self, path: str, batches: int) -> None:
        self.path, self.batches, self.done = path, batches, 0
        self.times: list[tuple[float, float]] = []  # after every batch: of the wall, of the processor

    def on_train_batch_end(self, *_: Any) -> None:
        self.done += 1
        self.times.append((time.perf_counter(), time.process_time()))
        if self.done * 10 // self.batches > (self.done - 1) * 10 // self.batches:
            wall, processor = (b - a for a, b in zip(self.times[0], self.times[-1], strict=True))
            batch = statistics.median(b[0] - a[0] for a, b in pairwise(self.times))
            tokens = BATCH * (len(self.times) - 1)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            row = {"tokens": BATCH * self.done, "peak_mib": peak, "per_s": tokens / wall, "per_s_median": BATCH / batch}
            with Path(self.path).open("a") as file:
                file.write(json.dumps({**row, "per_cpu_s": tokens / processor}) + "\n")
            self.times = [(time.perf_counter(), time.process_time())]


def stream(case: str, tokens: int) -> dict[str, Any]:
    batches = tokens // BATCH
    with tempfile.TemporaryDirectory() as folder:
        samples = Path(folder) / "samples.jsonl"
        sampler = {
            "class_path": "benchmarks.long_stream.Sampler",
            "init_args": {"path": str(samples), "batches": batches},
        }
        options = [
            *("--model", "SequenceModule", *CASES[case], "--model.gradient.window", "64"),
            *("--data", "AnBnDataModule", "--data.batch_size", str(LANES), "--data.steps_per_batch", str(STEPS)),
            *("--data.batches_per_epoch", str(batches), "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu"),
            *("--trainer.limit_val_batches", "0", "--trainer.default_root_dir", folder, "--checkpoint.monitor", "null"),
            *("--trainer.callbacks", json.dumps([sampler]), "--threads", "1", "--last_checkpoint.minutes", "1"),
        ]
        command = [sys.executable, "-m", "rtrl_moe_pl", "fit", *options]
        done = subprocess.run(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=os.environ)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        rows = [json.loads(line) for line in samples.read_text().splitlines()]
    warned = [line for line in done.stderr.splitlines() if "arning" in line]
    first, last = rows[0], rows[-1]
    return {
        "rows": rows,
        "memory_growth": last["peak_mib"] / first["peak_mib"] - 1,
        "drift": last["per_s"] / first["per_s"] - 1,
        "drift_median": last["per_s_median"] / first["per_s_median"] - 1,
        "drift_cpu": last["per_cpu_s"] / first["per_cpu_s"] - 1,
        "warnings": warned,
    }


def repeated(case: str, tokens: int) -> dict[str, Any]:
    """All runs of a case: the drifts are medians, memory is that of the run that grew most."""
    runs = []
    for run in range(1, RUNS[case] + 1):
        runs.append(stream(case, tokens))
        print(f"{case}, run {run} of {RUNS[case]}: speed {runs[-1]['drift']:+.1%}", flush=True)
    drifts = {key: statistics.median(run[key] for run in runs) for key in ("drift", "drift_median", "drift_cpu")}
    growth = max(run["memory_growth"] for run in runs)
    warned = [line for run in runs for line in run["warnings"]]
    return {"case": case, **drifts, "memory_growth": growth, "warnings": warned, "runs": runs}


def draw(results: list[dict[str, Any]], path: Path) -> None:
    figure, (memory, speed) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for number, result in enumerate(results):
        for run, rows in enumerate(run["rows"] for run in result["runs"]):
            tokens = [row["tokens"] for row in rows]
            look = {"color": f"C{number}", "label": None if run else result["case"]}
            memory.plot(tokens, [row["peak_mib"] for row in rows], "o-", **look)
            speed.plot(tokens, [row["per_s"] for row in rows], "o-", **look)
    memory.set(xlabel="tokens", ylabel="peak memory of the process, MiB")
    speed.set(xlabel="tokens", ylabel="tokens per second")
    for axes in (memory, speed):
        axes.set_ylim(0, 1.1 * axes.dataLim.y1)
    memory.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2**20)
    options = parser.parse_args()
    results = []
    for case in CASES:
        result = repeated(case, options.tokens)
        results.append(result)
        last = result["runs"][-1]["rows"]
        print(
            f"{case:15} {statistics.median(row['per_s'] for row in last):7.0f} tokens/s, "
            f"peak {last[-1]['peak_mib']:.0f} MiB, {result['memory_growth']:+.2%} since the first tenth; "
            f"speed {result['drift']:+.1%} ({result['drift_median']:+.1%} of the median batch, "
            f"{result['drift_cpu']:+.1%} by the processor's time); "
            f"{len(result['warnings'])} warnings",
            flush=True,
        )
    if options.tokens == parser.get_default("tokens"):
        draw(results, RESULTS / "long_stream.png")
        print(f"written to {write('long_stream', torch.device('cpu'), results)}")


if __name__ == "__main__":
    main()
