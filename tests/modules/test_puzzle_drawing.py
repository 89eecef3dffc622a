"""Figures of puzzles: what is drawn, where, and how it is marked."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import Tensor

from rtrl_moe_pl.modules.puzzle_drawing import extent, puzzle_figure, steps_figure
from rtrl_moe_pl.reasoning import Thoughts
from rtrl_moe_pl.reasoning.metrics import Curves
from rtrl_moe_pl.tasks.puzzles import IGNORED, Maze, Puzzles, RulePuzzles, Sudoku
from rtrl_moe_pl.tasks.puzzles.grids import EOS, PAD

TASK = RulePuzzles("flips", size=3, colors=4, train_rules=4, held_out_rules=2, demos=3)
COLORS = TASK.look.colors
DEMOS = [f"{side} {k}" for k in (1, 2, 3) for side in ("input", "output")]


def puzzles(count: int = 1) -> Puzzles:
    return TASK.sample("held_out", 0, torch.arange(count))


def said(puzzles: Puzzles) -> Tensor:
    """Three steps: the answer, one cell of it wrong, the answer."""
    wrong = puzzles.labels.clone()
    wrong[:, 4] = 2 + (wrong[:, 4] - 1) % 4
    return torch.stack([puzzles.labels, wrong, puzzles.labels])


class Drawn:
    """Reads a figure: panels in the order they were drawn in."""

    def __init__(self, puzzles: Puzzles, predictions: Tensor, given: int = 1, task: Any = TASK) -> None:
        count = len(puzzles.inputs)
        halt = torch.linspace(-4.595, 2.1972, len(predictions))[:, None].expand(-1, count)  # 1 % to 90 %
        names = [f"puzzle {i}" for i in range(count)]
        thoughts = Thoughts(predictions, halt, halt)
        self.figure = puzzle_figure(task, puzzles, thoughts, torch.full((count,), given), names, "a title")
        [self.axes] = self.figure.axes
        self.texts = [text.get_text() for text in self.axes.texts]
        self.titles = [text for text in self.texts if text.startswith(("input", "output", "query", "target", "step"))]
        self.frames = [to_hex(color) for color in self.artist("frames").get_edgecolors()]

    def artist(self, name: str) -> Any:
        [found] = [artist for artist in self.axes.collections if artist.get_gid() == name]
        return found

    def boxes(self, name: str) -> np.ndarray:
        """[n, 4]: left, top, right, bottom."""
        corners = np.array([path.vertices[:4] for path in self.artist(name).get_paths()]).reshape(-1, 4, 2)
        return np.concatenate([corners.min(1), corners.max(1)], 1)

    def inside(self, panel: int, name: str) -> np.ndarray:
        """Which of the boxes lie in the frame of a panel."""
        left, top, right, bottom = self.boxes("frames")[panel] + (-0.01, -0.01, 0.01, 0.01)
        found = self.boxes(name)
        return (found[:, 0] > left) & (found[:, 1] > top) & (found[:, 2] < right) & (found[:, 3] < bottom)

    def grid(self, panel: int) -> list[list[str]]:
        """Colours of a panel's cells, row by row, by their places; cells left blank are missing."""
        chosen = self.inside(panel, "cells")
        colors = self.artist("cells").get_facecolors()[chosen]
        rows: dict[float, list[str]] = {}
        for (_, top, _, _), color in zip(self.boxes("cells")[chosen], colors, strict=True):
            rows.setdefault(round(float(top), 4), []).append(to_hex(color))
        return list(rows.values())


def colors(tokens: Tensor) -> list[list[str]]:
    return [[to_hex(to_rgb(COLORS[token])) for token in row] for row in tokens.view(3, 3).tolist()]


