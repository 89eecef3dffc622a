"""The table and the picture of haystack_learning and truncation_bias."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.common import RESULTS
from benchmarks.haystack_learning import TESTED

CHANCE = 0.25
EXACT, WHOLE = "tab:blue", "tab:green"
# Colours and widths of what stays at chance, where lines lie on top of one another: the widest are drawn first.
AT_CHANCE = {
    "TBPTT(16)": ("#fdc9b4", 10.0),
    "TBPTT(4)": ("#fdc9b4", 10.0),
    "TBPTT(32)": ("#fb6a4a", 6.5),
    "TBPTT(64)": ("#a50f15", 3.8),
    "influence held at zero": ("#ffd92f", 1.8),
}

Rows = Sequence[dict[str, Any]]


def table(rows: Rows) -> str:
    lines = [
        "| run | seed | length reached | best validation there | minutes to it | "
        f"{' | '.join(f'{n:,}' for n in TESTED)} | experts in use (entropy) |",
        "|---|---|---|---|---|" + "---|" * len(TESTED) + "---|",
    ]
    for row in rows:
        length = row["curve"][-1]["length"]
        there = [point for point in row["curve"] if point["length"] == length]
        best = max(point["accuracy"] for point in there)
        first = next(point for point in there if point["accuracy"] >= min(best, 0.99))
        tested = [f"{row['test'][str(n)]['accuracy']:.1%}" if str(n) in row["test"] else "" for n in TESTED]
        entropy = f"{row['expert_entropy']:.2f}" if "expert_entropy" in row else ""
        lines.append(
            f"| {row['run']} | {row['seed']} | {length:,} | {best:.1%} | {first['seconds'] / 60:.1f} | "
            f"{' | '.join(tested)} | {entropy} |"
        )
    tests = [(int(length), test["samples"]) for row in rows for length, test in row["test"].items()]
    samples = ", ".join(f"{min(n for at, n in tests if at == length):,} at {length:,}" for length in TESTED)
    lines += [
        "",
        f"Sequences in the tests behind training, at least: {samples}. Chance is 25 %. A validation is of 512 "
        "sequences (gap and uniform: 4,096), and the best of many is above what a test finds. Seeds are of the "
        "weights: all are trained and tested on the same sequences, and tests of all lengths ask for the same values.",
    ]
    return "\n".join(lines)


def look(run: str) -> dict[str, Any]:
    """Colour, width and place of a run's line."""
    for name, (colour, width) in AT_CHANCE.items():
        if name in run:
            return {"color": colour, "linewidth": width, "zorder": 2 - width / 10}
    return {"color": WHOLE if "BPTT" in run else EXACT, "linewidth": 1.5, "zorder": 2}


def chance(axes: Axes) -> None:
    axes.axhline(CHANCE, color="black", linestyle="--", linewidth=0.8, zorder=3, label="chance")


def draw(rows: Rows, bias: Rows) -> None:
    """benchmarks/results/haystack_learning.png."""
    figure, ((lengths, gap, moe), (cosine, long, uniform)) = plt.subplots(2, 3, figsize=(15, 8), layout="constrained")
    _lengths(lengths, [row for row in rows if row["run"].startswith("curriculum")], "GRU of 16, windows of 16 steps")
    _lengths(moe, [row for row in rows if row["run"].startswith("moe")], "Mixture of experts, windows of 4 steps")
    _accuracy(gap, [row for row in rows if row["run"].startswith("gap")])
    _uniform(uniform, [row for row in rows if row["run"].startswith("uniform")])
    _bias(cosine, bias)
    _long(long, [row for row in rows if "16384" in row["test"]])
    figure.savefig(RESULTS / "haystack_learning.png", dpi=110)


