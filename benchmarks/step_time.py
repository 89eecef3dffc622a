"""Time per token of BPTT, RTRL at several windows, and the naive step-by-step method.

    OMP_NUM_THREADS=1 python -m benchmarks.step_time             # the whole grid, one thread
    python -m benchmarks.step_time --threads 2 --quick           # n = 64 and 128, B = 8
    python -m benchmarks.step_time --longest 45 --only 256x8 --cells RNN     # slow points of the same machine
    python -m benchmarks.step_time --device cuda

BPTT is eager autograd over n steps, its readout applied once to all of them. A time is the median of interleaved
repetitions over windows of n steps in all; a ratio is the median of the ratios of neighbours in time.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.common import interleaved, ratio, read, seconds, sgemm_peak, write
from benchmarks.naive import NaiveRTRL
from rtrl_moe_pl.cells import GRU, LSTM, VanillaRNN
from rtrl_moe_pl.gradients import BPTT, RTRL, GradientAlgorithm, MemoryForecastError
from rtrl_moe_pl.linearization import WindowLinearization
from rtrl_moe_pl.sensitivities import DenseSensitivity

INPUTS, OUTPUTS = 8, 4
CELLS: dict[str, Callable[[int, int], nn.Module]] = {"RNN": VanillaRNN, "GRU": GRU, "LSTM": LSTM}


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return ((outputs - targets) ** 2).sum()


class Point:
    """One cell, size and batch."""

    def __init__(self, name: str, hidden: int, batch: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.hidden, self.batch = hidden, batch
        self.cell = CELLS[name](INPUTS, hidden).to(device)
        self.readout = nn.Linear(int(self.cell.state_size), OUTPUTS).to(device)  # type: ignore[arg-type]
        longest = RTRL(window=hidden).chunk_for(self.cell)
        self.inputs = torch.randn(batch, longest, INPUTS, device=device)
        self.targets = torch.randn(batch, longest, OUTPUTS, device=device)

    def windows(self, algorithm: GradientAlgorithm, steps: int) -> Callable[[], object]:
        """Run ``steps`` steps of the stream, carrying on from wherever it is."""
        memory = algorithm.init(self.cell, self.batch, self.inputs.device)
        memory.fresh = False
        assert steps <= self.inputs.shape[1]
        x, y = self.inputs[:, :steps], self.targets[:, :steps]
        return lambda: algorithm.run(self.cell, self.readout, x, y, squared_error, memory)

    def naive(self, steps: int) -> Callable[[], object]:
        method = NaiveRTRL(self.cell, self.readout, self.batch)
        return lambda: method.step(self.inputs[:, :steps], self.targets[:, :steps], squared_error)


def measure(
    name: str, hidden: int, batch: int, peak: float, repetitions: int, longest: float, device: torch.device
) -> dict[str, Any]:
    """All methods at one point; those that take more than ``longest`` seconds a repetition are left out, and said."""
    point = Point(name, hidden, batch, device)
    labels: dict[str, tuple[Callable[[], object], int]] = {"BPTT": (point.windows(BPTT(), hidden), hidden)}
    row: dict[str, Any] = {"cell": name, "n": hidden, "batch": batch}
    for window in sorted({1, 8, hidden // 2, hidden}):
        algorithm = RTRL(window=window)
        steps = max(algorithm.chunk_for(point.cell) // window, 1) * window  # one advance of P in every repetition
        cost = algorithm.forecast(point.cell, batch, torch.float32, steps)
        expected = cost.operations_per_token * batch * steps / (0.3 * peak)
        if expected > longest:
            row[f"RTRL({window})"] = f"left out: about {expected:.0f} s a repetition"
            continue
        try:
            labels[f"RTRL({window})"] = (point.windows(algorithm, steps), steps)
        except MemoryForecastError as refusal:
            row[f"RTRL({window})"] = f"refused: {refusal}"
    if hidden <= 128:
        labels["naive"] = (point.naive(2), 2)
    first = {label: seconds(run, device) for label, (run, _) in labels.items()}
    for label in [label for label, taken in first.items() if taken > longest]:
        row[label] = f"left out: over {longest:.0f} s a repetition"
        del labels[label]
    count = max(3, min(repetitions, int(5 * longest / max(sum(first[label] for label in labels), 1e-3))))
    times = interleaved([run for run, _ in labels.values()], count, device, warm_up=0)
    token = {la: [t / steps for t in ts] for (la, (_, steps)), ts in zip(labels.items(), times, strict=True)}
    whole = f"RTRL({hidden})"
    for label, values in token.items():
        entry = {"us_per_token": statistics.median(values) * 1e6}
        if label != "BPTT":
            entry["over_bptt"] = ratio(values, token["BPTT"])
        if label.startswith("RTRL"):
            window = int(label[5:-1])
            steps = labels[label][1]
            operations = RTRL(window=window).forecast(point.cell, batch, torch.float32, steps).operations_per_token
            entry["share_of_peak"] = operations * batch / statistics.median(values) / peak
        if label == "naive" and whole in token:
            entry["over_rtrl"] = ratio(values, token[whole])
        row[label] = entry
    row["repetitions"] = count
    return row


def influence_update(hidden: int, batch: int, repetitions: int, device: torch.device) -> dict[str, float]:
    """Share of the sgemm peak that P <- J P + M reaches, and J P alone, beside a product in the same loop."""
    point = Point("RNN", hidden, batch, device)
    kept: list[tuple[DenseSensitivity, WindowLinearization]] = []

    class Spy(DenseSensitivity):
        def contract_and_advance(self, linearization: WindowLinearization) -> dict[str, Tensor]:
            kept[:] = [(self, linearization)]
            return super().contract_and_advance(linearization)

    class SpyRTRL(RTRL):
        def _sensitivity(self, cell: nn.Module, shapes: dict[str, torch.Size], state: Tensor) -> Spy:
            return Spy(shapes, state.shape[0], state.shape[1], state.dtype, state.device)

    run = point.windows(SpyRTRL(window=hidden, chunk=hidden), hidden)
    run()
    sensitivity, linearization = kept[0]
    turn = torch.linalg.qr(torch.randn(batch, hidden, hidden)).Q.to(device)  # keeps P at its size
    alone = WindowLinearization(turn, linearization.cotangent, {}, linearization.shapes)
    other = copy.deepcopy(sensitivity)
    a, b = torch.randn(2, 1024, 1024, device=device)
    out = torch.empty(1024, 1024, device=device)
    peak, both, product = interleaved(
        [
            lambda: torch.mm(a, b, out=out),
            lambda: sensitivity.contract_and_advance(linearization),
            lambda: other.contract_and_advance(alone),
        ],
        repetitions,
        device,
    )
    rate = [2 * 1024**3 / t for t in peak]
    columns = sum(p.numel() for p in point.cell.parameters())
    operations = 2 * batch * hidden * hidden * columns  # of J P; M costs the same over a window of n steps
    return {
        "n": hidden,
        "batch": batch,
        "update_share_of_sgemm": statistics.median(2 * operations / t / r for t, r in zip(both, rate, strict=True)),
        "product_share_of_sgemm": statistics.median(operations / t / r for t, r in zip(product, rate, strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--longest", type=float, default=10.0, help="seconds of one repetition at most")
    parser.add_argument("--quick", action="store_true", help="n = 64 and 128, B = 8 alone")
    parser.add_argument("--only", nargs="+", metavar="NxB", help="measure these points anew; keep the rest of the file")
    parser.add_argument("--cells", nargs="+", choices=sorted(CELLS), default=list(CELLS))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    name = f"step_time_cpu_{arguments.threads}" if device.type == "cpu" else "step_time"
    peak = sgemm_peak(device)
    sizes = [(64, 8), (128, 8)] if arguments.quick else [(n, b) for n in (32, 64, 128, 256) for b in (8, 32)]
    if arguments.only:
        sizes = [(int(n), int(b)) for n, b in (point.split("x") for point in arguments.only)]
    rows = []
    for cell, hidden, batch in tqdm([(c, n, b) for n, b in sizes for c in arguments.cells]):
        rows.append(measure(cell, hidden, batch, peak, arguments.repetitions, arguments.longest, device))
        tqdm.write(describe(rows[-1]))
    if arguments.only:
        results = read(name, device)
        new = {(row["cell"], row["n"], row["batch"]): row for row in rows}
        results["rows"] = [new.get((row["cell"], row["n"], row["batch"]), row) for row in results["rows"]]
        print(f"written to {write(name, device, results)}")
        return
    updates = [influence_update(n, 8, arguments.repetitions, device) for n in (64, 128)]
    for update in updates:
        tqdm.write(
            f"n={update['n']} B={update['batch']}: P <- J P + M at {update['update_share_of_sgemm']:.0%} of the sgemm "
            f"peak, J P alone at {update['product_share_of_sgemm']:.0%}"
        )
    path = write(name, device, {"sgemm_gflops": peak / 1e9, "rows": rows, "influence_update": updates})
    print(f"sgemm peak {peak / 1e9:.0f} GFLOP/s; written to {path}")


def describe(row: dict[str, Any]) -> str:
    parts = [f"{row['cell']:4s} n={row['n']:<3d} B={row['batch']:<2d}"]
    for label, entry in row.items():
        if isinstance(entry, dict):
            text = f"{label} {entry['us_per_token']:.0f} us"
            if "over_bptt" in entry:
                text += f" ({entry['over_bptt']:.2f}x BPTT)"
            if "over_rtrl" in entry:
                text += f" ({entry['over_rtrl']:.1f}x RTRL({row['n']}))"
            parts.append(text)
        elif isinstance(entry, str) and label != "cell":
            parts.append(f"{label} {entry.split(':')[0]}")
    return " | ".join(parts)


if __name__ == "__main__":
    main()
