"""Draw the pictures and write the tables of benchmarks/README.md from the committed results.

python -m benchmarks.report
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks import etrm_ablation, haystack_report, memory, moe_scaling, reasoning_step, side_by_side
from benchmarks.common import RESULTS

PAGE = Path(__file__).parent / "README.md"
COLOURS = {
    "recall RTRL": "tab:blue",
    "recall BPTT": "tab:green",
    "recall TBPTT": "tab:red",
    "recall RTRL, influence held at zero": "tab:orange",
}


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def cell(value: Any, key: str | None = None) -> str:
    """One entry of a step-time row."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value.split(":")[0]
    if key is None:
        return f"{value['us_per_token']:,.0f}"
    return f"{value['us_per_token']:,.0f} ({value[key]:.2f}x)" if key in value else f"{value['us_per_token']:,.0f}"


def step_table(results: dict[str, Any]) -> str:
    lines = [
        "| cell | n | B | BPTT | RTRL(1) | RTRL(8) | RTRL(n/2) | RTRL(n) | share of peak | naive | naive / RTRL(n) |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        n = row["n"]
        whole, naive = row.get(f"RTRL({n})"), row.get("naive")
        share = f"{whole['share_of_peak']:.0%}" if isinstance(whole, dict) else ""
        over = f"{naive['over_rtrl']:.0f}x" if isinstance(naive, dict) and "over_rtrl" in naive else ""
        lines.append(
            f"| {row['cell']} | {n} | {row['batch']} | {cell(row['BPTT'])} | "
            f"{cell(row.get('RTRL(1)'), 'over_bptt')} | {cell(row.get('RTRL(8)'), 'over_bptt')} | "
            f"{cell(row.get(f'RTRL({n // 2})'), 'over_bptt')} | {cell(whole, 'over_bptt')} | {share} | "
            f"{cell(naive)} | {over} |"
        )
    lines.append("")
    for update in results["influence_update"]:
        lines.append(
            f"Influence update at n = {update['n']}, B = {update['batch']}: P <- J P + M at "
            f"{update['update_share_of_sgemm']:.0%} of the sgemm peak, J P alone at "
            f"{update['product_share_of_sgemm']:.0%}."
        )
    return "\n".join(lines)


def learning_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| run | seed | accuracy | at 2x | at 4x | 99.5 % first seen at | steps | seconds | processor |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        accuracy = row["accuracy"]
        values = [f"{accuracy[t]:.1%}" for t in ("val/accuracy", "val/accuracy_2x", "val/accuracy_4x")]
        first = "" if row["steps_to_99.5"] is None else f"step {row['steps_to_99.5']}"
        lines.append(
            f"| {row['run']} | {row['seed']} | {' | '.join(values)} | {first} | {row['steps']} | "
            f"{row['seconds']:.0f} | {row['processor']} |"
        )
    return "\n".join(lines)


def memory_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| method | tokens | peak of the process, MiB | of training | us per token |", "|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row['method']} | {row['tokens']:,} | {row['peak_MiB']:.1f} | {row['of_training_MiB']:.1f} | "
            f"{row['us_per_token']:.0f} |"
        )
    return "\n".join(lines)


def facts(found: dict[str, Any]) -> str:
    machine, results = found["machine"], found["results"]
    rows = results if isinstance(results, list) else []
    processors = {row.get("processor", machine["processor"]): None for row in rows} or [machine["processor"]]
    where = machine.get("gpu") or f"{' or '.join(processors)}, {machine['threads']} thread(s)"
    return f"{where}; torch {machine['torch']}, Python {machine['python']}."


def insert(page: str, name: str, text: str) -> str:
    """Replace what stands between the markers of ``name``."""
    begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
    before, rest = page.split(begin)
    return f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"


def draw_recall(found: dict[str, Any]) -> None:
    figure, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
    for name, colour in COLOURS.items():
        for i, row in enumerate(r for r in found["results"] if r["run"] == name):
            steps, values = zip(*row["curve"], strict=True)
            label = name.removeprefix("recall ") if i == 0 else None
            dotted = {"linestyle": ":", "linewidth": 3.5, "zorder": 3} if "BPTT" in name else {}
            axes.plot(steps, values, color=colour, label=label, marker="o", markersize=3, **dotted)
    axes.axhline(0.25, color="grey", linestyle="--", linewidth=1)
    axes.annotate("chance", (0, 0.26), color="grey", fontsize=8)
    axes.set(xlabel="optimizer steps", ylabel="validation accuracy", ylim=(0, 1.03))
    axes.set_title("Delayed recall, gaps 20 to 40, windows of 8 steps (three seeds)", fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="center right")
    figure.savefig(RESULTS / "recall.png", dpi=150)


def draw_step_time(found: dict[str, Any]) -> None:
    rows = [r for r in found["results"]["rows"] if r["batch"] == 8]
    names = list(dict.fromkeys(r["cell"] for r in rows))
    figure, panels = plt.subplots(1, len(names), figsize=(9, 3.2), sharey=True, layout="constrained")
    for axes, name in zip(panels, names, strict=True):
        chosen = [r for r in rows if r["cell"] == name]
        for label, key in (
            ("naive, step by step", lambda n: "naive"),
            ("RTRL(1)", lambda n: "RTRL(1)"),
            ("RTRL(8)", lambda n: "RTRL(8)"),
            ("RTRL(n)", lambda n: f"RTRL({n})"),
            ("BPTT", lambda n: "BPTT"),
        ):
            points = [(r["n"], r[key(r["n"])]["us_per_token"]) for r in chosen if isinstance(r.get(key(r["n"])), dict)]
            if points:
                axes.loglog(*zip(*points, strict=True), marker="o", markersize=3, label=label)
        ticks = [r["n"] for r in chosen]
        axes.set_xticks(ticks, [str(t) for t in ticks])
        axes.minorticks_off()
        axes.set(title=f"{name}, batch 8", xlabel="hidden units n")
    panels[0].set_ylabel("microseconds per token")
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside right center")
    figure.savefig(RESULTS / "step_time.png", dpi=150)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    tables: dict[str, Callable[[Any], str]] = {
        "side_by_side": side_by_side.table,
        "step_time_cpu_1": step_table,
        "step_time_cuda": step_table,
        "moe_scaling": moe_scaling.table,
        "learning": learning_table,
        "haystack_learning": haystack_report.table,
        "reasoning_step_cpu_1": reasoning_step.table,
        "etrm_ablation": etrm_ablation.table,
        "memory": memory.table,
        "constant_memory": memory_table,
    }
    page, found = PAGE.read_text(), {name: load(name) for name in [*tables, "truncation_bias"]}
    for name, table in tables.items():
        page = insert(page, name, f"\n{facts(found[name])}\n\n{table(found[name]['results'])}\n")
    PAGE.write_text(page)
    side_by_side.draw(found["side_by_side"]["results"])
    draw_recall(found["learning"])
    draw_step_time(found["step_time_cpu_1"])
    moe_scaling.draw(found["moe_scaling"]["results"])
    etrm_ablation.draw(found["etrm_ablation"]["results"])
    memory.draw(found["memory"]["results"])
    haystack_report.draw(found["haystack_learning"]["results"], found["truncation_bias"]["results"])


if __name__ == "__main__":
    main()
