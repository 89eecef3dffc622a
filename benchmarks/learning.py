"""Do the shipped configurations learn, and do the controls fail? Three seeds of each.

    OMP_NUM_THREADS=1 python -m benchmarks.learning               # everything, two runs at a time
    python -m benchmarks.learning --only recall --seeds 0 1 2     # these rows of the results anew, the others stay

a^n b^n: every cell's accuracy at the trained lengths, twice and four times as long. Delayed recall: exact RTRL and
BPTT against TBPTT at RTRL's window, and against RTRL whose influence is held at zero, which must stay at chance.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch

from benchmarks.command import run, train_all
from benchmarks.common import machine

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
    def shown(row: dict[str, Any]) -> str:
        return ", ".join(f"{tag.removeprefix('val/')} {value:.1%}" for tag, value in row["accuracy"].items())

    train_all(__doc__ or "", "learning", RUNS, fit, shown)


if __name__ == "__main__":
    main()
