"""How much of a training step do the warnings cost that are on by default?

    OMP_NUM_THREADS=1 python -m benchmarks.warnings_cost

Shipped configurations as the command line runs them, with figures and TensorBoard every 10 batches, without validation
and checkpoints. Within one run they are on in every other epoch of 20 batches, so that what slows the machine for a
while slows both; the ratio is the median over neighbours in time. The smallest step, 8 lanes of 32 steps, is the worst
case. The share of the time that is spent in their hooks is measured as well: it hardly depends on what else the machine
does, but leaves out what the loggers take for two figures more.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from benchmarks.common import ratio, write
from rtrl_moe_pl.cli.command_line import main
from rtrl_moe_pl.cli.run_callbacks import WATCHES

CONFIGS = Path(__file__).parents[1] / "configs"
BATCHES = 20  # of an epoch
CASES: dict[str, list[str]] = {
    "anbn_rtrl, 8 lanes": ["--data.batch_size", "8"],
    "anbn_rtrl": [],
    "haystack_moe_lazy": [],
}


class Alternate(Callback):
    """The default watches in every other epoch, and a clock."""

    times: tuple[list[float], list[float]]  # seconds of an epoch without and with them
    inside: list[float]  # seconds of an epoch that are spent in their hooks

    def __init__(self) -> None:
        self.watches = [watch() for watch in WATCHES]
        self.spent = 0.0
        type(self).times, type(self).inside = ([], []), []

    def _each(self, hook: str, *arguments: Any, always: bool = False) -> None:
        if always or self.on:
            began = time.perf_counter()
            for watch in self.watches:
                getattr(watch, hook)(*arguments)
            self.spent += time.perf_counter() - began

    def setup(self, *arguments: Any, stage: str) -> None:
        self._each("setup", *arguments, stage, always=True)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.on = trainer.current_epoch % 2 == 1
        self._each("on_train_start", trainer, pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.began, self.spent = time.perf_counter(), 0.0

    def on_before_optimizer_step(self, *arguments: Any) -> None:
        self._each("on_before_optimizer_step", *arguments)

    def on_train_batch_end(self, *arguments: Any) -> None:
        self._each("on_train_batch_end", *arguments)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.times[self.on].append(time.perf_counter() - self.began)
        if self.on:
            self.inside.append(self.spent)


def measure(case: str, epochs: int) -> dict[str, Any]:
    config = CONFIGS / f"{case.split(',')[0]}.yaml"
    few = ["--trainer.max_steps", "-1", "--trainer.max_epochs", str(2 * epochs + 2)]
    few += ["--data.batches_per_epoch", str(BATCHES), "--trainer.check_val_every_n_epoch", str(10 * epochs)]
    few += ["--trainer.enable_checkpointing", "false", "--trainer.enable_model_summary", "false"]
    few += ["--trainer.num_sanity_val_steps", "0", "--model.lr_scheduler", "null"]
    watched = ["--warnings", "false", "--trainer.callbacks", "benchmarks.warnings_cost.Alternate"]
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()) as errors:
        os.chdir(folder)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                status = main(["fit", "--config", str(config), *few, *CASES[case], *watched])
        finally:
            os.chdir(here)
    if status:
        raise SystemExit(errors.getvalue())
    from benchmarks.warnings_cost import Alternate as Run  # run as a script, this file is another module

    without, with_ = (times[1:] for times in Run.times)  # the first is warm-up
    per_batch = [1e3 * statistics.median(times) / BATCHES for times in (without, with_)]
    return {
        "case": case,
        "epochs": len(without),
        "without_ms": per_batch[0],
        "with_ms": per_batch[1],
        "ratio": ratio(with_, without),
        "ratio_of_medians": per_batch[1] / per_batch[0],
        "ratio_of_minima": min(with_) / min(without),
        "share_in_hooks": statistics.median(Run.inside[1:]) / statistics.median(without),
    }


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=60, help="of each kind and configuration")
    options = parser.parse_args()
    rows = []
    for case in CASES:
        row = measure(case, options.epochs)
        rows.append(row)
        print(
            f"{case:20} {row['without_ms']:7.3f} ms a batch without, {row['with_ms']:7.3f} with: {row['ratio']:.4f}x "
            f"(minima {row['ratio_of_minima']:.4f}x, {row['share_in_hooks']:.2%} in hooks)",
            flush=True,
        )
    print(f"written to {write('warnings_cost', torch.device('cpu'), rows)}")


if __name__ == "__main__":
    run()
