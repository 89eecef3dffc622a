"""The picture of etrm_ablation."""

from __future__ import annotations

from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.common import RESULTS

COLOURS = {
    "colors re_encode": "tab:blue",
    "colors fixed_time": "tab:green",
    "colors cached": "tab:red",
    "colors puzzle embedding": "tab:orange",
    "sudoku": "tab:blue",
    "9 x 9 sudoku": "tab:cyan",
    "maze": "tab:green",
    "flips": "tab:purple",
    "arc": "tab:red",
}
Rows = list[dict[str, Any]]


def curves(axes: Axes, rows: Rows, figure: str, style: str = "-", label: str | None = None) -> None:
    """One line per row, labelled once per run."""
    labelled = set()
    for row in rows:
        if figure in row["curves"]:
            name = row["run"].removeprefix("colors ") if label is None else label
            steps, values, _ = zip(*row["curves"][figure], strict=True)
            text = None if name in labelled else name
            axes.plot(steps, values, style, color=COLOURS[row["run"]], label=text, linewidth=1.3)
            labelled.add(name)


def draw(rows: Rows) -> None:
    """benchmarks/results/etrm_ablation.png."""
    figure, (held_out, coverage, others) = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    colors = [row for row in rows if row["run"].startswith("colors")]
    shipped = [row for row in colors if row["run"] == "colors re_encode"]
    curves(held_out, colors, "held_out")
    curves(held_out, shipped, "shuffled_demos", ":", "re_encode, demonstrations of another rule")
    held_out.set_title("Colour rules never trained: puzzles solved", fontsize=10)
    held_out.set(xlabel="optimizer steps", ylabel="exact accuracy (q-halt)", ylim=(-0.03, 1.03))
    curves(coverage, [row for row in colors if "embedding" not in row["run"]], "gradient_coverage")
    coverage.set_title("Lanes whose loss reaches the encoder", fontsize=10)
    coverage.set(xlabel="optimizer steps", ylabel="gradient coverage", ylim=(-0.03, 1.03))
    tasks = [row for row in rows if not row["run"].startswith("colors")]
    curves(others, [row for row in tasks if row["run"] not in ("arc", "flips")], "held_out")
    curves(others, [row for row in tasks if row["run"] in ("arc", "flips")], "train_rules", "--")
    others.set_title("Other puzzles (dashed: rules or tasks of training)", fontsize=10)
    others.set(xlabel="optimizer steps", ylabel="exact accuracy (q-halt)", ylim=(-0.03, 1.03))
    for axes in (held_out, coverage, others):
        axes.legend(frameon=False, fontsize=8)
        axes.grid(alpha=0.25)
    figure.savefig(RESULTS / "etrm_ablation.png", dpi=110)
    plt.close(figure)
