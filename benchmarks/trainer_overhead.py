"""How much slower is a Lightning training loop than a bare one?

    OMP_NUM_THREADS=1 python -m benchmarks.trainer_overhead

Both loops make the same batches of a^n b^n on the fly, compute the same gradients and call the same update. The
Lightning loop adds what a user of the command line gets: hooks, the data module, figures and TensorBoard every 10
batches, the progress bar. Checkpoints and validation are left out of both. Repetitions take turns; the ratio is the
median over repetitions of neighbours in time.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import statistics
import tempfile
import time
import warnings
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from torch import nn

from benchmarks.common import ratio, write
from rtrl_moe_pl.cells import GRU, Cell, VanillaRNN
from rtrl_moe_pl.data import AnBnDataModule
from rtrl_moe_pl.gradients import BPTT, RTRL, GradientAlgorithm
from rtrl_moe_pl.modules import SequenceModule, WeightedCrossEntropy
from rtrl_moe_pl.training import GradientSums, update

HIDDEN, LANES, STEPS = 64, 8, 64
WARM_UP, TIMED = 5, 20  # batches of a repetition


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3)


def make_data(gradient: GradientAlgorithm) -> AnBnDataModule:
    if gradient.window is None:  # n_max such that a padded sequence is as long as a window of the stream
        return AnBnDataModule(n_max=STEPS // 2, layout="sequences", batch_size=LANES, batches_per_epoch=WARM_UP + TIMED)
    return AnBnDataModule(batch_size=LANES, steps_per_batch=STEPS, batches_per_epoch=WARM_UP + TIMED)


def bare_loop(cell: type[Cell], gradient: GradientAlgorithm) -> float:
    """Seconds per batch of a plain loop."""
    data, recurrent, loss = make_data(gradient), cell(3, HIDDEN), WeightedCrossEntropy()
    readout = nn.Linear(HIDDEN, 2)
    parameters = dict(nn.ModuleDict({"cell": recurrent, "readout": readout}).named_parameters())
    optimizer = adam(parameters.values())
    memory = gradient.init(recurrent, LANES)
    sums = GradientSums()
    times = []
    for request in data.train_dataloader():
        batch = data.on_after_batch_transfer(request, 0)
        if gradient.window is None:
            memory.reset()
        result = gradient.run(recurrent, readout, batch.inputs, batch.targets, loss, memory, batch.starts)
        sums.add(result.grads, batch.targets[1].sum())
        update(parameters, sums, optimizer, gradient_clip=1.0)
        times.append(time.perf_counter())
    return (times[-1] - times[WARM_UP - 1]) / TIMED


class Clock(Callback):
    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *arguments: Any) -> None:
        self.times.append(time.perf_counter())


def lightning_loop(cell: type[Cell], gradient: GradientAlgorithm) -> float:
    """Seconds per batch under the Trainer."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        trainer = Trainer(
            default_root_dir=folder,
            accelerator="cpu",
            max_epochs=1,
            log_every_n_steps=10,
            limit_val_batches=0,
            enable_checkpointing=False,
            enable_model_summary=False,
            callbacks=[clock, TQDMProgressBar(refresh_rate=10)],
        )
        model = SequenceModule(cell(3, HIDDEN), 2, gradient, optimizer=adam)
        trainer.fit(model, datamodule=make_data(gradient))
    return (clock.times[-1] - clock.times[WARM_UP - 1]) / TIMED


def compare(cell: type[Cell], gradient: GradientAlgorithm, repetitions: int) -> dict[str, Any]:
    times = []
    for _ in range(repetitions + 1):
        times.append((bare_loop(cell, gradient), lightning_loop(cell, gradient)))
    bare, lightning = zip(*times[1:], strict=True)  # the first is warm-up
    return {
        "cell": cell.__name__,
        "gradient": repr(gradient),
        "hidden": HIDDEN,
        "lanes": LANES,
        "steps": STEPS,
        "bare_ms": 1e3 * statistics.median(bare),
        "lightning_ms": 1e3 * statistics.median(lightning),
        "ratio": ratio(lightning, bare),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=9)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    rows = []
    for cell in (VanillaRNN, GRU):
        for gradient in (RTRL(window=STEPS), BPTT()):
            row = compare(cell, gradient, options.repetitions)
            rows.append(row)
            print(
                f"{row['cell']:10} {row['gradient']:16} bare {row['bare_ms']:6.2f} ms, "
                f"Lightning {row['lightning_ms']:6.2f} ms a batch of {LANES} x {STEPS}: {row['ratio']:.3f}x",
                flush=True,
            )
    print(f"written to {write('trainer_overhead', torch.device('cpu'), rows)}")


if __name__ == "__main__":
    main()
