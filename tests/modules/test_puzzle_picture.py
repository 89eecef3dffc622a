"""Pictures of puzzles: what is drawn, and when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import Logger
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgba
from matplotlib.figure import Figure
from torch import Tensor

from rtrl_moe_pl.modules import PuzzlePicture
from rtrl_moe_pl.modules.puzzle_picture import _draw, cropped, puzzle_figure, steps_figure
from rtrl_moe_pl.reasoning import Thoughts
from rtrl_moe_pl.reasoning.metrics import Curves
from rtrl_moe_pl.tasks.puzzles import IGNORED, Puzzles, RulePuzzles, Sudoku
from rtrl_moe_pl.tasks.puzzles.colors import Look
from rtrl_moe_pl.tasks.puzzles.grids import PAD
from tests.modules.helpers import data as sequences
from tests.modules.helpers import module as sequence_module
from tests.modules.helpers import trainer
from tests.modules.reasoning_helpers import data, module

SPLITS = ("held_out", "train_rules", "shuffled_demos")
FIGURES = [*(f"{split}_puzzles" for split in SPLITS), "by_step"]
TASK = RulePuzzles("flips", size=3, colors=4, train_rules=4, held_out_rules=2, demos=3)


def pictures(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.png"))


# ---- when


class Board(Logger):
    """A logger that takes figures."""

    name, version = "board", 0  # pyright: ignore[reportAssignmentType]

    def __init__(self) -> None:
        super().__init__()
        self.figures: list[tuple[str, int]] = []

    @property
    def experiment(self) -> Board:
        return self

    def add_figure(self, tag: str, figure: Figure, global_step: int) -> None:
        self.figures.append((tag, global_step))

    def log_hyperparams(self, *args: Any, **options: Any) -> None: ...

    def log_metrics(self, *args: Any, **options: Any) -> None: ...


def test_every_set_is_drawn_after_every_validation_and_test(tmp_path: Path) -> None:
    board = Board()
    options: dict[str, Any] = {"logger": board, "limit_val_batches": 1.0, "callbacks": [PuzzlePicture(1)]}
    made = trainer(tmp_path, max_steps=8, **options)
    model, puzzles = module(), data()
    made.fit(model, datamodule=puzzles)
    assert board.figures == [(f"val/{name}", step) for step in (3, 7) for name in FIGURES]
    files = [f"val_{name}.png" for name in FIGURES]
    assert pictures(tmp_path) == sorted(files)
    for path in tmp_path.rglob("*.png"):
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert path.stat().st_size > 5_000
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.png")}
    made.test(model, datamodule=puzzles, verbose=False)
    assert pictures(tmp_path) == sorted([*files, *(f"test_{name}.png" for name in FIGURES)])
    assert {path: path.read_bytes() for path in before} == before
    assert [tag for tag, _ in board.figures[8:]] == [f"test/{name}" for name in FIGURES]


@pytest.mark.parametrize(
    "options",
    [
        {"fast_dev_run": True},
        {"num_sanity_val_steps": 2, "limit_val_batches": 1.0, "check_val_every_n_epoch": 9, "max_steps": 4},
    ],
    ids=["fast_dev_run", "sanity check"],
)
def test_trials_are_not_drawn(tmp_path: Path, options: dict[str, Any]) -> None:
    trainer(tmp_path, **options, callbacks=[PuzzlePicture()]).fit(module(), datamodule=data())
    assert list(tmp_path.iterdir()) == []


def test_what_is_drawn_is_what_the_model_says_of_the_first_puzzles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[Any, ...]] = []

    def watched(*arguments: Any) -> Figure:
        drawn.append(arguments)
        return Figure()

    monkeypatch.setattr("rtrl_moe_pl.modules.puzzle_picture.puzzle_figure", watched)
    puzzles, made = data(), trainer(tmp_path, callbacks=[PuzzlePicture(2)])
    models = [module(seed=seed, evaluation_steps=[5]) for seed in (1, 2)]
    for model in models:  # the second time anew
        made.test(model, datamodule=puzzles, verbose=False)
    assert len(drawn) == 6
    for number, (shown, thoughts, shape, look, names, title) in enumerate(drawn):
        split, model = SPLITS[number % 3], models[number // 3]
        expected = puzzles.task.draw(split, puzzles.evaluation_seed, torch.arange(2))
        assert all(torch.equal(a, b) for a, b in zip(shown, expected, strict=True))
        said = model(expected)
        assert torch.equal(thoughts.predictions, said.predictions)
        torch.testing.assert_close(thoughts.halt, said.halt)
        assert thoughts.halt.shape == (5, 2)
        assert (shape, look, names) == (puzzles.shape, puzzles.task.look, ["puzzle 0", "puzzle 1"])
        assert title == f"{split} without training in this run"


def test_other_data_and_no_puzzles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"^PuzzlePicture needs a PuzzleDataModule, got AnBnDataModule$"):
        trainer(tmp_path, callbacks=[PuzzlePicture()]).fit(sequence_module(), datamodule=sequences())
    with pytest.raises(TypeError, match=r"^PuzzlePicture needs a PuzzleDataModule, got NoneType$"):
        trainer(tmp_path, callbacks=[PuzzlePicture()]).fit(module(), train_dataloaders=[0])
    with pytest.raises(ValueError, match=r"^puzzles must be at least 1, got 0$"):
        PuzzlePicture(0)


# ---- what


def figure(puzzles: Puzzles, predictions: Tensor, halt: Tensor, task: Any = TASK) -> list[list[Axes]]:
    """Rows of panels."""
    names = [f"puzzle {i}" for i in range(len(puzzles.inputs))]
    made = puzzle_figure(puzzles, Thoughts(predictions, halt, halt), task.shape, task.look, names, "title")
    rows = 2 * len(names)
    return [made.axes[i : i + len(made.axes) // rows] for i in range(0, len(made.axes), len(made.axes) // rows)]


def titles(row: list[Axes]) -> list[str]:
    return [axes.get_title() for axes in row if axes.axison]


def frames(row: list[Axes]) -> list[str]:
    """Colours around the panels that are used; all four sides of one are alike."""
    sides = [{to_hex(spine.get_edgecolor()) for spine in axes.spines.values()} for axes in row if axes.axison]
    assert all(len(colors) == 1 for colors in sides)
    names = {to_hex(to_rgba(name)): name for name in ("tab:green", "tab:red", "grey")}
    return [names[color] for [color] in sides]


def tokens(axes: Axes) -> list[list[int]]:
    return axes.images[0].get_array().tolist()  # pyright: ignore[reportOptionalMemberAccess]


def said(puzzles: Puzzles) -> tuple[Tensor, Tensor]:
    """Three steps: the answer, one cell of it wrong, the answer; and q_halt."""
    right = puzzles.labels.clone()
    wrong = right.clone()
    wrong[:, 4] = 2 + (wrong[:, 4] - 1) % 4
    return torch.stack([right, wrong, right]), torch.tensor([-5.0, 0.25, 3.0])[:, None].expand(-1, len(right))


def test_a_puzzle_is_demonstrations_query_and_target_above_the_answers_of_every_step() -> None:
    puzzles = TASK.sample("held_out", 0, torch.arange(2))
    rows = figure(puzzles, *said(puzzles))
    assert len(rows) == 4
    for puzzle, (above, below) in enumerate(zip(rows[::2], rows[1::2], strict=True)):
        assert titles(above) == ["demo 1", "answer 1", "demo 2", "answer 2", "demo 3", "answer 3", "query", "target"]
        assert titles(below) == ["step 1, q -5.0", "step 2, q 0.2", "step 3, q 3.0"]
        demos = torch.stack([puzzles.demo_inputs[puzzle], puzzles.demo_labels[puzzle]], 1).flatten(0, 1)
        grids = [*demos, puzzles.inputs[puzzle], puzzles.labels[puzzle]]
        assert [tokens(axes) for axes in above] == [grid.view(3, 3).tolist() for grid in grids]
        assert tokens(below[1]) == said(puzzles)[0][1, puzzle].view(3, 3).tolist()
        assert above[0].texts[-1].get_text() == f"puzzle {puzzle}"
        written = [text.get_text() for text in above[6].texts]
        assert written == [str(color) for color in (puzzles.inputs[puzzle] - 2).tolist()]


def test_right_answers_are_framed_green_and_wrong_ones_red() -> None:
    puzzles = TASK.sample("held_out", 0, torch.arange(1))
    above, below = figure(puzzles, *said(puzzles))
    assert frames(below) == ["tab:green", "tab:red", "tab:green"]
    assert set(frames(above)) == {"grey"}


def test_where_the_answer_is_not_known_frames_are_grey_and_there_is_no_target() -> None:
    puzzles = TASK.sample("held_out", 0, torch.arange(1))
    unknown = puzzles._replace(labels=torch.full_like(puzzles.labels, IGNORED))
    above, below = figure(unknown, *said(puzzles))
    assert frames(below) == ["grey"] * 3
    assert titles(above)[-1] == "query"
    assert tokens(below[1]) == said(puzzles)[0][1].view(3, 3).tolist()  # all of it


def test_demonstrations_that_are_not_there_are_not_drawn() -> None:
    puzzles = TASK.sample("held_out", 0, torch.arange(2))
    mask = torch.tensor([[True, False, True], [False, True, False]])
    rows = figure(puzzles._replace(demo_mask=mask), *said(puzzles))
    assert titles(rows[0]) == ["demo 1", "answer 1", "demo 3", "answer 3", "query", "target"]
    assert titles(rows[2]) == ["demo 2", "answer 2", "query", "target"]
    assert tokens(rows[2][0]) == puzzles.demo_inputs[1, 1].view(3, 3).tolist()


def test_what_is_not_asked_for_is_neither_drawn_nor_judged() -> None:
    puzzles = TASK.sample("held_out", 0, torch.arange(1))
    predictions, halt = said(puzzles)
    labels = puzzles.labels.clone()
    labels[:, 4:] = IGNORED  # where the wrong cell is
    above, below = figure(puzzles._replace(labels=labels), predictions, halt)
    assert frames(below) == ["tab:green"] * 3
    shown = [*predictions[1, 0, :4].tolist(), *[PAD] * 2]
    assert tokens(below[1]) == tokens(above[-1]) == [shown[:3], shown[3:]]


def test_puzzles_without_demonstrations_and_with_many_steps() -> None:
    task = Sudoku(4, puzzles=1, held_out=1)
    puzzles = task.sample("held_out", 0, torch.arange(1))
    above, below = figure(puzzles, puzzles.labels.expand(6, 1, -1), torch.zeros(6, 1), task)
    assert titles(above) == ["query", "target"]
    assert len(titles(below)) == 6
    assert [text.get_text() for text in below[0].texts] == [str(d - 1) for d in puzzles.labels[0].tolist()]


def test_there_are_no_symbols_in_small_cells() -> None:
    for size, symbols in ((12, 144), (13, 0)):
        task = RulePuzzles("flips", size=size, colors=4, train_rules=4, held_out_rules=2, demos=1)
        puzzles = task.sample("held_out", 0, torch.arange(1))
        _, below = figure(puzzles, puzzles.labels[None], torch.zeros(1, 1), task)
        assert len(below[0].texts) == symbols


def test_empty_rows_and_columns_are_cropped() -> None:
    grid = torch.tensor([[0, 2, 0, 0], [0, 0, 0, 0], [3, 0, 0, 0], [0, 0, 0, 0]])
    assert cropped(grid).tolist() == [[0, 2], [0, 0], [3, 0]]
    assert cropped(torch.zeros(3, 3, dtype=torch.int64)).tolist() == [[0]]
    assert cropped(torch.ones(2, 3, dtype=torch.int64)).shape == (2, 3)


def test_accuracy_by_step_is_a_line_and_halting_a_share_of_all_for_every_set() -> None:
    """A line goes on to the last step of evaluation, bars end at the last that training allows."""
    curves = {
        "held_out": Curves(torch.tensor([0.0, 0.5, 1.0, 0.25]), torch.tensor([1, 0, 3])),
        "none": Curves(torch.zeros(4), torch.tensor([0, 0, 0])),
    }
    [axes] = steps_figure(curves, "title").axes
    lines = {str(line.get_label()): line for line in axes.lines}
    assert list(lines) == list(curves)
    assert list(lines["held_out"].get_xdata()) == [1, 2, 3, 4]  # pyright: ignore[reportArgumentType]
    assert list(lines["held_out"].get_ydata()) == [0, 0.5, 1, 0.25]  # pyright: ignore[reportArgumentType]
    bars = [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in axes.patches]  # pyright: ignore
    assert [height for _, height in bars] == [0.25, 0, 0.75, 0, 0, 0]
    assert [round(place) for place, _ in bars] == [1, 2, 3] * 2


def test_grids_of_one_cell_are_drawn() -> None:
    """Regression: a grid cropped to one row or column had no lines to draw between cells."""
    axes = Figure().subplots()
    _draw(axes, torch.full((3, 3), PAD), Look.of_grids(4), "empty")
    assert list(axes.get_xticks()) == list(axes.get_yticks()) == []
