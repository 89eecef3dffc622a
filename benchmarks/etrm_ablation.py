"""Does an encoder learn rules it can apply to puzzles of rules it never saw? And what starves it?

    OMP_NUM_THREADS=1 python -m benchmarks.etrm_ablation                     # everything, two runs at a time
    python -m benchmarks.etrm_ablation --only colors --seeds 0 1 2 3 4     # these rows anew, the others stay

*colors*: the shipped configuration (re_encode), the same number of optimizer steps in the other modes, and a puzzle
embedding instead of the encoder, which knows nothing of a held-out rule. Every run is also evaluated with the
demonstrations of another rule. *flips*, *sudoku*, *maze* and *arc*: the other configurations; all but 4 x 4 sudoku
take a GPU if there is one. Accuracies are exact: every cell of a puzzle. Seeds are of weights and of training data; the
rules that are held out are the same for all. The clock runs from the start of the process.
"""

from __future__ import annotations

import tempfile
from typing import Any

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.command import ROOT, run, train_all
from benchmarks.common import RESULTS, machine

AUGMENTED = [  # all tasks of such a size, eight votes per test input
    *("--data.groups", "null", "--data.colors", "true", "--data.dihedral", "true", "--data.translate", "true"),
    *("--data.votes", "8", "--data.batch_size", "128", "--data.batches_per_epoch", "1000"),
    *("--trainer.max_steps", "2000", "--model.lr_scheduler.total_steps", "2000"),
]
JOBS: dict[str, tuple[str, list[str]]] = {
    "colors re_encode": ("etrm_color_rules", []),
    "colors fixed_time": ("etrm_color_rules", ["--model.mode", "fixed_time"]),
    "colors cached": ("etrm_color_rules", ["--model.mode", "cached"]),
    "colors puzzle embedding": ("etrm_color_rules", ["--model.encoder", "PuzzleEmbedding"]),
    "flips": ("etrm_flips", []),
    "sudoku": ("trm_sudoku", []),
    "9 x 9 sudoku": ("trm_sudoku9", []),
    "maze": ("trm_maze", []),
    "arc": ("etrm_arc", []),
    "arc, augmented": ("etrm_arc", AUGMENTED),
}
# A colour and a width for each: the widest lie beneath, so that lines on top of one another are seen.
LOOKS = {
    "colors re_encode": ("tab:blue", 6.0),
    "colors fixed_time": ("tab:green", 3.0),
    "colors cached": ("tab:red", 1.5),
    "colors puzzle embedding": ("tab:orange", 6.0),
    "flips": ("tab:purple", 4.5),
    "sudoku": ("tab:blue", 2.0),
    "9 x 9 sudoku": ("tab:cyan", 3.0),
    "maze": ("tab:green", 2.0),
    "arc": ("tab:red", 1.5),
}
TAGS = {  # of the log: a short name
    "val/held_out/exact_accuracy": "held_out",
    "val/held_out/exact_accuracy_max_steps": "held_out_max_steps",
    "val/held_out/exact_accuracy_best_q": "held_out_best_q",
    "val/held_out/steps": "steps",
    "val/train_rules/exact_accuracy": "train_rules",
    "val/shuffled_demos/exact_accuracy": "shuffled_demos",
    "val/held_out/pass@2": "held_out_pass@2",
    "val/held_out/tasks": "held_out_tasks",
    "train/gradient_coverage": "gradient_coverage",
}


def fit(name: str, seed: int) -> dict[str, Any]:
    """Train one run, and read its curves."""
    config, options = JOBS[name]
    seeds = ["--seed_everything", str(seed), "--data.seed", str(seed)]
    with tempfile.TemporaryDirectory() as folder:
        done = run("fit", config, [*seeds, *options], folder)
    curves = {
        short: [(step + 1, round(value, 4), round(seconds, 1)) for step, value, seconds in done.figures[tag]]
        for tag, short in TAGS.items()
        if tag in done.figures
    }
    return {
        "run": name,
        "seed": seed,
        "seconds": round(done.seconds, 1),
        "processor": processor(config),
        "curves": curves,
    }


def processor(config: str) -> str:
    """What a configuration is trained on here."""
    on_cpu = "accelerator: cpu" in (ROOT / "configs" / f"{config}.yaml").read_text() or not torch.cuda.is_available()
    return machine(torch.device("cpu"))["processor"] if on_cpu else torch.cuda.get_device_name()


