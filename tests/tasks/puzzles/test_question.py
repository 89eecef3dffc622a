"""Puzzles from JSON files, for every kind of task."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rtrl_moe_pl.tasks.puzzles import IGNORED, ArcPuzzles, Maze, PuzzleTask, RulePuzzles, Sudoku, read_questions
from rtrl_moe_pl.tasks.puzzles.grids import EOS, PAD
from tests.tasks.puzzles.arc_case import content, write

RULES = RulePuzzles(size=2, colors=3, train_rules=4, held_out_rules=2, demos=3)
PATTERN = RulePuzzles("pattern", size=3, colors=9)
TASKS: list[PuzzleTask] = [RULES, PATTERN, Sudoku(4), Maze(5)]


@pytest.fixture(scope="module")
def arc(tmp_path_factory: pytest.TempPathFactory) -> ArcPuzzles:
    folder = write(tmp_path_factory.mktemp("arc"), "training", {"a": content(0)})
    return ArcPuzzles(source=str(write(folder, "evaluation", {"b": content(1)})), max_size=4, max_demos=3)


def saved(folder: Path, question: Any) -> Path:
    path = folder / "question.json"
    path.write_text(question if isinstance(question, str) else json.dumps(question))
    return path


def pair(before: Any, after: Any = None) -> dict[str, Any]:
    return {"input": before} | ({} if after is None else {"output": after})


# ---- round trips


@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
def test_the_puzzles_of_a_task_written_as_a_file_are_read_as_they_were(tmp_path: Path, task: PuzzleTask):
    puzzles = task.sample("held_out", 3, torch.arange(4))
    for row in range(4):
        one = puzzles.rows(torch.tensor([row]))
        sides = zip(one.demo_inputs[0], one.demo_labels[0], strict=True)
        demos = [pair(task.to_grid(before), task.to_grid(after)) for before, after in sides]
        test = [pair(task.to_grid(one.inputs[0]), task.to_grid(one.labels[0]))]
        read = read_questions(saved(tmp_path, {"train": demos, "test": test}), task)
        for name in ("inputs", "labels", "demo_inputs", "demo_labels", "demo_mask"):
            assert torch.equal(getattr(read, name), getattr(one, name)), name
        assert read.identity.tolist() == [0]
        assert [part.dtype for part in read] == [part.dtype for part in one]


@pytest.mark.parametrize(("task", "cells"), [(RULES, 4), (PATTERN, 9), (Sudoku(4), 16), (Maze(5), 25)])
def test_every_token_that_has_a_number_comes_back(task: PuzzleTask, cells: int):
    for token in range(task.first_token, task.shape.vocabulary):
        grid = task.to_grid(torch.full((cells,), token))
        assert task.to_tokens(np.array(grid, np.uint8)).tolist() == [token] * cells
        assert grid[0][0] == token - task.first_token
    assert task.to_grid(torch.full((cells,), PAD)) == [[-1] * int(cells**0.5)] * int(cells**0.5)


def test_arc_grids_keep_their_size_and_lie_in_the_corner_of_the_canvas(arc: ArcPuzzles):
    grid = [[1, 0, 9], [4, 5, 6]]
    tokens = arc.to_tokens(np.array(grid, np.uint8))
    assert tokens.view(4, 4).tolist() == [[3, 2, 11, EOS], [6, 7, 8, EOS], [EOS] * 3 + [PAD], [PAD] * 4]
    assert tokens.dtype == torch.int64
    assert arc.to_grid(tokens) == grid
    noise = torch.where(tokens == PAD, 5, tokens)  # a model is never trained on PAD
    assert arc.to_grid(noise) == grid
    assert arc.to_grid(torch.full((16,), EOS)) == []
    full = np.arange(16).reshape(4, 4) % 10
    assert arc.to_grid(arc.to_tokens(full.astype(np.uint8))) == full.tolist()


# ---- what is read


def test_every_test_pair_is_a_puzzle_with_all_demonstrations(tmp_path: Path):
    one, two, three = [[0, 1], [2, 0]], [[1, 1], [2, 2]], [[2, 2], [2, 1]]
    question = {"train": [pair(one, two), pair(two, three)], "test": [pair(three), pair(one, three)]}
    read = read_questions(saved(tmp_path, question), RULES)
    assert read.inputs.tolist() == [[4, 4, 4, 3], [2, 3, 4, 2]]
    assert read.labels.tolist() == [[IGNORED] * 4, [4, 4, 4, 3]]
    assert read.valid.tolist() == [False, True]  # a question, and one with an answer
    assert read.demo_mask.tolist() == [[True, True, False]] * 2
    assert read.demo_inputs.tolist() == [[[2, 3, 4, 2], [3, 3, 4, 4], [PAD] * 4]] * 2
    assert read.demo_labels.tolist() == [[[3, 3, 4, 4], [4, 4, 4, 3], [PAD] * 4]] * 2


def test_an_output_of_null_is_no_answer(tmp_path: Path):
    question = {"test": [pair([[0, 1, 0, 0]] * 4) | {"output": None}]}
    assert not read_questions(saved(tmp_path, question), Sudoku(4)).valid.any()


@pytest.mark.parametrize("task", [Sudoku(4), Maze(3)], ids=lambda task: type(task).__name__)
def test_puzzles_without_demonstrations_need_none_and_look_at_none(tmp_path: Path, task: PuzzleTask):
    n = task.shape.height
    grid = [[0, 1] + [0] * (n - 2)] * n
    alone = read_questions(saved(tmp_path, {"test": [pair(grid)]}), task)
    beside = read_questions(saved(tmp_path, {"train": [pair(7)], "test": [pair(grid)]}), task)
    assert alone.demo_inputs.shape == (1, 0, n * n)
    assert alone.demo_mask.shape == (1, 0)
    assert all(torch.equal(a, b) for a, b in zip(alone, beside, strict=True))


def test_of_an_arc_answer_nothing_is_asked_outside_of_its_border(tmp_path: Path, arc: ArcPuzzles):
    """As in the task's own puzzles."""
    question = content(1)
    own = arc.sample("held_out", 0, torch.tensor([0]))
    read = read_questions(saved(tmp_path, question), arc)
    assert (own.labels == IGNORED).any()
    for name in ("inputs", "labels", "demo_inputs", "demo_labels", "demo_mask"):
        assert torch.equal(getattr(read, name), getattr(own, name)), name