def test_demonstrations_are_above_query_target_and_the_answers_of_every_step() -> None:
    asked = puzzles(2)
    drawn = Drawn(asked, said(asked))
    steps = [
        "step 1\nq_halt probability 1%",
        "step 2: answer\nq_halt probability 23%",
        "step 3\nq_halt probability 90%",
    ]
    assert drawn.titles == 2 * [*DEMOS, "query", "target", *steps]
    assert drawn.texts[:3] == ["a title", "puzzle 0", "puzzle 1"]
    for puzzle in range(2):
        demos = torch.stack([asked.demo_inputs[puzzle], asked.demo_labels[puzzle]], 1).flatten(0, 1)
        grids = [*demos, asked.inputs[puzzle], asked.labels[puzzle], *said(asked)[:, puzzle]]
        for panel, grid in enumerate(grids, 11 * puzzle):
            assert drawn.grid(panel) == colors(grid)
    top = drawn.boxes("frames")[:, 1]  # frames differ in width
    assert np.ptp(top[:6]) < 0.05 > np.ptp(top[6:11])
    assert top[0] + 1 < top[6] < top[11] - 1
    assert drawn.texts.count("\N{RIGHTWARDS ARROW}") == 2 * (3 + 1)


def test_right_answers_are_framed_green_and_wrong_ones_red_with_their_wrong_cells_outlined() -> None:
    asked = puzzles()
    drawn = Drawn(asked, said(asked))
    green, red, grey = (to_hex(name) for name in ("tab:green", "tab:red", "grey"))
    assert drawn.frames == [grey] * 8 + [green, red, green]
    [outline] = drawn.boxes("wrong red")
    frame = drawn.boxes("frames")[9]
    assert np.allclose((outline[:2] + outline[2:]) / 2, (frame[:2] + frame[2:]) / 2, atol=1e-3)  # the middle cell


def test_the_answer_that_is_given_stands_out() -> None:
    asked = puzzles()
    for given in (0, 2):
        drawn = Drawn(asked, said(asked), given)
        bold = [text.get_text() for text in drawn.axes.texts if text.get_fontweight() == "bold"]
        assert [text.splitlines()[0] for text in bold] == [f"step {given + 1}: answer"]
        widths = list(drawn.artist("frames").get_linewidths())
        assert widths.index(max(widths)) == 8 + given
        assert sorted(widths)[-1] > 2 * sorted(widths)[-2]


@pytest.mark.parametrize("dpi", [100, 130, 150, 170])
def test_no_line_is_left_white_between_a_frame_and_its_cells(dpi: int) -> None:
    asked = puzzles()
    drawn = Drawn(asked, said(asked))
    drawn.figure.set_dpi(dpi)
    FigureCanvasAgg(drawn.figure).draw()
    pixels = np.asarray(drawn.figure.canvas.buffer_rgba())  # type: ignore[attr-defined]
    white = np.asarray((pixels[..., :3] > 180).all(-1))
    for left, top, right, bottom in (drawn.boxes("frames") * dpi).round().astype(int):
        x, y = (left + right) // 2 + 3, (top + bottom) // 2 + 3  # beside the symbols
        for line in (white[top : top + 9, x], white[bottom - 9 : bottom, x]):
            assert not line.any()
        for line in (white[y, left : left + 9], white[y, right - 9 : right]):
            assert not line.any()


def test_where_the_answer_is_not_known_frames_are_grey_and_there_is_no_target() -> None:
    asked = puzzles()
    unknown = asked._replace(labels=torch.full_like(asked.labels, IGNORED))
    drawn = Drawn(unknown, said(asked))
    assert drawn.titles[6:8] == ["query", "step 1\nq_halt probability 1%"]
    assert set(drawn.frames) == {to_hex("grey")}
    assert drawn.grid(8) == colors(said(asked)[1, 0])
    assert drawn.boxes("wrong red").size == 0