def last(row: dict[str, Any], figure: str) -> float | None:
    return row["curves"][figure][-1][1] if figure in row["curves"] else None


def table(rows: list[dict[str, Any]]) -> str:
    figures = ["held_out", "held_out_max_steps", "held_out_best_q", "shuffled_demos", "train_rules"]
    lines = [
        "| run | seed | held out: q-halt | max steps | best q | shuffled demonstrations | rules of training | half of "
        "those held out first at step | steps of thinking | gradient coverage | optimizer steps | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        values = [last(row, figure) for figure in figures]
        cells = ["" if value is None else f"{value:.1%}" for value in values]
        coverage = [value for _, value, _ in row["curves"]["gradient_coverage"]]
        if "held_out_pass@2" in row["curves"]:
            solved, tasks = last(row, "held_out_pass@2"), last(row, "held_out_tasks")
            cells[0] += f" (pass@2: {solved:.1%} of {tasks:.0f} tasks)"
        half = next((f"{step:,}" for step, value, _ in row["curves"]["held_out"] if value >= 0.5), "")
        lines.append(
            f"| {row['run']} | {row['seed']} | {' | '.join(cells)} | {half} | {last(row, 'steps'):.1f} | "
            f"{sum(coverage) / len(coverage):.2f} | {row['curves']['held_out'][-1][0]:,} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def curves(axes: Axes, rows: list[dict[str, Any]], figure: str, style: str = "-", label: str | None = None) -> None:
    """Of each run a thin line per seed, and a thick one, which has the label: the mean of the seeds 0 to 2."""
    for kind in dict.fromkeys(row["run"] for row in rows):
        colour, width = LOOKS[kind]
        width = 2.0 if kind == "colors re_encode" and style == ":" else width
        found = {row["seed"]: list(zip(*row["curves"][figure], strict=True)) for row in rows if row["run"] == kind}
        for steps, values, _ in found.values():
            axes.plot(steps, values, style, color=colour, linewidth=0.6, alpha=0.5)
        means = [sum(values) / len(values) for values in zip(*(found[s][1] for s in found if s < 3), strict=True)]
        name = kind.removeprefix("colors ") if label is None else label
        axes.plot(found[0][0], means, style, color=colour, label=name, linewidth=width, zorder=2 - width / 10)


def draw(rows: list[dict[str, Any]]) -> None:
    """benchmarks/results/etrm_ablation.png."""
    figure, panels = plt.subplots(1, 3, figsize=(14, 4.8), layout="constrained")
    (held_out, coverage, others), of = panels, {name: [r for r in rows if r["run"] == name] for name in LOOKS}
    colors = [row for row in rows if row["run"].startswith("colors")]
    curves(held_out, colors, "held_out")
    curves(held_out, of["colors re_encode"], "shuffled_demos", ":", "re_encode, demonstrations of another rule")
    held_out.set(title="Colour rules never trained", ylabel="exact accuracy (q-halt)")
    curves(coverage, [row for row in colors if "embedding" not in row["run"]], "gradient_coverage")
    coverage.set(title="Lanes whose loss reaches the encoder", ylabel="gradient coverage")
    for name in ("sudoku", "9 x 9 sudoku", "maze"):
        curves(others, of[name], "held_out", label=f"{name}, held out")
    for name, what in (("flips", "rules"), ("arc", "tasks")):
        curves(others, of[name], "train_rules", "--", f"{name}, {what} of training")
        curves(others, of[name], "held_out", ":", f"{name}, held out")
    others.set(title="Other puzzles", ylabel="exact accuracy (q-halt)")
    for axes in panels:
        axes.set(xlabel="optimizer steps", ylim=(-0.03, 1.03))
        axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
        axes.grid(alpha=0.25)
    figure.savefig(RESULTS / "etrm_ablation.png", dpi=110)
    plt.close(figure)


def main() -> None:
    def shown(row: dict[str, Any]) -> str:
        return ", ".join(f"{name} {points[-1][1]:.3f}" for name, points in row["curves"].items())

    train_all(__doc__ or "", "etrm_ablation", JOBS, fit, shown)


if __name__ == "__main__":
    main()