# ---- what is refused

GOOD = [[0, 1], [2, 0]]
TRAIN = [pair(GOOD, GOOD)]
REFUSED: list[tuple[Any, str]] = [
    ("{train: 1}", "not JSON: Expecting property name enclosed in double quotes"),
    ("", "the file is empty"),
    ("[]", 'no list "train": a task is {"train": '),
    ({"test": [pair(GOOD)]}, 'no list "train": a task is {"train": '),
    ({"train": TRAIN}, 'no list "test": a task is {"train": '),
    ({"train": [], "test": [pair(GOOD)]}, "no demonstrations: train is empty"),
    ({"train": TRAIN, "test": []}, "no test pairs: test is empty"),
    ({"train": [pair(GOOD)], "test": [pair(GOOD)]}, 'train pair 1: no "output"'),
    ({"train": TRAIN, "test": [pair(GOOD), {}]}, 'test pair 2: no "input"'),
    ({"train": TRAIN, "test": [pair([])]}, "test pair 1, input: the grid is empty"),
    (
        {"train": TRAIN, "test": [pair(GOOD), pair([[0, 1], [2]])]},
        "test pair 2, input: ragged: row 1 has 2 cells, row 2 has 1",
    ),
    (
        {"train": TRAIN, "test": [pair([[0, 1], [2, 10]])]},
        "test pair 1, input: row 2 has the colour 10; colours are the integers 0 to 9",
    ),
    (
        {"train": [*TRAIN, pair(GOOD, [[0, -1], [0, 0]])], "test": [pair(GOOD)]},
        "train pair 2, output: row 1 has the colour -1; colours are the integers 0 to 9",
    ),
    ({"train": TRAIN, "test": [pair([[1.0, 1], [1, 1]])]}, "test pair 1, input: row 1 has the colour 1.0; "),
    (
        {"train": TRAIN, "test": [pair([[0] * 31])]},
        "test pair 1, input: 1 rows x 31 columns; at most 30 x 30",
    ),
    (
        {"train": [*TRAIN, pair([[0, 1, 1], [0, 0, 0]], GOOD)], "test": [pair(GOOD)]},
        "train pair 2, input: the grid has 2 x 3 cells, but puzzles are 2 x 2",
    ),
    (
        {"train": TRAIN, "test": [pair(GOOD), pair(GOOD, [[0], [1]])]},
        "test pair 2, output: the grid has 2 x 1 cells, but puzzles are 2 x 2",
    ),
    (
        {"train": TRAIN, "test": [pair([[0, 1], [2, 3]])]},
        "test pair 1, input: the grid has a 3, but the largest number of these puzzles is 2",
    ),
    (
        {"train": 4 * TRAIN, "test": [pair(GOOD)]},
        "4 demonstrations, but the model was made for at most 3: leave some out",
    ),
]


@pytest.mark.parametrize(("question", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_a_bad_file_is_refused_in_one_line_with_the_file_and_the_pair(tmp_path: Path, question: Any, message: str):
    path = saved(tmp_path, question)
    with pytest.raises(ValueError, match="question") as refusal:
        read_questions(path, RULES)
    text = str(refusal.value)
    assert text.startswith(f"{path}: {message}")
    assert "\n" not in text


def test_numbers_and_sizes_are_those_of_the_task(tmp_path: Path, arc: ArcPuzzles):
    cases: list[tuple[PuzzleTask, int, int, str]] = [
        (Sudoku(4), 4, 5, "the grid has a 5, but the largest number of these puzzles is 4"),
        (Maze(5), 5, 5, "the grid has a 5, but the largest number of these puzzles is 4"),
        (PATTERN, 3, 9, ""),  # black and nine colours
        (Sudoku(4), 5, 0, "the grid has 5 x 5 cells, but puzzles are 4 x 4"),
        (arc, 5, 0, "the grid has 5 x 5 cells, but the canvas is 4 x 4"),
        (arc, 2, 9, ""),
    ]
    for task, n, color, message in cases:
        grid = [[color] * n] * n
        path = saved(tmp_path, {"train": [pair(grid, grid)] * task.shape.max_demos, "test": [pair(grid)]})
        if message:
            with pytest.raises(ValueError, match=rf"question\.json: t\w+ pair 1, input: {message}$"):
                read_questions(path, task)
        else:
            read_questions(path, task)


def test_a_missing_file_is_an_error_of_the_system(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"gone\.json"):
        read_questions(tmp_path / "gone.json", RULES)
