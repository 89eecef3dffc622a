"""Puzzles as coloured grids, and accuracy by supervision step: figures, without Lightning."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection, PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.path import Path
from matplotlib.textpath import TextPath
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Affine2D, IdentityTransform
from torch import Tensor

from rtrl_moe_pl.reasoning.etrm import Thoughts
from rtrl_moe_pl.reasoning.metrics import Curves
from rtrl_moe_pl.tasks.puzzles import IGNORED, Puzzles, PuzzleTask
from rtrl_moe_pl.tasks.puzzles.colors import Look, is_bright
from rtrl_moe_pl.tasks.puzzles.grids import PAD

# inches
_CELL = 0.085  # a cell is no smaller, where panels may grow
_SMALLEST, _LARGEST = 1.35, 2.5  # panels
_GAP, _MARGIN = 0.3, 0.3  # between panels, with room for an arrow; around all
_WIDEST, _COLUMNS = 17.0, 10  # the picture; at most so many panels side by side
_READABLE = 0.11  # a symbol in smaller cells cannot be read

_BLANK = -1  # instead of tokens that are no cells


class _Panel(NamedTuple):
    """A grid with a title."""

    text: str
    tokens: Tensor  # [H, W], _BLANK where nothing is drawn
    wrong: Tensor  # [H, W] bool
    side: int  # how many cells fill the panel
    frame: str = "grey"
    given: bool = False  # whether it is the answer that is given
    arrow: bool = False  # to the next panel


class _Placed(NamedTuple):
    panel: _Panel
    x: float  # inches, of the grid's upper left corner, from that of the figure
    y: float
    cell: float  # inches
    rows: int
    columns: int


def puzzle_figure(
    task: PuzzleTask, puzzles: Puzzles, thoughts: Thoughts, step: Tensor, names: list[str], title: str
) -> Figure:
    """Draw B puzzles: demonstrations above; query, target and the answers of all supervision steps below.

    The answer that is given has a bold title and a thick frame. Frames of answers are green where all is right and
    red where something is wrong, and wrong cells have a red outline (grey, and none: the target is not known). Tokens
    below the task's first number (nothing, the border behind a grid) are no cells: they are left blank.

    Args:
        step: [B] int64, the step, from 0, whose answer is given.
        names: of the puzzles.

    Cost: 0.2 s on one thread, with saving, for 3 puzzles of 3 demonstrations and 4 steps; 0.4 s if grids are 30 x 30.
    """
    figure = Figure()
    axes = figure.add_axes((0, 0, 1, 1))
    numbers = torch.arange(len(names))[:, None]
    blocks = [_panels(task, puzzles.rows(i), thoughts.rows(i), int(step[i])) for i in numbers]
    largest = max(panel.side for block in blocks for row in block for panel in row)
    size = min(_LARGEST, max(_SMALLEST, _CELL * largest))
    columns = max(2, min(_COLUMNS, int(_WIDEST / (size + _GAP)) // 2 * 2))
    longest = max(len(row) for block in blocks for row in block)
    rows_needed = _divide_up(longest, columns)
    columns = 2 * _divide_up(longest, 2 * rows_needed)  # as few as do not need more rows, and whole pairs
    width = 2 * _MARGIN + min(columns, longest) * (size + _GAP) - _GAP
    lines = textwrap.wrap(title, int(13 * width))
    y = 0.1 + 0.15 * len(lines)
    axes.text(_MARGIN, 0.08, "\n".join(lines), fontsize=9, va="top")
    placed: list[_Placed] = []
    for name, block in zip(names, blocks, strict=True):
        top = y
        for line in (row[i : i + columns] for row in block for i in range(0, len(row), columns)):
            y += 0.34 if any("\n" in panel.text for panel in line) else 0.22  # titles
            left = [_MARGIN + i * (size + _GAP) for i in range(len(line))]
            made = [_place(panel, x, y, size) for panel, x in zip(line, left, strict=True)]
            y += max(p.rows * p.cell for p in made)
            placed += made
        axes.text(0.15, (top + y) / 2, name, rotation=90, va="center", ha="center", fontsize=8)
        y += 0.12
    figure.set_size_inches(width, y)
    axes.set(xlim=(0, width), ylim=(y, 0))  # a unit is an inch
    axes.axis("off")
    _draw(axes, placed, task.look)
    _write(axes, placed, size)
    return figure


def _divide_up(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)


def _panels(task: PuzzleTask, puzzle: Puzzles, thought: Thoughts, given: int) -> list[list[_Panel]]:
    """Demonstrations, if there are any, and the others, of one puzzle."""
    shape, label = (task.shape.height, task.shape.width), puzzle.labels[0]
    asked = label != IGNORED
    known = bool(asked.any())
    none = torch.zeros(shape, dtype=torch.bool)

    def cells(tokens: Tensor) -> Tensor:  # [H, W]
        return tokens.masked_fill(tokens < task.first_token, _BLANK).view(shape)

    def panel(text: str, tokens: Tensor, arrow: bool = False) -> _Panel:
        shown = cells(tokens)
        return _Panel(text, shown, none, max(extent(shown != _BLANK)), arrow=arrow)

    demos: list[_Panel] = []
    for k in puzzle.demo_mask[0].nonzero()[:, 0].tolist():
        demos.append(panel(f"input {k + 1}", puzzle.demo_inputs[0, k], arrow=True))
        demos.append(panel(f"output {k + 1}", puzzle.demo_labels[0, k]))
    answers: list[_Panel] = [panel("target", label.masked_fill(~asked, PAD))] if known else []
    for step, (tokens, halt) in enumerate(zip(thought.predictions[:, 0], thought.halt[:, 0].sigmoid(), strict=True)):
        wrong = (asked & (tokens != label)).view(shape)
        tokens = cells(tokens.masked_fill(~asked, PAD) if known else grid_tokens(task, tokens))
        frame = ("tab:red" if wrong.any() else "tab:green") if known else "grey"
        text = f"step {step + 1}{': answer' * (step == given)}\nq_halt probability {float(halt):.0%}"
        side = max(extent((tokens != _BLANK) | wrong))
        answers.append(_Panel(text, tokens, wrong, side, frame, step == given))
    side = max(answer.side for answer in answers)  # the same scale for all, so that they can be compared
    rest = [panel("query", puzzle.inputs[0], arrow=known), *(answer._replace(side=side) for answer in answers)]
    return [demos, rest] if demos else [rest]


def grid_tokens(task: PuzzleTask, tokens: Tensor) -> Tensor:
    """[H, W]: what `to_grid` finds in tokens [S], in the upper left corner; PAD elsewhere, where nothing is learned."""
    canvas = torch.full((task.shape.height, task.shape.width), PAD)
    for row, numbers in zip(canvas, task.to_grid(tokens), strict=False):
        row[: len(numbers)] = task.first_token + torch.tensor(numbers)
    return canvas


def extent(there: Tensor) -> tuple[int, int]:
    """How many rows and columns of [H, W] bool there are up to the last that holds something; at least one cell."""
    rows, columns = there.any(1).nonzero(), there.any(0).nonzero()
    return (int(rows[-1]) + 1, int(columns[-1]) + 1) if len(rows) else (1, 1)


def _place(panel: _Panel, x: float, y: float, size: float) -> _Placed:
    """With the upper left corner of a panel of ``size`` inches at (x, y)."""
    rows, columns = extent((panel.tokens != _BLANK) | panel.wrong)
    cell = size / panel.side
    return _Placed(panel, x + (size - columns * cell) / 2, y, cell, rows, columns)


def _boxes(corner: np.ndarray, width: np.ndarray, height: np.ndarray) -> np.ndarray:
    """[n, 4, 2]: rectangles with their upper left corners at [n, 2]."""
    along, down = np.array([0, 1, 1, 0]), np.array([0, 0, 1, 1])
    corners = corner[:, None] + np.stack([width[:, None] * along, height[:, None] * down], -1)
    return corners.round(6)  # neighbours share corners exactly: else there may be a gap of a pixel


def _draw(axes: Axes, placed: list[_Placed], look: Look) -> None:
    """Frames, cells, symbols, boxes and outlines of wrong cells, each kind as one artist: that is fast."""

    def cells(masks: list[Tensor]) -> tuple[np.ndarray, np.ndarray]:  # corners [n, 2] and sizes [n] of those chosen
        place = [mask.nonzero().flip(1).numpy() for mask in masks]
        corner = [(p.x, p.y) + at * p.cell for p, at in zip(placed, place, strict=True)]
        return np.concatenate(corner), np.repeat([p.cell for p in placed], [len(at) for at in place])

    shown = [p.panel.tokens != _BLANK for p in placed]
    points = np.array([(4 if p.panel.given else 1.5) if "\n" in p.panel.text else 0.8 for p in placed])
    under = 0.8  # points: frames lie beneath the cells and reach below them, as each kind snaps to pixels by itself
    outer = (points - under) / 144  # inches: frames hide nothing
    corner = np.array([[p.x, p.y] for p in placed]) - outer[:, None]
    span = np.array([[p.columns * p.cell, p.rows * p.cell] for p in placed]) + 2 * outer[:, None]
    axes.add_collection(
        PolyCollection(
            _boxes(corner, span[:, 0], span[:, 1]),  # type: ignore[arg-type]
            facecolors="none",
            edgecolors=[p.panel.frame for p in placed],
            linewidths=points + under,
            gid="frames",
        ),
        autolim=False,
    )
    token = torch.cat([p.panel.tokens[mask] for p, mask in zip(placed, shown, strict=True)]).numpy()
    corner, cell = cells(shown)
    colors = np.array([to_rgb(color) for color in look.colors])[token]
    axes.add_collection(
        PolyCollection(_boxes(corner, cell, cell), facecolors=colors, edgecolors="grey", linewidths=0.3, gid="cells"),  # type: ignore[arg-type]
        autolim=False,
    )
    for value in np.unique(token[cell >= _READABLE]).tolist():
        if look.symbols[value].isalnum():
            here = (token == value) & (cell >= _READABLE)
            glyphs = PathCollection(
                [_glyph(look.symbols[value])],
                sizes=np.minimum(10, 60 * cell[here]) ** 2,
                offsets=corner[here] + cell[here, None] / 2,
                offset_transform=axes.transData,
                facecolors="black" if is_bright(look.colors[value]) else "white",
                linewidths=0,
                gid=look.symbols[value],
            )
            glyphs.set_transform(IdentityTransform())
            axes.add_collection(glyphs, autolim=False)
    if look.box:
        lines = [line for p in placed for line in _box_lines(p, *look.box)]
        axes.add_collection(LineCollection(lines, colors="black", linewidths=1.2, gid="boxes"), autolim=False)
    corner, cell = cells([p.panel.wrong for p in placed])
    inset = 0.1 * cell
    outlines = _boxes(corner + inset[:, None], cell - 2 * inset, cell - 2 * inset)
    for color, part in (("white", 0.2), ("red", 0.11)):  # red on white: to be seen on any colour
        axes.add_collection(
            PolyCollection(
                outlines,  # type: ignore[arg-type]
                facecolors="none",
                edgecolors=color,
                linewidths=np.minimum(part * 72 * cell, 14 * part),
                gid=f"wrong {color}",
            ),
            autolim=False,
        )


@lru_cache
def _glyph(symbol: str) -> Path:
    """A symbol around the origin, one point high for text of one point."""
    path = TextPath((0, 0), symbol, size=1)
    box = path.get_extents()
    return Affine2D().translate(-(box.x0 + box.x1) / 2, -(box.y0 + box.y1) / 2).transform_path(path)


def _box_lines(p: _Placed, rows: int, columns: int) -> list[list[tuple[float, float]]]:
    right, low = p.x + p.columns * p.cell, p.y + p.rows * p.cell
    across = [p.y + row * p.cell for row in range(rows, p.rows, rows)]
    down = [p.x + column * p.cell for column in range(columns, p.columns, columns)]
    return [[(p.x, y), (right, y)] for y in across] + [[(x, p.y), (x, low)] for x in down]


def _write(axes: Axes, placed: list[_Placed], size: float) -> None:
    """Titles, and arrows to the next panel."""
    for p in placed:
        middle = p.x + p.columns * p.cell / 2
        weight = "bold" if p.panel.given else "normal"
        axes.text(middle, p.y - 0.07, p.panel.text, fontsize=6.5, ha="center", va="bottom", weight=weight)
        if p.panel.arrow:
            x, y = middle + (size + _GAP) / 2, p.y + p.rows * p.cell / 2
            axes.text(x, y, "\N{RIGHTWARDS ARROW}", fontsize=13, ha="center", va="center")


def steps_figure(curves: Mapping[str, Curves], title: str) -> Figure:
    """Accuracy of the answer at every supervision step, and the share of puzzles that halt there, of every set.

    Lines get thinner from set to set, so that equal ones are all seen. Bars at the last step of halting are hatched:
    puzzles that did not halt before are stopped there.
    """
    figure = Figure(figsize=(6.5, 3.8), layout="constrained")
    axes = figure.subplots()
    for i, (name, (exact, halted)) in enumerate(curves.items()):
        behind, width, share = len(curves) - 1 - i, 0.8 / len(curves), halted / max(1, int(halted.sum()))
        place = torch.arange(1, len(share) + 1) + (i - (len(curves) - 1) / 2) * width
        bars = axes.bar(place.tolist(), share.tolist(), width, color=f"C{i}", alpha=0.3)
        bars[-1].set(hatch="////", edgecolor="black")
        axes.plot(
            range(1, len(exact) + 1),
            exact.tolist(),
            color=f"C{i}",
            linestyle=("-", "--", ":", "-.")[i % 4],
            linewidth=1.5 + 1.5 * behind,
            marker="osD^vP"[i % 6],
            markersize=4 + 2.5 * behind,
            label=name,
        )
    axes.set(xlabel="supervision step", ylabel="exact accuracy", ylim=(-0.03, 1.05))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.set_title(title, fontsize=9)
    bars = [
        Patch(color="grey", alpha=0.3, label="share of puzzles that halt"),
        Patch(facecolor="0.9", hatch="////", label="the last step allowed: forced"),
    ]
    figure.legend(handles=[*axes.lines, *bars], frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    return figure
