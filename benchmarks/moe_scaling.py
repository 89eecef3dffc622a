"""Time and memory of RTRL for RecurrentMoE, against the number of experts and of slots.

    OMP_NUM_THREADS=1 python -m benchmarks.moe_scaling            # everything, one thread
    python -m benchmarks.moe_scaling --only slots --quick
    python -m benchmarks.moe_scaling --device cuda

Every repetition goes on with new inputs. *one*: d = 32, 4 slots, 4 experts. *experts*: blocks of 512 tokens with one
gradient each, flush and contraction included, and a ring of 4, so that what is idle for longer must catch up; routers
were balanced first, and the number of distinct experts used in a block is given. *slots*: at a window
of one step, and at long windows (16 steps for dense RTRL, whose derivatives take more room; 256 for the others). The
naive method, step by step, is measured at two steps, where it is affordable.
Times are minima of interleaved repetitions; ratios are medians of the ratios of neighbours in time.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.common import RESULTS, interleaved, ratio, write
from benchmarks.naive import NaiveRTRL
from rtrl_moe_pl.cells import RecurrentMoE, Routing
from rtrl_moe_pl.gradients import BPTT, RTRL, BlockRTRL, GradientAlgorithm, LazyExpertRTRL, Memory

INPUTS, OUTPUTS, BLOCK, BLOCKS = 8, 4, 512, 10


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return ((outputs - targets) ** 2).sum()


class Point:
    """One cell and batch, with a stream of random inputs."""

    def __init__(self, device: torch.device, batch: int, slot_size: int, num_slots: int, num_experts: int) -> None:
        torch.manual_seed(0)
        self.batch = batch
        self.cell = RecurrentMoE(INPUTS, slot_size, num_slots, num_experts, balance_rate=0.05).to(device)
        self.readout = nn.Linear(self.cell.state_size, OUTPUTS).to(device)
        self.inputs = torch.randn(batch, BLOCKS * BLOCK, INPUTS, device=device)
        self.targets = torch.randn(batch, BLOCKS * BLOCK, OUTPUTS, device=device)
        self.memories: dict[str, Memory] = {}

    @torch.no_grad()
    def use(self, steps: int) -> Routing:
        """How often each slot and expert is chosen in some steps."""
        state, chosen = self.cell.initial_state(self.batch), []
        for x in self.inputs[:, :steps].unbind(1):
            state, routing = self.cell.advance(x, state)
            chosen.append(routing)
        memory = Memory(state, None)  # type: ignore[arg-type]  # for its counts alone
        memory.count(chosen, self.cell)
        assert memory.used is not None
        return memory.used

    def spread(self) -> int:
        """Balance the routers, and return the number of experts used in a block (of all lanes)."""
        for _ in range(60):
            self.cell.balance(self.use(64))
        return int((self.use(BLOCK).experts > 0).sum())

    def run(self, name: str, algorithm: GradientAlgorithm, steps: int) -> Callable[[], object]:
        memory = self.memories[name] = algorithm.init(self.cell, self.batch, self.inputs.device)
        memory.fresh = False
        parts = cycle(zip(self.inputs.split(steps, 1), self.targets.split(steps, 1), strict=True))
        return lambda: algorithm.run(self.cell, self.readout, *next(parts), squared_error, memory)

    def naive(self, steps: int) -> Callable[[], object]:
        method = NaiveRTRL(self.cell, self.readout, self.batch)
        return lambda: method.step(self.inputs[:, :steps], self.targets[:, :steps], squared_error)

    def measure(self, runs: dict[str, tuple[Callable[[], object], int]], repetitions: int) -> dict[str, Any]:
        """Microseconds a token and megabytes of influence, of runs and their number of steps."""
        device = self.inputs.device
        times = interleaved([run for run, _ in runs.values()], repetitions, device)
        rows: dict[str, Any] = {}
        for (name, (_, steps)), taken in zip(runs.items(), times, strict=True):
            rows[name] = {"us_per_token": min(taken) / steps * 1e6, "median": statistics.median(taken) / steps * 1e6}
            if name in self.memories:
                rows[name]["influence_mb"] = self.memories[name].base.nbytes / 1e6
            if "BPTT" in runs:
                first = times[list(runs).index("BPTT")]
                rows[name]["over_bptt"] = ratio([t / steps for t in taken], [t / runs["BPTT"][1] for t in first])
        return rows


def one(device: torch.device, repetitions: int) -> list[dict[str, Any]]:
    rows = []
    for batch in (1, 8):
        point = Point(device, batch, 32, 4, 4)
        runs = {
            "BPTT": (point.run("BPTT", BPTT(), 256), 256),
            "RTRL": (point.run("RTRL", RTRL(window=64), 256), 256),
            "BlockRTRL": (point.run("BlockRTRL", BlockRTRL(window=256), 256), 256),
            "LazyExpertRTRL": (point.run("LazyExpertRTRL", LazyExpertRTRL(window=256), 256), 256),
            "naive": (point.naive(2), 2),
        }
        rows.append({"batch": batch, **point.measure(runs, repetitions)})
    return rows


def experts(device: torch.device, repetitions: int) -> list[dict[str, Any]]:
    rows = []
    for batch in (1, 8):
        for count in tqdm((8, 32, 128, 512), desc=f"experts, B={batch}"):
            point = Point(device, batch, 32, 4, count)
            used = point.spread()
            block: dict[str, Any] = {"window": BLOCK, "chunk": BLOCK}
            lazy = {**block, "ring": 4}
            runs = {
                "BPTT": (point.run("BPTT", BPTT(), BLOCK), BLOCK),
                "LazyExpertRTRL": (point.run("LazyExpertRTRL", LazyExpertRTRL(**lazy), BLOCK), BLOCK),
            }
            for kind in ("tree", "block"):
                name = f"LazyExpertRTRL, {kind}"
                runs[name] = point.run(name, LazyExpertRTRL(**lazy, catch_up=kind), BLOCK), BLOCK
            if batch == 1:
                runs["BlockRTRL"] = point.run("BlockRTRL", BlockRTRL(**block), BLOCK), BLOCK
                runs["RTRL"] = point.run("RTRL", RTRL(window=64), 128), 128
            if batch == 1 and count <= 32:
                runs["naive"] = point.naive(2), 2
            rows.append({"batch": batch, "experts": count, "used": used, **point.measure(runs, repetitions)})
    return rows


def slots(device: torch.device, repetitions: int) -> list[dict[str, Any]]:
    rows = []
    for count in tqdm((4, 8, 16, 32, 64), desc="slots"):
        point = Point(device, 1, 32, count, 4)
        whole: dict[str, Any] = {"window": 256, "chunk": 256}  # P is advanced in every repetition
        runs = {
            "BPTT": (point.run("BPTT", BPTT(), 64), 64),
            "RTRL, window 1": (point.run("RTRL, window 1", RTRL(1, chunk=1), 2), 2),
            "BlockRTRL, window 1": (point.run("BlockRTRL, window 1", BlockRTRL(1, chunk=1), 16), 16),
            "RTRL, best": (point.run("RTRL, best", RTRL(16, chunk=16), 16), 16),
            "BlockRTRL, best": (point.run("BlockRTRL, best", BlockRTRL(**whole), 256), 256),
            "LazyExpertRTRL, best": (point.run("LazyExpertRTRL, best", LazyExpertRTRL(**whole), 256), 256),
        }
        if count <= 8:
            runs["naive"] = point.naive(2), 2
        rows.append({"slots": count, **point.measure(runs, repetitions)})
    return rows


def draw(results: dict[str, Any]) -> None:
    """benchmarks/results/moe_scaling.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    panels = (
        (axes[0], [r for r in results["experts"] if r["batch"] == 1], "experts", "2 experts in use, 1 lane"),
        (axes[1], [r for r in results["experts"] if r["batch"] == 8], "experts", "2 experts in use, 8 lanes"),
        (axes[2], results["slots"], "slots", "slots of 32 numbers, 2 written, 1 lane"),
    )
    colours = {"BPTT": "tab:green", "RTRL": "tab:purple", "BlockRTRL": "tab:orange", "LazyExpertRTRL": "tab:blue"}
    colours["naive"] = "tab:red"
    styles = {"": "o-", "tree": "^:", "block": "s--", "best": "o-", "window 1": "^:"}
    for axis, rows, key, title in panels:
        for name in [name for name in rows[0] if isinstance(rows[0][name], dict)]:
            algorithm, _, form = name.partition(", ")
            there = [r for r in rows if name in r]
            times = [r[name]["us_per_token"] / 1000 for r in there]
            axis.plot([r[key] for r in there], times, styles[form], color=colours[algorithm], label=name)
        axis.set(xscale="log", yscale="log", xlabel=key, title=title, ylabel="ms per token")
        axis.title.set_fontsize(10)
        axis.set_xticks([r[key] for r in rows], [str(r[key]) for r in rows])
        axis.set_xticks([], minor=True)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "25" else "")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=7, loc="best")
    figure.savefig(RESULTS / "moe_scaling.png", dpi=120)


