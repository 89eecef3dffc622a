"""What is learned from values hidden in long streams, and what truncated gradients miss. Three seeds by default.

    OMP_NUM_THREADS=1 python -m benchmarks.haystack_learning              # what is not in the results yet; hours
    python -m benchmarks.haystack_learning --only "moe" --seeds 0 --parallel 2

Runs and tests are added to benchmarks/results/haystack_learning.json as they end; what is there is left out. Their logs
and checkpoints are kept in lightning_logs/haystack_learning.

*curriculum*: the shipped configurations, 64 to 2,048 tokens, every gap above twice the window of 16 steps. By default
P is advanced less often than that (chunk), and a loss goes back through all steps since: the gradient is the same, but
what lies less than a chunk back does not pass through P. *P after every window*: all that lies before a window does.
*gap*: 192 tokens, every gap above twice the largest window, 64 steps; all algorithms on the same data. A batch of BPTT
holds whole sequences, that of the others a third of them.
*uniform*: 64 tokens, gaps from 2 to 61 steps: what truncated gradients learn from the values within their windows.
*moe*: the mixture of experts, windows of 4 steps.
Training ends when the last length is learned (99 %; all of 512 where there is one length alone), or with its epochs.
Trained models are tested at lengths up to 1,048,576 (the mixture of experts: 16,384).
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.command import ROOT, Run, arguments, run
from benchmarks.common import RESULTS, ended_by_interrupt, machine, without_interrupts, write

LOGS = ROOT / "lightning_logs" / "haystack_learning"
NAME = "haystack_learning"
TESTED = {64: 4096, 512: 4096, 2048: 4096, 16384: 4096, 131072: 4096, 1048576: 512}  # sequences by length


def stop_at(progress: float) -> list[str]:
    """As the shipped configurations do, with their one other callback left out."""
    options = {"monitor": "val/progress", "mode": "max", "stopping_threshold": progress, "patience": 1000}
    return ["--trainer.callbacks", json.dumps([{"class_path": "EarlyStopping", "init_args": options}])]


def gradient(name: str, window: int | None = None) -> list[str]:
    return ["--model.gradient", name, *([] if window is None else ["--model.gradient.window", str(window)])]


def fixed(length: int, min_gap: int, epochs: int) -> list[str]:
    """One length without curriculum, batches of 64 lanes x 64 steps."""
    options = {
        "model.cell.max_memory": 4 * length,
        "data.curriculum": "null",
        "data.length": length,
        "data.min_gap": min_gap,
        "data.steps_per_batch": 64,
        "data.batches_per_epoch": 150,
        "data.validation_size": 4096,
        "data.validation_batch_size": 512,
        "trainer.max_epochs": epochs,
    }
    return [*arguments(options), *stop_at(0.999)]


@dataclass(frozen=True)
class Job:
    """A run of the command line; ``tested``: the longest length at which what it learned is tested afterwards."""

    config: str
    options: list[str]
    tested: int = 0


HELD, LAZY_HELD = "benchmarks.controls.RTRLWithoutInfluence", "benchmarks.controls.LazyExpertRTRLWithoutInfluence"
ALONE = "P after every window"
WHOLE = ["--data.layout", "sequences"]
GAP, UNIFORM = fixed(192, 129, 20), fixed(64, 2, 10)
MORE = {"data.curriculum": [16, 32, 64, 128, 256], "data.length": 512, "data.validation_window": 512}
LONG = [*arguments({**MORE, "trainer.max_epochs": 60}), *stop_at(5.99)]
JOBS: dict[str, Job] = {
    "curriculum RTRL(16)": Job("haystack_rtrl", [], tested=1048576),
    "curriculum TBPTT(16)": Job("haystack_tbptt", [], tested=2048),
    "curriculum RTRL(16), influence held at zero": Job("haystack_rtrl", gradient(HELD, 16), tested=2048),
    f"curriculum RTRL(16), {ALONE}": Job("haystack_rtrl", ["--model.gradient.chunk", "16"], tested=2048),
    "gap RTRL(16)": Job("haystack_rtrl", GAP),
    "gap RTRL(16), three times as long": Job("haystack_rtrl", fixed(192, 129, 60)),
    "gap BPTT": Job("haystack_rtrl", [*GAP, *WHOLE, *gradient("BPTT")]),
    **{f"gap TBPTT({k})": Job("haystack_rtrl", [*GAP, *gradient("TBPTT", k)]) for k in (16, 32, 64)},
    "gap RTRL(16), influence held at zero": Job("haystack_rtrl", [*GAP, *gradient(HELD, 16)]),
    "uniform RTRL(16)": Job("haystack_rtrl", UNIFORM, tested=2048),
    **{
        f"uniform TBPTT({k})": Job("haystack_rtrl", [*UNIFORM, *gradient("TBPTT", k)], tested=2048)
        for k in (4, 8, 16, 32)
    },
    "moe LazyExpertRTRL(4)": Job("haystack_moe_lazy", [], tested=2048),
    f"moe LazyExpertRTRL(4), {ALONE}": Job("haystack_moe_lazy", ["--model.gradient.chunk", "4"], tested=64),
    "moe TBPTT(4)": Job("haystack_moe_lazy", gradient("TBPTT", 4), tested=64),
    "moe LazyExpertRTRL(4), influence held at zero": Job("haystack_moe_lazy", gradient(LAZY_HELD, 4), tested=64),
    "moe to 512 LazyExpertRTRL(4)": Job("haystack_moe_lazy", LONG, tested=16384),
}


def folder_of(name: str, seed: int) -> Path:
    return LOGS / f"{name.replace(' ', '_')}_{seed}"


def fit(name: str, seed: int) -> dict[str, Any]:
    """Train one."""
    job, folder = JOBS[name], folder_of(name, seed)
    folder.mkdir(parents=True, exist_ok=True)
    done = run("fit", job.config, ["--seed_everything", str(seed), *job.options], folder)
    usage = ("read_entropy", "write_entropy", "unwritten_slots", "expert_entropy", "dead_experts")
    figures = {tag: round(done.figures[f"train/{tag}"][-1][1], 4) for tag in usage if f"train/{tag}" in done.figures}
    return {
        "run": name,
        "seed": seed,
        "seconds": round(done.seconds),
        "processor": machine(torch.device("cpu"))["processor"],
        "curve": curve(done),
        **figures,
        "test": {},
    }


def missing(row: dict[str, Any]) -> list[int]:
    """Lengths at which it should be tested, and is not."""
    return [length for length in TESTED if length <= JOBS[row["run"]].tested and str(length) not in row["test"]]


def curve(done: Run) -> list[dict[str, float]]:
    """Every validation: the step, seconds since the beginning, the length and the accuracy at this length."""
    lengths = dict((step, value) for step, value, _ in done.figures["train/length"])
    return [
        {"step": step, "seconds": round(seconds, 1), "length": int(lengths[step]), "accuracy": round(accuracy, 4)}
        for step, accuracy, seconds in done.figures["val/accuracy"]
    ]


def test(job: Job, folder: Path, length: int) -> float:
    checkpoints = sorted(folder.rglob("last.ckpt"), key=lambda path: path.stat().st_mtime)
    if not checkpoints:
        raise FileNotFoundError(f"{folder} holds no last.ckpt to test: take its row out of the results, and run again")
    options = {
        "data.length": length,
        "data.curriculum": "null",
        "data.layout": "stream",
        "data.validation_size": TESTED[length],
        "data.validation_batch_size": min(TESTED[length], 512),
        "data.validation_window": 1024,
        "data.validation_scales": "[1]",
        "ckpt_path": checkpoints[-1],
    }
    done = run("test", job.config, [*job.options, *arguments(options)], folder)
    return round(done.figures["test/accuracy"][-1][1], 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="the run of this name, or all whose names begin so")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parallel", type=int, default=2)
    chosen = parser.parse_args()
    path = RESULTS / f"{NAME}.json"
    results = json.loads(path.read_text())["results"] if path.exists() else []
    rows: dict[tuple[str, int], dict[str, Any]] = {(row["run"], row["seed"]): row for row in results}
    names = [chosen.only] if chosen.only in JOBS else [name for name in JOBS if name.startswith(chosen.only)]
    jobs = [(name, seed) for seed in chosen.seeds for name in names]
    jobs = [job for job in jobs if job not in rows or missing(rows[job])]
    lock = Lock()

    def keep(row: dict[str, Any]) -> None:
        with lock:
            rows[row["run"], row["seed"]] = row
            order = sorted(rows.values(), key=lambda row: (list(JOBS).index(row["run"]), row["seed"]))
            write(NAME, torch.device("cpu"), order)

    def work(job: tuple[str, int]) -> dict[str, Any]:
        row = rows.get(job) or fit(*job)
        keep(row)
        for length in missing(row):
            accuracy = test(JOBS[row["run"]], folder_of(*job), length)
            row["test"][str(length)] = {"samples": TESTED[length], "accuracy": accuracy}
            keep(row)
        return row

    with ThreadPoolExecutor(chosen.parallel) as pool, ended_by_interrupt(pool):
        with without_interrupts():
            waiting = [pool.submit(work, job) for job in jobs]
        for ended in tqdm(as_completed(waiting), total=len(jobs)):
            row = ended.result()
            last, tested = row["curve"][-1], {n: f"{t['accuracy']:.1%}" for n, t in row["test"].items()}
            tqdm.write(
                f"{row['run']}, seed {row['seed']}: length {last['length']} {last['accuracy']:.1%} after "
                f"{last['seconds']:.0f} s; tested: {tested}"
            )


if __name__ == "__main__":
    main()
