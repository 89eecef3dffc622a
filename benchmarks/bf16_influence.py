"""What keeping the influence matrix in bfloat16 costs in the direction of the gradient, and saves in bytes.

    OMP_NUM_THREADS=1 python -m benchmarks.bf16_influence
    OMP_NUM_THREADS=1 python -m benchmarks.bf16_influence --costs  # time and bytes again, the rest as it was

The gradient is that of the loss of the last window of 8 steps alone, so that all but those steps comes through the
influence. *At rest*: parameters fixed, against BPTT in float64 over all steps. *While training*: one online update a
window by the float32 gradient, which is also the reference; the bfloat16 memory sees the same windows and parameters.
*without*: the same cosine for the gradient of the window alone (TBPTT), the control: how much there is to lose.
An advance rounds: with ``chunk`` 8 after every window, by default after a few hundred steps.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.common import interleaved, ratio, read, write
from rtrl_moe_pl.cells import GRU, LeakyIntegrator, RecurrentMoE
from rtrl_moe_pl.gradients import BPTT, RTRL, TBPTT, BlockRTRL, GradientAlgorithm, LazyExpertRTRL, sequence_gradient
from rtrl_moe_pl.gradients.base import named_parameters

LANES, WINDOW, WIDTH, OUTPUTS = 4, 8, 4, 2
LENGTHS = (48, 504, 5000)  # whole windows: about 50, 500 and 5,000 steps
ALGORITHMS: dict[str, type[RTRL]] = {"RTRL": RTRL, "BlockRTRL": BlockRTRL, "LazyExpertRTRL": LazyExpertRTRL}
CASES = [
    ("GRU", "RTRL", 8),
    ("GRU", "RTRL", None),
    ("GRU, memories of 2 to 2,000 steps", "RTRL", 8),
    ("GRU, memories of 2 to 2,000 steps", "RTRL", None),
    ("integrator, no decay", "RTRL", 8),
    ("integrator, no decay", "RTRL", None),
    ("RecurrentMoE", "BlockRTRL", 8),
    ("RecurrentMoE", "BlockRTRL", None),
    ("RecurrentMoE", "LazyExpertRTRL", 8),
]


def make_cell(name: str) -> nn.Module:
    if name == "RecurrentMoE":
        return RecurrentMoE(WIDTH, 4, 4, 4)
    if name.startswith("integrator"):
        return LeakyIntegrator(WIDTH, 16)
    return GRU(WIDTH, 16, max_memory=2000 if "memories" in name else None)


def squares(outputs: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
    """Summed over the steps with a weight; outputs through a sigmoid, so that unbounded states stay harmless."""
    wanted, weights = targets
    return (weights[..., None] * (torch.sigmoid(outputs) - wanted).square()).sum()


def flat(grads: dict[str, Tensor]) -> Tensor:
    """Of the recurrent parameters."""
    return torch.cat([g.flatten().double() for name, g in grads.items() if name.startswith("cell.")])


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def problem(name: str, steps: int) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """Cell, readout, inputs with a mean of their own in every lane, and targets."""
    torch.manual_seed(0)
    cell = make_cell(name)
    readout = nn.Linear(int(cell.state_size), OUTPUTS)  # type: ignore[arg-type]
    if name.startswith("integrator"):
        nn.init.uniform_(readout.weight, -1e-3, 1e-3)
    inputs = torch.randn(LANES, steps, WIDTH) + 0.5 * torch.randn(LANES, 1, WIDTH)
    return cell, readout, inputs, torch.rand(LANES, steps, OUTPUTS)


def at_rest(name: str, algorithm: str, chunk: int | None, steps: int) -> dict[str, float]:
    """Cosine to BPTT with and without the influence, and the relative error of the former."""
    cell, readout, inputs, wanted = problem(name, steps)
    weights = torch.zeros(LANES, steps)
    weights[:, -WINDOW:] = 1
    kind = ALGORITHMS[algorithm]

    def gradient(of: GradientAlgorithm, dtype: torch.dtype = torch.float32) -> Tensor:
        own_cell, own_readout = copy.deepcopy(nn.ModuleList([cell, readout])).to(dtype)
        targets = wanted.to(dtype), weights.to(dtype)
        return flat(sequence_gradient(of, own_cell, own_readout, inputs.to(dtype), targets, squares).grads)

    truth = gradient(BPTT(), torch.float64)
    rounded = gradient(kind(WINDOW, chunk=chunk, influence_dtype="bfloat16"))
    return {
        "bfloat16": cosine(rounded, truth),
        "bfloat16_error": float((rounded - truth).norm() / truth.norm()),
        "float32": cosine(gradient(kind(WINDOW, chunk=chunk)), truth),
        "without": cosine(gradient(TBPTT(WINDOW)), truth),
    }


def while_training(name: str, algorithm: str, chunk: int | None, lengths: tuple[int, ...]) -> list[dict[str, float]]:
    """Cosine to the float32 gradient at the same parameters, after each of these numbers of steps."""
    cell, readout, inputs, wanted = problem(name, max(lengths))
    weights = torch.ones(LANES, WINDOW)
    kind = ALGORITHMS[algorithm]
    runs = [kind(WINDOW, chunk=chunk), kind(WINDOW, chunk=chunk, influence_dtype="bfloat16"), TBPTT(WINDOW)]
    memories = [run.init(cell, LANES) for run in runs]
    parameters = named_parameters(cell, readout)
    optimizer = torch.optim.Adam(parameters.values(), 1e-3)
    found = []
    for begin in range(0, max(lengths), WINDOW):
        here = slice(begin, begin + WINDOW)
        targets = wanted[:, here], weights
        grads = [
            run.step(cell, readout, inputs[:, here], targets, squares, memory).grads
            for run, memory in zip(runs, memories, strict=True)
        ]
        if here.stop in lengths:
            exact, rounded, cut = map(flat, grads)
            found.append({"bfloat16": cosine(rounded, exact), "without": cosine(cut, exact)})
        for key, parameter in parameters.items():
            parameter.grad = grads[0][key]
        optimizer.step()
    return found


def cost(size: int, lanes: int, repetitions: int, device: torch.device) -> dict[str, Any]:
    """Time and bytes of bfloat16 over float32: RTRL(16) of a GRU, over whole chunks."""
    torch.manual_seed(0)
    cell, readout = GRU(WIDTH, size).to(device), nn.Linear(size, OUTPUTS).to(device)
    steps = 3 * size
    inputs = torch.randn(lanes, steps, WIDTH, device=device)
    targets = torch.rand(lanes, steps, OUTPUTS, device=device), torch.ones(lanes, steps, device=device)
    row: dict[str, Any] = {"size": size, "lanes": lanes}
    for chunk in (None, 16):
        runs = [RTRL(16, chunk=chunk), RTRL(16, chunk=chunk, influence_dtype="bfloat16")]
        memories = [run.init(cell, lanes, device) for run in runs]

        def steps_of(run: RTRL, memory: Any) -> None:
            run.run(cell, readout, inputs, targets, squares, memory)

        pairs = zip(runs, memories, strict=True)
        calls = [lambda run=run, memory=memory: steps_of(run, memory) for run, memory in pairs]
        exact, rounded = interleaved(calls, repetitions, device, warm_up=2)
        row[f"time_ratio_chunk_{chunk or 'default'}"] = ratio(rounded, exact)
        row[f"us_per_step_chunk_{chunk or 'default'}"] = [1e6 * statistics.median(t) / steps for t in (exact, rounded)]
        row["bytes"] = [memory.base.nbytes for memory in memories]
    return row


def gradients() -> list[dict[str, Any]]:
    """Rows of all cases."""
    rows: list[dict[str, Any]] = []
    for name, algorithm, chunk in tqdm(CASES):
        training = while_training(name, algorithm, chunk, LENGTHS)
        for steps, online in zip(LENGTHS, training, strict=True):
            rest = at_rest(name, algorithm, chunk, steps)
            rows.append({"cell": name, "algorithm": algorithm, "chunk": chunk, "steps": steps})
            rows[-1] |= {"at_rest": rest, "training": online}
            tqdm.write(
                f"{name}, {algorithm}, chunk {chunk}, {steps} steps: at rest 1 - cos {1 - rest['bfloat16']:.1e} "
                f"(float32 {1 - rest['float32']:.0e}, without {1 - rest['without']:.1e}), training "
                f"{1 - online['bfloat16']:.1e} (without {1 - online['without']:.1e})"
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--costs", action="store_true", help="only time and bytes")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="a GPU: only time and bytes")
    parser.add_argument("--repetitions", type=int, default=9)
    arguments = parser.parse_args()
    device = arguments.device
    rows = []
    if device.type == "cpu":
        rows = read("bf16_influence", device)["gradients"] if arguments.costs else gradients()
    costs = [cost(size, 8, arguments.repetitions, device) for size in (32, 64, 128)]
    for row in costs:
        print(row)
    print(f"written to {write('bf16_influence', device, {'gradients': rows, 'costs': costs})}")


if __name__ == "__main__":
    main()