def table(results: dict[str, Any]) -> str:
    """The three parts in Markdown: ms a token, and over BPTT."""
    parts = (("one", "batch", "lanes"), ("experts", "experts", "experts"), ("slots", "slots", "slots"))
    lines = []
    for part, key, label in parts:
        rows = results[part]
        names = list(dict.fromkeys(name for row in rows for name in row if isinstance(row[name], dict)))
        experts = part == "experts"
        head = ["lanes", label, "used in a block"] if experts else [label]
        lines += ["", f"| {' | '.join([*head, *names])} |", "|---" * (len(head) + len(names)) + "|"]
        for row in rows:
            first = [row["batch"], row["experts"], row["used"]] if experts else [row[key]]
            cells = [_cell(row.get(name)) for name in names]
            lines.append(f"| {' | '.join([*map(str, first), *cells])} |")
    return "\n".join(lines[1:])


def _cell(found: dict[str, float] | None) -> str:
    if found is None:
        return ""
    influence = f", {found['influence_mb']:,.1f} MB" if found.get("influence_mb") else ""
    return f"{found['us_per_token'] / 1000:.2f} ({found['over_bptt']:.2f}x{influence})"


PARTS = {"one": one, "experts": experts, "slots": slots}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=sorted(PARTS), default=sorted(PARTS))
    parser.add_argument("--quick", action="store_true", help="two repetitions, and nothing is written")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = {name: PARTS[name](options.device, 2 if options.quick else 7) for name in PARTS if name in options.only}
    for name, rows in results.items():
        for row in rows:
            print(name, {k: v for k, v in row.items() if not isinstance(v, dict)})
            for key, value in row.items():
                if isinstance(value, dict):
                    print(f"  {key:24s}", "  ".join(f"{figure} {number:,.2f}" for figure, number in value.items()))
    if options.quick or len(results) < len(PARTS):
        print("nothing written: the results are those of all parts together, without --quick")
        return
    print(write("moe_scaling", options.device, results))
    draw(results)


if __name__ == "__main__":
    main()