def test_demonstrations_that_are_not_there_are_not_drawn() -> None:
    asked = puzzles(2)
    mask = torch.tensor([[True, False, True], [False, True, False]])
    drawn = Drawn(asked._replace(demo_mask=mask), said(asked))
    kept = [title for title in drawn.titles if title.startswith(("input", "output"))]
    assert kept == ["input 1", "output 1", "input 3", "output 3", "input 2", "output 2"]
    assert drawn.grid(9) == colors(asked.demo_inputs[1, 1])


def test_what_is_not_asked_for_is_neither_drawn_nor_judged() -> None:
    asked = puzzles()
    labels = asked.labels.clone()
    labels[:, 4:] = IGNORED  # where the wrong cell is
    drawn = Drawn(asked._replace(labels=labels), said(asked))
    assert drawn.frames[8:] == [to_hex("tab:green")] * 3
    four = colors(said(asked)[1, 0])
    assert drawn.grid(9) == drawn.grid(7) == [four[0], four[1][:1]]


def test_the_border_of_a_grid_is_no_part_of_it_but_must_be_right() -> None:
    """A grid of 2 x 2 cells with a border, which one answer draws over, and another begins too early."""
    asked = puzzles()
    two, border, nothing = 2, EOS, PAD
    target = torch.tensor([[two, two, border, two, two, border, border, border, nothing]])
    over, early = target.clone(), target.clone()
    over[0, 2], early[0, 4] = 5, EOS
    asked = asked._replace(labels=target.masked_fill(target == PAD, IGNORED))
    drawn = Drawn(asked, torch.stack([target, over, early]))
    color, other = to_hex(to_rgb(COLORS[2])), to_hex(to_rgb(COLORS[5]))
    assert drawn.grid(7) == drawn.grid(8) == [[color] * 2] * 2
    assert drawn.grid(9) == [[color, color, other], [color] * 2]
    assert drawn.grid(10) == [[color] * 2, [color]]
    assert len(drawn.boxes("wrong red")) == 2
    left, _, right, _ = drawn.boxes("frames")[8:].T
    assert right[1] - left[1] > 1.4 * (right[0] - left[0])  # one cell wider, in the same scale


def test_sudoku_has_box_lines_and_its_digits() -> None:
    task = Sudoku(6, clues_min=20, clues_max=24, puzzles=1, held_out=1)
    asked = task.sample("held_out", 0, torch.arange(1))
    drawn = Drawn(asked, asked.labels.expand(6, 1, -1), task=task)
    assert len(drawn.titles) == 8
    assert len(drawn.artist("boxes").get_segments()) == 8 * (2 + 1)  # boxes of 2 x 3 cells
    digits = sum(len(drawn.artist(str(digit)).get_offsets()) for digit in range(1, 7))
    assert digits == 7 * 36 + int((asked.inputs > 1).sum())
    assert not [artist for artist in drawn.axes.collections if artist.get_gid() == "."]


def test_a_maze_has_letters_for_start_and_goal_alone() -> None:
    task = Maze(5)
    asked = task.sample("held_out", 0, torch.arange(1))
    drawn = Drawn(asked, asked.labels[None], 0, task)
    symbols = {str(artist.get_gid()) for artist in drawn.axes.collections if len(str(artist.get_gid())) == 1}
    assert symbols == {"S", "G"}


def test_there_are_no_symbols_in_small_cells() -> None:
    for size, symbols in ((12, 5 * 144), (13, 0)):
        task = RulePuzzles("flips", size=size, colors=4, train_rules=4, held_out_rules=2, demos=1)
        asked = task.sample("held_out", 0, torch.arange(1))
        drawn = Drawn(asked, asked.labels[None], 0, task)
        glyphs = [artist for artist in drawn.axes.collections if len(str(artist.get_gid())) == 1]
        assert sum(len(np.asarray(artist.get_offsets())) for artist in glyphs) == symbols


