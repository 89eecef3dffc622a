"""What does averaging gradients over processes cost a training step?

    OMP_NUM_THREADS=1 python -m benchmarks.averaging

Processes on this machine (gloo) train a routed cell of about 100,000 parameters. Timed are the one flat collective that
`update` makes, alone; one of a thousand numbers, all of it latency; an update, and a whole training step, with it and
without; and, for contrast, a collective for every parameter. What it adds is the median over repetitions of the
difference between neighbours in time; to a step, waiting for the slowest process is part of it. All processes begin a
repetition together; figures are those of rank 0.
"""

from __future__ import annotations

import argparse
import importlib
import os
import socket
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.common import ended_by_interrupt, seconds, without_interrupts, write
from rtrl_moe_pl.cells import RecurrentMoE
from rtrl_moe_pl.data import DelayedRecallDataModule
from rtrl_moe_pl.gradients import TBPTT
from rtrl_moe_pl.modules import WeightedCrossEntropy
from rtrl_moe_pl.training import GradientSums, sum_over_ranks, update

DEVICE = torch.device("cpu")
LANES, STEPS, WARM_UP = 4, 16, 5
UPDATE: Any = importlib.import_module("rtrl_moe_pl.training.update")  # the module: the package has the function


def training(lanes: int) -> tuple[nn.ModuleDict, Callable[[], None], Callable[[], None]]:
    """A model, an update of it by the same gradient every time, and a training step on one batch."""
    torch.manual_seed(0)
    data = DelayedRecallDataModule(batch_size=lanes, steps_per_batch=STEPS, min_gap=4, max_gap=8)
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    cell = RecurrentMoE(data.input_size, slot_size=64, num_slots=4, num_experts=16)
    model = nn.ModuleDict({"cell": cell, "readout": nn.Linear(cell.state_size, data.output_size)})
    parameters, sums, loss = dict(model.named_parameters()), GradientSums(), WeightedCrossEntropy()
    optimizer = torch.optim.Adam(parameters.values())
    gradient = TBPTT(window=STEPS)
    memory = gradient.init(cell, lanes)

    def run() -> dict[str, Tensor]:
        return gradient.run(cell, model["readout"], batch.inputs, batch.targets, loss, memory, batch.starts).grads

    def learn(grads: dict[str, Tensor]) -> None:
        sums.add(grads, batch.targets[1].sum())
        update(parameters, sums, optimizer, gradient_clip=1.0)

    grads = run()
    return model, lambda: learn(grads), lambda: learn(run())


def alone(run: Callable[[], None]) -> Callable[[], None]:
    """The same without the collective."""

    def alone() -> None:
        UPDATE.sum_over_ranks = lambda values: values
        run()
        UPDATE.sum_over_ranks = sum_over_ranks

    return alone


def together(runs: Sequence[Callable[[], object]], repetitions: int) -> list[list[float]]:
    """Seconds of every repetition of every run, taken in turn, all processes beginning together."""
    taken: list[list[float]] = [[] for _ in runs]
    for _ in range(WARM_UP + repetitions):
        for run, times in zip(runs, taken, strict=True):
            dist.barrier()
            times.append(seconds(run, DEVICE))
    return [times[WARM_UP:] for times in taken]


def work(rank: int, processes: int, port: int, repetitions: int, path: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=processes)
    model, learn, step = training(LANES)
    gradients = [torch.zeros_like(parameter) for parameter in model.parameters()]
    flat = torch.cat([gradient.flatten() for gradient in gradients])

    def each(tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            dist.all_reduce(tensor)

    few = flat[:1000].clone()
    runs = (
        lambda: each([flat]),
        lambda: each([few]),
        lambda: each(gradients),
        alone(learn),
        learn,
        alone(step),
        step,
    )
    collective, of_a_thousand, per_parameter, *pairs = together(runs, repetitions)
    if rank == 0:
        row = {
            "processes": processes,
            "parameters": len(flat),
            "tensors": len(gradients),
            "collective_ms": 1e3 * statistics.median(collective),
            "least_collective_ms": 1e3 * min(collective),
            "of_a_thousand_ms": 1e3 * statistics.median(of_a_thousand),
            "per_parameter_ms": 1e3 * statistics.median(per_parameter),
        }
        for what, without, averaged in (("update", *pairs[:2]), ("step", *pairs[2:])):
            row[f"{what}_ms"] = 1e3 * statistics.median(averaged)
            row[f"added_to_{what}_ms"] = 1e3 * statistics.median(a - b for a, b in zip(averaged, without, strict=True))
        torch.save(row, path)
    dist.destroy_process_group()


def measure(processes: int, repetitions: int) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with TemporaryDirectory() as folder, ended_by_interrupt():
        path = str(Path(folder) / "row.pt")
        with without_interrupts():
            arguments = processes, port, repetitions, path
            started = torch.multiprocessing.spawn(work, arguments, processes, join=False)  # type: ignore[attr-defined]
        assert started is not None
        while not started.join():
            pass
        return torch.load(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--repetitions", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for processes in options.processes:
        row = measure(processes, options.repetitions)
        rows.append(row)
        print(
            f"{processes} processes, {row['parameters']:,} parameters: one collective {row['collective_ms']:.2f} ms "
            f"(least {row['least_collective_ms']:.2f}; of a thousand numbers {row['of_a_thousand_ms']:.2f}), one for "
            f"each of {row['tensors']} {row['per_parameter_ms']:.2f} ms; {row['added_to_update_ms']:.2f} ms of an "
            f"update of {row['update_ms']:.2f}, {row['added_to_step_ms']:.2f} ms of a step of {row['step_ms']:.1f}",
            flush=True,
        )
    print(f"written to {write('averaging', DEVICE, rows)}")


if __name__ == "__main__":
    main()
