"""Every gradient algorithm on one small task: what it learns, what it holds, how long it takes, and its gradient.

    OMP_NUM_THREADS=1 python -m benchmarks.side_by_side      # about three minutes on two cores

Delayed recall: one of four values is shown, and asked for after 12 to 16 steps of noise; the label is the value, and
guessing is right one time in four. Windows are 5 steps and P is advanced after each, so that what is learned across
windows was carried by P. A recurrent mixture of experts learns it by every algorithm from the same weights and the same
sequences. TBPTT is the control: its window ends before the gap does, so that it must fail.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from itertools import product
from multiprocessing import get_context
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from benchmarks.common import RESULTS, ended_by_interrupt, interleaved, ratio, without_interrupts, write
from benchmarks.memory import peak_mb
from rtrl_moe_pl.cells import RecurrentMoE
from rtrl_moe_pl.gradients import BPTT, RTRL, TBPTT, BlockRTRL, GradientAlgorithm, LazyExpertRTRL, sequence_gradient
from rtrl_moe_pl.gradients.base import named_parameters
from rtrl_moe_pl.modules import WeightedCrossEntropy
from rtrl_moe_pl.modules.evaluation import evaluate
from rtrl_moe_pl.tasks import DelayedRecall

WINDOW, LANES, EVERY, HELD_OUT, CPU = 5, 16, 10, 1_000_000, torch.device("cpu")
TASK = DelayedRecall(values=4, noise_tokens=12, min_gap=12, max_gap=16)
CHANCE = 1 / TASK.values
LENGTHS = (16, 64, 256, 1024)
ALGORITHMS: dict[str, GradientAlgorithm] = {
    "BPTT": BPTT(),
    "TBPTT": TBPTT(window=WINDOW),
    "RTRL, step by step": RTRL(window=1, chunk=1),
    "RTRL, chunked": RTRL(window=WINDOW, chunk=WINDOW),
    "BlockRTRL": BlockRTRL(window=WINDOW, chunk=WINDOW),
    "LazyExpertRTRL": LazyExpertRTRL(window=WINDOW, chunk=WINDOW),
}
# Colours of Okabe and Ito, which colour-blind people can tell apart, and a marker and a width for each: the widest lie
# beneath, so that lines on top of one another are seen.
LOOKS = {
    "BPTT": ("#000000", "o", 9.0),
    "TBPTT": ("#D55E00", "s", 2.0),
    "RTRL, step by step": ("#0072B2", "D", 6.5),
    "RTRL, chunked": ("#56B4E9", "v", 4.5),
    "BlockRTRL": ("#009E73", "^", 3.0),
    "LazyExpertRTRL": ("#E69F00", "P", 1.2),
}
LOSS = WeightedCrossEntropy()


def model(seed: int, task: DelayedRecall = TASK) -> tuple[RecurrentMoE, nn.Linear]:
    """Cell and readout, the same for every algorithm."""
    torch.manual_seed(seed)
    cell = RecurrentMoE(task.vocabulary_size, slot_size=8, num_slots=4, num_experts=4, max_memory=32)
    return cell, nn.Linear(cell.state_size, task.num_classes)


def sequences(
    seed: int, begin: int, count: int, task: DelayedRecall = TASK, position: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Inputs [N, T, D], and labels and weights [N, T], of the sequences from ``begin`` on."""
    drawn = task.sample(seed, torch.arange(begin, begin + count), position)
    return functional.one_hot(drawn.tokens, task.vocabulary_size).float(), (drawn.labels, drawn.weights)


def learn(name: str, seed: int, updates: int) -> dict[str, Any]:
    """Train by one algorithm; its accuracy on sequences never trained, every ``EVERY`` updates."""
    (cell, readout), algorithm, curve = model(seed), ALGORITHMS[name], []
    parameters, memory = named_parameters(cell, readout), algorithm.init(cell, LANES)
    optimizer = torch.optim.Adam(parameters.values(), 0.01)
    inputs, (labels, weights) = sequences(seed, HELD_OUT, 512)
    begun = time.perf_counter()
    for update in range(updates + 1):
        if update % EVERY == 0:
            right = evaluate(cell, readout, inputs).argmax(-1) == labels
            curve.append((update, float((right * weights).sum() / weights.sum())))
        batch, targets = sequences(seed, update * LANES, LANES)
        memory.reset()
        result = algorithm.run(cell, readout, batch, targets, LOSS, memory)
        memory = result.memory
        for parameter_name, parameter in parameters.items():
            parameter.grad = result.grads[parameter_name] / LANES
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
    return {"algorithm": name, "seed": seed, "curve": curve, "seconds": time.perf_counter() - begun}


