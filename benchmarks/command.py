"""The package's command line in a process of its own, what it wrote for TensorBoard, and many such runs."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from benchmarks.common import RESULTS, ended_by_interrupt, without_interrupts, write

ROOT = Path(__file__).parent.parent


class Run(NamedTuple):
    """One run: its wall time in seconds, its folder of logs, and figures as (step, value, seconds since the start)."""

    seconds: float
    folder: Path
    figures: dict[str, list[tuple[int, float, float]]]


def arguments(options: dict[str, object]) -> list[str]:
    """``--KEY VALUE`` of every option."""
    return [text for key, value in options.items() for text in (f"--{key}", str(value))]


def run(action: str, config: str, options: list[str], folder: Path | str, threads: int = 1) -> Run:
    """``python -m rtrl_moe_pl ACTION --config configs/CONFIG.yaml OPTIONS``, logged to a new version under ``folder``.

    Raises:
        RuntimeError: if it fails, with the end of what it printed.
    """
    command = [sys.executable, "-m", "rtrl_moe_pl", action, "--config", str(ROOT / "configs" / f"{config}.yaml")]
    command += ["--trainer.default_root_dir", str(folder), "--trainer.enable_progress_bar", "false", *options]
    before, begin = set(Path(folder).rglob("events.out.tfevents.*")), time.time()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    taken = time.time() - begin
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    (events,) = set(Path(folder).rglob("events.out.tfevents.*")) - before
    log = EventAccumulator(str(events), {"scalars": 0}).Reload()  # 0: all of them
    figures = {
        tag: [(event.step, event.value, event.wall_time - begin) for event in log.Scalars(tag)]
        for tag in log.Tags()["scalars"]
    }
    return Run(taken, events.parent, figures)


def train_all(
    document: str,
    result: str,
    runs: Iterable[str],
    fit: Callable[[str, int], dict[str, Any]],
    shown: Callable[[dict[str, Any]], str],
) -> None:
    """The command line of a benchmark that trains runs by name and seed, some at a time.

    Every row goes into benchmarks/results/RESULT.json as it ends; rows of other runs and seeds stay.

    Args:
        document: of the benchmark, for ``--help``.
        result: name of its results.
        runs: names, in the order of the rows.
        fit: trains one; gives its row, with "run", "seed" and "seconds".
        shown: what a line in the terminal says of a row.
    """
    parser = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="runs whose name begins with one of these")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parallel", type=int, default=2)
    arguments = parser.parse_args()
    names = list(runs)
    jobs = [(name, seed) for seed in arguments.seeds for name in names if name.startswith(tuple(arguments.only))]
    path = RESULTS / f"{result}.json"
    kept = json.loads(path.read_text())["results"] if path.exists() else []
    rows = {(row["run"], row["seed"]): row for row in kept}
    with ThreadPoolExecutor(arguments.parallel) as pool, ended_by_interrupt(pool):
        with without_interrupts():
            fitted = pool.map(lambda job: fit(*job), jobs)
        for row in tqdm(fitted, total=len(jobs)):
            rows[row["run"], row["seed"]] = row
            tqdm.write(f"{row['run']}, seed {row['seed']}: {shown(row)} in {row['seconds']:.0f} s")
            order = sorted(rows.values(), key=lambda row: (names.index(row["run"]), row["seed"]))
            write(result, torch.device("cpu"), order)
