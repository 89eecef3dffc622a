"""Do the shipped configurations learn, and do the controls fail? Three seeds of each.

    OMP_NUM_THREADS=1 python -m benchmarks.learning               # everything, two runs at a time
    python -m benchmarks.learning --only recall --seeds 0 1 2

a^n b^n: every cell's accuracy at the trained lengths, twice and four times as long. Delayed recall: exact RTRL and
BPTT against TBPTT at RTRL's window, and against RTRL whose influence is held at zero, which must stay at chance.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.common import write
from rtrl_moe_pl.gradients import RTRL
from rtrl_moe_pl.linearization import WindowLinearization
from rtrl_moe_pl.sensitivities import DenseSensitivity, Sensitivity

ROOT = Path(__file__).parent.parent
WHOLE = ["--data.layout", "sequences", "--model.gradient", "BPTT"]
HELD = ["--model.gradient", "benchmarks.learning.RTRLWithoutInfluence", "--model.gradient.window", "8"]
RUNS: dict[str, tuple[str, list[str]]] = {
    "anbn RTRL, GRU": ("anbn_rtrl", []),
    "anbn RTRL, LSTM": ("anbn_lstm", []),
    "anbn RTRL, SimpleRNN": ("anbn_simple_rnn", []),
    "anbn RTRL, LeakyIntegrator": ("anbn_long", []),
    "anbn BPTT": ("anbn_bptt", []),
    "anbn TBPTT": ("anbn_tbptt", []),
    "recall RTRL": ("recall_rtrl", []),
    "recall TBPTT": ("recall_tbptt", []),
    "recall BPTT": ("recall_rtrl", WHOLE),
    "recall RTRL, influence held at zero": ("recall_rtrl", HELD),
}


class _HeldAtZero(DenseSensitivity):
    """Forgets the influence after every window."""

    def contract_and_advance(self, linearization: WindowLinearization) -> dict[str, Tensor]:
        gradients = super().contract_and_advance(linearization)
        self.zero_()
        return gradients


class RTRLWithoutInfluence(RTRL):
    """The control: everything that RTRL does, but for the carried influence."""

    exact = False

    def __init__(self, window: int) -> None:
        super().__init__(window, chunk=window)  # a longer chunk would see beyond the window without P

    def _sensitivity(self, cell: nn.Module, shapes: dict[str, torch.Size], state: Tensor) -> Sensitivity:
        return _HeldAtZero(shapes, state.shape[0], state.shape[1], state.dtype, state.device)


def fit(name: str, seed: int) -> dict[str, Any]:
    """Train one run in a process of its own, and read its curves from TensorBoard's log."""
    config, extra = RUNS[name]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "rtrl_moe_pl", "fit", "--config", str(ROOT / "configs" / f"{config}.yaml")]
        command += ["--seed_everything", str(seed), "--trainer.default_root_dir", folder]
        command += ["--trainer.enable_progress_bar", "false", *extra]
        begin = time.perf_counter()
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        taken = time.perf_counter() - begin
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        (events,) = Path(folder).rglob("events.out.tfevents.*")
        log = EventAccumulator(str(events)).Reload()
    tags = [tag for tag in log.Tags()["scalars"] if tag.startswith("val/accuracy")]
    curves = {tag: [(event.step, round(event.value, 4)) for event in log.Scalars(tag)] for tag in tags}
    reached = [step for step, value in curves["val/accuracy"] if value >= 0.995]
    return {
        "run": name,
        "seed": seed,
        "seconds": round(taken, 1),
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
    results = []
    with ThreadPoolExecutor(arguments.parallel) as pool:
        for result in tqdm(pool.map(lambda job: fit(*job), jobs), total=len(jobs)):
            results.append(result)
            shown = ", ".join(f"{tag.removeprefix('val/')} {value:.1%}" for tag, value in result["accuracy"].items())
            tqdm.write(f"{result['run']}, seed {result['seed']}: {shown} in {result['seconds']:.0f} s")
    suffix = f"_{arguments.only.split()[0]}" if arguments.only else ""
    print(f"written to {write(f'learning{suffix}', torch.device('cpu'), results)}")


if __name__ == "__main__":
    main()
