"""Run by test_data_parallel: train with every algorithm on the processes asked for, and write down what came of it.

Usage: data_parallel_run.py FOLDER PROCESSES [OPTIMIZER | control]

One process group serves all runs. With "control", a short one, nothing is summed over ranks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from rtrl_moe_pl.cells import GRU, RecurrentMoE
from rtrl_moe_pl.data import Batch, DelayedRecallDataModule
from rtrl_moe_pl.gradients import BPTT, RTRL, TBPTT, BlockRTRL, GradientAlgorithm, LazyExpertRTRL
from rtrl_moe_pl.modules import ManualModule, SequenceModule
from rtrl_moe_pl.modules.figures import Stopwatch
from rtrl_moe_pl.training.strategy import BroadcastStrategy
from tests.modules import reasoning_helpers
from tests.modules.helpers import Figures, trainer

LANES = 8  # of all processes
BATCHES = 60
VALUES = 4


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3)


def sequences(gradient: GradientAlgorithm, lanes: int, optimizer: Any) -> tuple[ManualModule, LightningDataModule]:
    """Windows of 8 steps, many of them without a question in any lane of a process, some without any at all."""
    routed = isinstance(gradient, BlockRTRL | LazyExpertRTRL)
    cell = RecurrentMoE(2 * VALUES + 1, 4, 3, 5, drift_penalty=0.1) if routed else GRU(2 * VALUES + 1, 6)
    data = DelayedRecallDataModule(
        values=VALUES,
        noise_tokens=4,
        min_gap=6,
        max_gap=30,
        batch_size=lanes,
        layout="sequences" if gradient.window is None else "stream",
        steps_per_batch=8,
        batches_per_epoch=BATCHES,
        validation_size=11,
        validation_batch_size=lanes,
        validation_scales=[1],
    )
    return SequenceModule(cell, VALUES, gradient, optimizer=optimizer), data


def puzzles(lanes: int, optimizer: Any) -> tuple[ManualModule, LightningDataModule]:
    sizes = {"batches_per_epoch": BATCHES, "validation_size": 11, "validation_batch_size": lanes}
    data = reasoning_helpers.data(batch_size=lanes, demos=2, demo_dropout=0.3, **sizes)
    return reasoning_helpers.module(optimizer=optimizer), data


Maker = Callable[[int, Any], tuple[ManualModule, LightningDataModule]]
RUNS: dict[str, Maker] = {
    "RTRL": lambda *made: sequences(RTRL(window=4, chunk=16), *made),
    "TBPTT": lambda *made: sequences(TBPTT(window=4), *made),
    "BPTT": lambda *made: sequences(BPTT(), *made),
    "BlockRTRL": lambda *made: sequences(BlockRTRL(window=4, chunk=16), *made),
    "LazyExpertRTRL": lambda *made: sequences(LazyExpertRTRL(window=4, chunk=16), *made),
    "ETRM": puzzles,
}
OPTIMIZERS: dict[str, Any] = {"Adam": adam, "SGD": sgd}


class Collectives(Callback):
    """Which collectives each training batch made, their names and sizes, and whether it had any loss here."""

    names = ("all_reduce", "all_gather", "broadcast", "barrier", "gather", "reduce", "broadcast_object_list")

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.weights: list[float] = []
        self._made: list[str] = []
        self._own = {name: getattr(dist, name) for name in self.names}

    def setup(self, *_: Any, **__: Any) -> None:
        for name, own in self._own.items():
            setattr(dist, name, self._counted(name, own))

    def teardown(self, *_: Any, **__: Any) -> None:
        for name, own in self._own.items():
            setattr(dist, name, own)

    def _counted(self, name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            size = arguments[0].numel() if arguments and isinstance(arguments[0], Tensor) else ""
            self._made.append(f"{name} {size}".rstrip())
            return own(*arguments, **options)

        return call

    def on_train_batch_start(self, *_: Any) -> None:
        self._made.clear()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(self._made.copy())
        self.weights.append(float(batch.targets[1].sum()) if isinstance(batch, Batch) else 1.0)


def fit(folder: Path, processes: int, maker: Maker, optimizer: Any, **options: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    module, data = maker(LANES // processes, optimizer)
    figures, collectives = Figures(), Collectives()
    defaults: dict[str, Any] = {"max_steps": -1, "max_epochs": 1, "limit_val_batches": None, "log_every_n_steps": 5}
    made = trainer(
        folder,
        devices=processes,
        strategy="broadcast" if processes > 1 else "auto",
        callbacks=[figures, collectives],
        **{**defaults, **options},
    )
    before = {*module.state_dict(), *dict(module.named_buffers())}
    made.fit(module, datamodule=data)
    assert processes == 1 or isinstance(made.strategy, BroadcastStrategy)
    return {
        "weights": {name: p.detach() for name, p in module.named_parameters()},
        "buffers": {name: b.detach() for name, b in module.named_buffers() if not name.startswith("evaluations")},
        "optimizer": made.optimizers[0].state_dict()["state"],
        "steps": made.global_step,
        "train": [{k: v for k, v in logged.items() if k.startswith("train/")} for logged in figures.logged],
        "val": {name: float(value) for name, value in made.callback_metrics.items() if name.startswith("val/")},
        "carry": module.carry_state(),
        "new": [n for n in (*module.state_dict(), *dict(module.named_buffers())) if n not in before],
        "collectives": collectives.batches,
        "weight": collectives.weights,
    }


def main(folder: Path, processes: int, optimizer: str = "Adam") -> None:
    Stopwatch.elapsed = lambda self: 1.0  # speeds are numbers of tokens and puzzles
    results = {}
    if optimizer == "control":
        dist.all_reduce = lambda *_, **__: None
        for run, maker in RUNS.items():
            results[run, 32] = fit(folder, processes, maker, adam, limit_train_batches=10, limit_val_batches=0)
    else:
        for run, maker in RUNS.items():
            for bits, precision in ((32, "32-true"), (64, "64-true")):
                results[run, bits] = fit(folder, processes, maker, OPTIMIZERS[optimizer], precision=precision)
    rank = dist.get_rank() if processes > 1 else 0
    torch.save(results, folder / f"rank_{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
