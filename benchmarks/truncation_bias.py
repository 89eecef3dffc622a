"""How wrong is a truncated gradient? TBPTT's against the exact one, over windows.

    OMP_NUM_THREADS=1 python -m benchmarks.truncation_bias       # a few minutes

A GRU of 16 units reads 1,024 haystacks of 64 tokens, each from its beginning. The gradient of its parameters by
TBPTT(k) is compared with BPTT's, with gaps from 2 to 61 steps and with gaps from 33: as it is initialised, and as exact
RTRL has trained it for a while at gaps from 2. Three seeds.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.command import run
from benchmarks.common import write
from benchmarks.haystack_learning import fixed
from rtrl_moe_pl.cells import GRU
from rtrl_moe_pl.data import Cursor, window
from rtrl_moe_pl.gradients import BPTT, TBPTT, GradientAlgorithm
from rtrl_moe_pl.modules import WeightedCrossEntropy
from rtrl_moe_pl.tasks import Haystack

LENGTH, SAMPLES = 64, 1024
WINDOWS = (1, 2, 4, 8, 16, 32, 64)


def gradient(algorithm: GradientAlgorithm, cell: nn.Module, readout: nn.Module, task: Haystack) -> Tensor:
    """Of the recurrent parameters, as one vector."""
    lanes = torch.arange(SAMPLES)
    cursor = Cursor(lanes, torch.zeros_like(lanes))  # every lane has a sequence of its own
    batch, _ = window(task, 0, cursor, LENGTH, SAMPLES)
    inputs = batch.one_hot(task.vocabulary_size).inputs.float()
    memory = algorithm.init(cell, SAMPLES)
    found = algorithm.run(cell, readout, inputs, batch.targets, WeightedCrossEntropy(), memory, batch.starts)
    return torch.cat([grad.flatten() for name, grad in found.grads.items() if name.startswith("cell.")])


def rows(cell: nn.Module, readout: nn.Module, of: str, seed: int) -> list[dict[str, Any]]:
    found = []
    for min_gap in (2, 33):
        task = Haystack(LENGTH, min_gap=min_gap)
        exact = gradient(BPTT(), cell, readout, task)
        for k in WINDOWS:
            truncated = gradient(TBPTT(k), cell, readout, task)
            cosine = torch.nn.functional.cosine_similarity(exact, truncated, dim=0)
            found.append(
                {
                    "of": of,
                    "seed": seed,
                    "min_gap": min_gap,
                    "window": k,
                    "cosine": round(float(cosine), 4),
                    "relative_error": round(float((truncated - exact).norm() / exact.norm()), 4),
                }
            )
    return found


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    task, found = Haystack(LENGTH), []
    for seed in tqdm(range(3)):
        with tempfile.TemporaryDirectory() as folder:
            fitted = run("fit", "haystack_rtrl", ["--seed_everything", str(seed), *fixed(LENGTH, 2, 1)], folder)
            checkpoint = torch.load(fitted.folder / "checkpoints" / "last.ckpt", weights_only=True)
        torch.manual_seed(seed)
        cell = GRU(task.vocabulary_size, 16, max_memory=4 * LENGTH)
        readout = nn.Linear(16, task.num_classes)
        found += rows(cell, readout, "initial", seed)
        weights = {k: v for k, v in checkpoint["state_dict"].items() if k.startswith(("cell.", "readout."))}
        nn.ModuleDict({"cell": cell, "readout": readout}).load_state_dict(weights)
        found += rows(cell, readout, "trained", seed)
        for row in found:
            if row["seed"] == seed:
                tqdm.write(str(row))
    print(write("truncation_bias", torch.device("cpu"), found))


if __name__ == "__main__":
    main()
