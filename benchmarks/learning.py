"""Do the shipped configurations learn, and do the controls fail? Three seeds of each.

    OMP_NUM_THREADS=1 python -m benchmarks.learning               # everything, two runs at a time
    python -m benchmarks.learning --only recall --seeds 0 1 2     # these rows of the results anew, the others stay

a^n b^n: every cell's accuracy at the trained lengths, twice and four times as long. Delayed recall: exact RTRL and
BPTT against TBPTT at RTRL's window, and against RTRL whose influence is held at zero, which must stay at chance.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.command import run
from benchmarks.common import RESULTS, machine, write

WHOLE = ["--data.layout", "sequences", "--model.gradient", "BPTT"]
HELD = ["--model.gradient", "benchmarks.controls.RTRLWithoutInfluence", "--model.gradient.window", "8"]
RUNS: dict[str, tuple[str, list[str]]] = {
    "anbn RTRL, GRU": ("anbn_rtrl", []),
    "anbn RTRL, LSTM": ("anbn_lstm", []),
    "anbn RTRL, SimpleRNN": ("anbn_simple_rnn", []),
    "anbn RTRL, LeakyIntegrator": ("anbn_long", []),
    "anbn LazyExpertRTRL, RecurrentMoE": ("anbn_moe_rtrl", []),
    "anbn BPTT": ("anbn_bptt", []),
    "anbn TBPTT": ("anbn_tbptt", []),
    "recall RTRL": ("recall_rtrl", []),
    "recall TBPTT": ("recall_tbptt", []),
    "recall BPTT": ("recall_rtrl", WHOLE),
    "recall RTRL, influence held at zero": ("recall_rtrl", HELD),
}


def fit(name: str, seed: int) -> dict[str, Any]:
    """Train one run, and read its curves."""
    config, extra = RUNS[name]
    with tempfile.TemporaryDirectory() as folder:
        done = run("fit", config, ["--seed_everything", str(seed), *extra], folder)
    tags = [tag for tag in done.figures if tag.startswith("val/accuracy")]
    curves = {tag: [(step, round(value, 4)) for step, value, _ in done.figures[tag]] for tag in tags}
    reached = [step for step, value in curves["val/accuracy"] if value >= 0.995]
    return {
        "run": name,
        "seed": seed,
        "seconds": round(done.seconds, 1),
        "processor": machine(torch.device("cpu"))["processor"],
        "accuracy": {tag: curve[-1][1] for tag, curve in curves.items()},
        "steps": curves["val/accuracy"][-1][0],
        "steps_to_99.5": reached[0] if reached else None,
        "curve": curves["val/accuracy"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="runs whose name begins so")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parallel", type=int, default=2)
    arguments = parser.parse_args()
    jobs = [(name, seed) for name in RUNS if name.startswith(arguments.only) for seed in arguments.seeds]
    path = RESULTS / "learning.json"
    kept = json.loads(path.read_text())["results"] if path.exists() else []
    rows = {(row["run"], row["seed"]): row for row in kept}
    with ThreadPoolExecutor(arguments.parallel) as pool:
        for row in tqdm(pool.map(lambda job: fit(*job), jobs), total=len(jobs)):
            rows[row["run"], row["seed"]] = row
            shown = ", ".join(f"{tag.removeprefix('val/')} {value:.1%}" for tag, value in row["accuracy"].items())
            tqdm.write(f"{row['run']}, seed {row['seed']}: {shown} in {row['seconds']:.0f} s")
            order = sorted(rows.values(), key=lambda row: (list(RUNS).index(row["run"]), row["seed"]))
            write("learning", torch.device("cpu"), order)


if __name__ == "__main__":
    main()