def compare(name: str, seed: int) -> dict[str, Any]:
    """An algorithm's gradient of the untrained cell beside BPTT's, in float64; the readout's is the same for all."""
    (cell, readout), (inputs, targets) = model(seed), sequences(seed, 0, LANES)
    found, truth = (
        torch.cat([g.flatten() for n, g in grads.items() if n.startswith("cell.")])
        for algorithm in (ALGORITHMS[name], BPTT())
        for grads in [
            sequence_gradient(algorithm, cell.double(), readout.double(), inputs.double(), targets, LOSS).grads
        ]
    )
    return {
        "algorithm": name,
        "seed": seed,
        "cosine": float(functional.cosine_similarity(found, truth, 0)),
        "relative_error": float((found - truth).norm() / truth.norm()),
    }


def one_gradient(name: str, tokens: int) -> None:
    """Of ``LANES`` sequences of a length, delivered in windows; whole for BPTT."""
    task, algorithm = DelayedRecall(TASK.values, TASK.noise_tokens, tokens - 2, tokens - 2), ALGORITHMS[name]
    (cell, readout), step = model(0, task), algorithm.window or tokens
    memory = algorithm.init(cell, LANES)
    for begin in range(0, tokens, step):
        position = torch.arange(begin, min(begin + step, tokens)).expand(LANES, -1)
        memory = algorithm.run(cell, readout, *sequences(0, 0, LANES, task, position), LOSS, memory).memory


def peaks(name: str) -> list[dict[str, Any]]:
    """Peak memory of this (fresh) process at growing lengths, above that after one of 2 tokens by BPTT."""
    one_gradient("BPTT", 2)
    before, rows = peak_mb(CPU), []
    for tokens in LENGTHS:
        one_gradient(name, tokens)
        rows.append({"algorithm": name, "tokens": tokens, "peak_mb": peak_mb(CPU) - before})
    return rows


def times(repetitions: int) -> dict[str, Any]:
    """Milliseconds a token of all lanes (the least), and over BPTT; taken in turn, over 64 tokens."""
    runs: list[Callable[[], object]] = [lambda name=name: one_gradient(name, 64) for name in ALGORITHMS]
    taken = dict(zip(ALGORITHMS, interleaved(runs, repetitions, CPU), strict=True))
    return {n: {"ms": 1e3 * min(t) / 64, "over_bptt": ratio(t, taken["BPTT"])} for n, t in taken.items()}


def measure(seeds: list[int], updates: int) -> dict[str, Any]:
    """Everything; two processes train and take memory, one alone takes times."""
    longest_first = sorted(ALGORITHMS, key=lambda name: ALGORITHMS[name].window != 1)
    spawned = ProcessPoolExecutor(2, get_context("spawn"), max_tasks_per_child=1)
    with spawned as pool, ended_by_interrupt(pool):
        with without_interrupts():
            jobs: dict[Future[Any], str] = {
                pool.submit(learn, name, seed, updates): "learning" for name, seed in product(longest_first, seeds)
            }
            jobs |= {pool.submit(peaks, name): "memory" for name in longest_first}
        found: dict[str, Any] = {"learning": [], "memory": []}
        for job in tqdm(as_completed(jobs), "training and memory", len(jobs)):
            done = job.result()
            found[jobs[job]] += done if isinstance(done, list) else [done]
    order = list(ALGORITHMS)
    found["learning"].sort(key=lambda row: (order.index(row["algorithm"]), row["seed"]))
    found["memory"].sort(key=lambda row: (order.index(row["algorithm"]), row["tokens"]))
    found["gradient"] = [compare(name, seed) for name, seed in tqdm(list(product(order, seeds)), "gradients")]
    found["time"] = times(repetitions=5)
    return found


def of(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["algorithm"] == name]