def _lengths(axes: Axes, rows: Rows, title: str) -> None:
    """Accuracy at the length that is being trained, in units of the stage: n + accuracy."""
    stages = sorted({point["length"] for row in rows for point in row["curve"]})
    for row in rows:
        done = [stages.index(point["length"]) + point["accuracy"] for point in row["curve"]]
        first = row["seed"] == 0
        label = row["run"].split(" ", 1)[1] if first and "to 512" not in row["run"] else None
        style = ":" if "every window" in row["run"] else "-"
        minutes = [point["seconds"] / 60 for point in row["curve"]]
        axes.plot(minutes, done, style, label=label, **look(row["run"]))
    chance(axes)
    axes.set_yticks([i + 1 for i in range(len(stages))], [f"{n:,}" for n in stages])
    axes.set(xlabel="minutes", ylabel="length learned (steps)", ylim=(0, None), title=title)
    axes.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 0.12))


def _accuracy(axes: Axes, rows: Rows) -> None:
    for row in rows:
        name = row["run"].split(" ", 1)[1]
        steps, values = zip(*((point["step"], point["accuracy"]) for point in row["curve"]), strict=True)
        label = name if row["seed"] == 0 else None
        axes.plot(steps, values, label=label, **look(name))
    chance(axes)
    axes.set(xlabel="optimizer steps", ylabel="accuracy", ylim=(0, 1.03), title="192 steps, gaps from 129")
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.6, 0.9))


def _uniform(axes: Axes, rows: Rows) -> None:
    if not rows:  # not run yet
        axes.axis("off")
        return
    for length, at, marker in (
        ("64 (trained)", lambda row: row["curve"][-1]["accuracy"], "o"),
        ("2,048", lambda row: row["test"]["2048"]["accuracy"], "s"),
    ):
        points = [(int(row["run"].split("(")[1].rstrip(")")), at(row)) for row in rows if "TBPTT" in row["run"]]
        exact = [at(row) for row in rows if "TBPTT" not in row["run"]]
        (line,) = axes.plot(*zip(*_means(points), strict=True), marker=marker, label=f"TBPTT(k), at {length}")
        axes.plot(*zip(*points, strict=True), marker, color=line.get_color(), alpha=0.35)
        axes.axhline(mean(exact), color=line.get_color(), linewidth=7, alpha=0.25, label=f"RTRL(16), at {length}")
    chance(axes)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
    axes.set(xlabel="window k", ylabel="accuracy", ylim=(0, 1.03), title="Trained on 64 steps, gaps from 2 to 61")
    axes.legend(frameon=False, fontsize=8, loc="center", bbox_to_anchor=(0.5, 0.72))


def _means(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    return [(k, mean(value for other, value in points if other == k)) for k in sorted({k for k, _ in points})]


def _bias(axes: Axes, rows: Rows) -> None:
    for of, style in (("initial", "--"), ("trained", "-")):
        for min_gap, hue in ((2, "tab:purple"), (33, "tab:brown")):
            points = [(r["window"], r["cosine"]) for r in rows if (r["of"], r["min_gap"]) == (of, min_gap)]
            axes.plot(
                *zip(*_means(points), strict=True), style, color=hue, marker="o", label=f"{of}, gaps from {min_gap}"
            )
    axes.axhline(0, color="grey", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
    axes.set(xlabel="window k", ylabel="cosine with the exact gradient", title="TBPTT(k)'s gradient over 64 steps")
    axes.legend(frameon=False, fontsize=8, handlelength=4)


def _long(axes: Axes, rows: Rows) -> None:
    for row in rows:
        style, name = ("s--", "mixture of experts") if row["run"].startswith("moe") else ("o-", "GRU")
        points = sorted((int(length), found["accuracy"]) for length, found in row["test"].items())
        label = f"{name}, trained to {row['curve'][-1]['length']:,}" if row["seed"] == 0 else None
        axes.plot(*zip(*points, strict=True), style, color="tab:cyan" if "moe" in row["run"] else EXACT, label=label)
    chance(axes)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(TESTED), [f"{n:,}" for n in TESTED], rotation=25)
    axes.set(xlabel="length (steps)", ylabel="accuracy", ylim=(0, 1.03), title="Asked for after longer streams")
    axes.legend(frameon=False, fontsize=8)