def test_many_demonstrations_and_steps_are_wrapped_and_large_grids_are_large() -> None:
    def shape(size: int, demos: int, steps: int) -> tuple[float, float, float]:
        """Width and height of the figure, and the width of the query, in inches."""
        task = RulePuzzles("flips", size=size, colors=4, train_rules=4, held_out_rules=2, demos=demos)
        asked = task.sample("held_out", 0, torch.arange(1))
        drawn = Drawn(asked, asked.labels.expand(steps, 1, -1), task=task)
        left, _, right, _ = drawn.boxes("frames")[2 * demos]
        return *drawn.figure.get_size_inches(), right - left

    small, many, large = shape(3, 3, 4), shape(3, 10, 16), shape(30, 10, 16)
    assert small[0] < 11
    assert many[0] < 18
    assert large[0] < 18
    assert many[1] < 2.2 * small[1]  # two rows each
    assert large[2] > 2.4 > 1.5 > small[2] > 1.3


def test_no_text_is_cut_or_lies_over_another() -> None:
    asked = puzzles(2)
    for predictions, title in ((said(asked), "short"), (said(asked)[:1], "a title of many words " * 12)):
        count = len(asked.inputs)
        thoughts = Thoughts(predictions, torch.ones(len(predictions), count), torch.ones(len(predictions), count))
        names = ["puzzle 12345"] * count
        figure = puzzle_figure(TASK, asked, thoughts, torch.zeros(count, dtype=torch.int64), names, title)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        extents = [text.get_window_extent() for text in figure.findobj(Text) if text.get_text()]  # type: ignore[arg-type]
        width, height = canvas.get_width_height()
        assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height for box in extents)
        assert not [(a, b) for i, a in enumerate(extents) for b in extents[:i] if a.overlaps(b)]


def test_the_extent_of_a_grid_goes_to_the_last_row_and_column_that_hold_something() -> None:
    grid = torch.tensor([[0, 2, 0, 0], [0, 0, 0, 0], [3, 0, 0, 0], [0, 0, 0, 0]])
    assert extent(grid != PAD) == (3, 2)
    assert extent(torch.zeros(3, 3, dtype=torch.bool)) == (1, 1)
    assert extent(torch.ones(2, 3, dtype=torch.bool)) == (2, 3)


# ---- accuracy by step


def by_step(figure: Figure) -> Any:
    [axes] = figure.axes
    return axes


def test_accuracy_by_step_is_a_line_and_halting_a_share_of_all_for_every_set() -> None:
    """A line goes on to the last step of evaluation, bars end at the last that training allows."""
    curves = {
        "held_out": Curves(torch.tensor([0.0, 0.5, 1.0, 0.25]), torch.tensor([1, 0, 3])),
        "none": Curves(torch.zeros(4), torch.tensor([0, 0, 0])),
    }
    axes = by_step(steps_figure(curves, "title"))
    lines = {str(line.get_label()): line for line in axes.lines}
    assert list(lines) == list(curves)
    assert list(lines["held_out"].get_xdata()) == [1, 2, 3, 4]
    assert list(lines["held_out"].get_ydata()) == [0, 0.5, 1, 0.25]
    bars = [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in axes.patches]
    assert [height for _, height in bars] == [0.25, 0, 0.75, 0, 0, 0]
    assert [round(place) for place, _ in bars] == [1, 2, 3] * 2


def test_equal_lines_are_all_seen_and_the_forced_step_is_hatched() -> None:
    names = ("held_out", "train_rules", "shuffled_demos")
    figure = steps_figure({name: Curves(torch.zeros(2), torch.tensor([0, 4])) for name in names}, "title")
    axes = by_step(figure)
    widths = [line.get_linewidth() for line in axes.lines]
    assert all(behind > before for behind, before in pairwise(widths))
    for look in ("get_marker", "get_linestyle", "get_markersize"):
        assert len({getattr(line, look)() for line in axes.lines}) == 3
    assert [bool(bar.get_hatch()) for bar in axes.patches] == [False, True] * 3
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()][3:] == [
        "share of puzzles that halt",
        "the last step allowed: forced",
    ]