def table(found: dict[str, Any]) -> str:
    """The figures in Markdown."""
    lines = [
        "| | accuracy, by seed | 99 % first seen at update | cosine to BPTT | relative error | ms a token | over BPTT "
        f"| peak MB at {LENGTHS[0]} tokens | at {LENGTHS[-1]:,} |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in ALGORITHMS:
        curves = [row["curve"] for row in of(name, found["learning"])]
        learned = [next((str(update) for update, value in curve if value >= 0.99), "never") for curve in curves]
        cosines = ", ".join(f"{row['cosine']:.2f}" for row in of(name, found["gradient"]))
        gradients, memory = of(name, found["gradient"]), of(name, found["memory"])
        lines.append(
            f"| {name} | {', '.join(f'{curve[-1][1]:.0%}' for curve in curves)} | {', '.join(learned)} | "
            f"{cosines} | {max(row['relative_error'] for row in gradients):.0e} | "
            f"{found['time'][name]['ms']:.1f} | {found['time'][name]['over_bptt']:.1f}x | "
            f"{memory[0]['peak_mb']:.1f} | {memory[-1]['peak_mb']:.1f} |"
        )
    return "\n".join(lines)


def draw(found: dict[str, Any]) -> None:
    """benchmarks/results/side_by_side.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False}):
        figure, ((curves, memory), (seconds, cosines)) = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
        for name, (colour, marker, width) in LOOKS.items():
            runs = [row["curve"] for row in of(name, found["learning"])]
            updates, values = [u for u, _ in runs[0]], list(zip(*([v for _, v in run] for run in runs), strict=True))
            look = {"color": colour, "marker": marker}
            curves.plot(updates, [mean(v) for v in values], linewidth=width, label=name, **look)
            curves.fill_between(updates, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.06)
            rows = of(name, found["memory"])
            memory.plot([row["tokens"] for row in rows], [row["peak_mb"] for row in rows], linewidth=2, **look)
        curves.axhline(CHANCE, color="0.4", linestyle="--")
        curves.annotate("chance", (1, CHANCE - 0.07), color="0.3", ha="right", xycoords=("axes fraction", "data"))
        curves.set(title="What is learned (band: all seeds)", xlabel="updates", ylabel="accuracy", ylim=(0, 1.04))
        memory.set(title="Memory of one gradient (MB)", xlabel="tokens in the sequence", xscale="log", yscale="log")
        memory.set_xticks(LENGTHS, [f"{n:,}" for n in LENGTHS])
        memory.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        memory.minorticks_off()
        names, colours = list(ALGORITHMS)[::-1], [colour for colour, _, _ in LOOKS.values()][::-1]
        milliseconds = [found["time"][name]["ms"] for name in names]
        bars = seconds.barh(names, milliseconds, color=colours)
        ratios = [f" {found['time'][name]['over_bptt']:.1f} x BPTT" for name in names]
        seconds.bar_label(bars, ["" if name == "BPTT" else text for name, text in zip(names, ratios, strict=True)])
        seconds.set(title=f"Time per token of {LANES} lanes (ms)", xlim=(0, 1.45 * max(milliseconds)))
        for name, colour in zip(names, colours, strict=True):
            rows = of(name, found["gradient"])
            values, error = [row["cosine"] for row in rows], max(row["relative_error"] for row in rows)
            cosines.plot(values, [name] * len(values), "o", color=colour, markersize=12, alpha=0.8)
            text = f"exact (to {error:.0e})" if error < 1e-9 else ", ".join(f"{value:.2f}" for value in values)
            cosines.annotate("the reference" if name == "BPTT" else text, (1.1, name), va="center")
        lowest = min(row["cosine"] for row in found["gradient"])
        cosines.set(title="Cosine of the cell's gradient to BPTT's", xlim=(min(0, lowest) - 0.1, 1.75))
        cosines.set_xticks((0, 0.5, 1))
        cosines.axvline(1, color="0.7", linewidth=1, zorder=0)
        handles, labels = curves.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
        figure.savefig(RESULTS / "side_by_side.png", dpi=110)


@ended_by_interrupt()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, default=80)
    options = parser.parse_args()
    found = measure(options.seeds, options.updates)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    found["cpu_minutes"] = sum(u.ru_utime + u.ru_stime for u in used) / 60  # other work on the machine does not count
    print(table(found))
    draw(found)
    print(f"{found['cpu_minutes']:.1f} CPU minutes; {write('side_by_side', CPU, found)} and the picture beside it")


if __name__ == "__main__":
    main()
