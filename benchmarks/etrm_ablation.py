"""Does an encoder learn rules it can apply to puzzles of rules it never saw? And what starves it? Three seeds each.

    OMP_NUM_THREADS=1 python -m benchmarks.etrm_ablation                     # everything, two runs at a time
    python -m benchmarks.etrm_ablation --only colors --seeds 0 1 2 3 4     # these rows anew, the others stay

*colors*: the shipped configuration (re_encode), the same number of optimizer steps in the other modes, and a puzzle
embedding instead of the encoder, which knows nothing of a held-out rule. Every run is also evaluated with the
demonstrations of another rule. *flips*, *sudoku*, *maze* and *arc*: the other configurations; 9 x 9 sudoku and arc
take a GPU if there is one. Accuracies are exact: every cell of a puzzle. Seeds are of weights and of training data; the
rules that are held out are the same for all. The clock runs from the start of the process.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch

from benchmarks.command import ROOT, run, train_all
from benchmarks.common import machine

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
        "| run | seed | held out: q-halt | max steps | best q | shuffled demonstrations | rules of training | steps "
        "of thinking | gradient coverage | optimizer steps | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        values = [last(row, figure) for figure in figures]
        cells = ["" if value is None else f"{value:.1%}" for value in values]
        coverage = [value for _, value, _ in row["curves"]["gradient_coverage"]]
        if "held_out_pass@2" in row["curves"]:
            solved, tasks = last(row, "held_out_pass@2"), last(row, "held_out_tasks")
            cells[0] += f" (pass@2: {solved:.1%} of {tasks:.0f} tasks)"
        lines.append(
            f"| {row['run']} | {row['seed']} | {' | '.join(cells)} | {last(row, 'steps'):.1f} | "
            f"{sum(coverage) / len(coverage):.2f} | {row['curves']['held_out'][-1][0]:,} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    def shown(row: dict[str, Any]) -> str:
        return ", ".join(f"{name} {points[-1][1]:.3f}" for name, points in row["curves"].items())

    train_all(__doc__ or "", "etrm_ablation", JOBS, fit, shown)


if __name__ == "__main__":
    main()
