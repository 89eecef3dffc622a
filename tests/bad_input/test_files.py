"""Puzzles in JSON files and folders of them that are wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.bad_input.case import CONFIGS, Case, contents, refused, run, table

GRID = [[0, 1], [2, 0]]
PAIR = {"input": GRID, "output": GRID}
ASKED = {"test": [{"input": GRID}]}
FORM = '{"train": [{"input": grid, "output": grid}, ..], "test": [{"input": grid}, ..]}'


def shown(grid: Any) -> dict[str, Any]:
    """A puzzle with this grid in its first demonstration."""
    return {"train": [{"input": grid, "output": GRID}], **ASKED}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the file is empty"),
        ("{", "not JSON: Expecting property name"),
        ("[" * 100_000, "not JSON: maximum recursion depth"),
        ("null", f'no list "train": a task is {FORM}'),
        ("3", f'no list "train": a task is {FORM}'),
        ([1, 2], f'no list "train": a task is {FORM}'),
        (ASKED, f'no list "train": a task is {FORM}'),
        ({"train": PAIR, **ASKED}, f'no list "train": a task is {FORM}'),
        ({"train": [], **ASKED}, "no demonstrations: train is empty"),
        ({"train": [PAIR]}, f'no list "test": a task is {FORM}'),
        ({"train": [PAIR], "tset": []}, f'no list "test": a task is {FORM}'),
        (
            {"train": [PAIR], "test": [{"input": GRID, "outptu": GRID}]},
            'test pair 1: no "output", but "outptu", which would make a question of an answer',
        ),
        ({"train": [PAIR], "test": []}, "no test pairs: test is empty"),
        ({"train": [[GRID, GRID]], **ASKED}, 'train pair 1: no "input"'),
        ({"train": [PAIR, {"input": GRID}], **ASKED}, 'train pair 2: no "output"'),
        ({"train": [PAIR] * 9, **ASKED}, "9 demonstrations, but the model was made for at most 2: leave some out"),
        (
            {"train": [PAIR], "test": [{"input": [[1]]}]},
            "test pair 1, input: the grid has 1 x 1 cells, but puzzles are 2 x 2",
        ),
        (
            {"train": [PAIR], "test": [{"input": GRID, "output": [[1]]}]},
            "test pair 1, output: the grid has 1 x 1 cells",
        ),
        (shown(None), "train pair 1, input: not a list of rows, each a list of colours"),
        (shown("0120"), "train pair 1, input: not a list of rows, each a list of colours"),
        (shown([]), "train pair 1, input: the grid is empty"),
        (shown([[]]), "train pair 1, input: the grid is empty"),
        (shown([[0, 1], [2]]), "train pair 1, input: ragged: row 1 has 2 cells, row 2 has 1"),
        (shown([["a", 1], [2, 0]]), "train pair 1, input: row 1 has the colour 'a'; colours are the integers 0 to 9"),
        (shown([[0.5, 1], [2, 0]]), "train pair 1, input: row 1 has the colour 0.5; colours are"),
        (shown([[float("nan"), 1], [2, 0]]), "train pair 1, input: row 1 has the colour nan; colours are"),
        (shown([[True, 1], [2, 0]]), "train pair 1, input: row 1 has the colour True; colours are"),
        (shown([[-1, 1], [2, 0]]), "train pair 1, input: row 1 has the colour -1; colours are"),
        (shown([[10**400, 1], [2, 0]]), "train pair 1, input: row 1 has the colour 100000.. (401 digits); colours are"),
        (shown([GRID]), "train pair 1, input: row 1 has the colour [0, 1]; colours are"),
        (
            shown([[3, 1], [2, 0]]),
            "train pair 1, input: the grid has a 3, but the largest number of these puzzles is 2",
        ),
    ],
)
def test_a_question_that_is_wrong(here: Path, capsys: pytest.CaptureFixture[str], text: Any, said: str) -> None:
    (here / "question.json").write_text(text if isinstance(text, str) else json.dumps(text))
    before = contents(here)
    refused(
        capsys,
        ["predict", *CONFIGS["reasoning"], "--data.puzzle=question.json"],
        [f"data.puzzle: question.json: {said}"],
    )
    assert contents(here) == before


PUZZLE = "--data.puzzle="
CASES = [
    Case(
        "no file",
        [f"{PUZZLE}gone.json"],
        [f"data.puzzle: there is no file gone.json: name a JSON file, {FORM}"],
        "predict",
        "reasoning",
    ),
    Case("no name", [PUZZLE], [f"data.puzzle: there is no file : name a JSON file, {FORM}"], "predict", "reasoning"),
    Case("a folder", [f"{PUZZLE}."], ["data.puzzle: . is a folder: name a JSON file, "], "predict", "reasoning"),
    Case("no puzzle in a fit", [f"{PUZZLE}gone.json"], ["data.puzzle: there is no file gone.json"], "fit", "reasoning"),
    Case(
        "a puzzle for sequences",
        [f"{PUZZLE}config.yaml"],
        ["unknown key data.puzzle: AnBnDataModule takes n_min, "],
        "predict",
    ),
    Case("YAML for JSON", [f"{PUZZLE}config.yaml"], ["data.puzzle: config.yaml: not JSON: "], "predict", "reasoning"),
]


@table(CASES)
def test_refused(here: Path, capsys: pytest.CaptureFixture[str], case: Case) -> None:
    run(case, here, capsys)


NONE = "data.source 'arc': of its 1 .json files none is an ARC task; a file holds one task, " + FORM


@pytest.mark.filterwarnings("ignore:left out")
@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("{", [], NONE),
        ([], [], NONE),
        ({}, [], NONE),
        ({"train": [PAIR]}, [], NONE),
        ({"train": [{"input": [[0] * 31] * 31, "output": GRID}], **ASKED}, [], NONE),
        (None, [], "data.source 'arc': of its 1 .json files none is an ARC task"),
        (
            {"train": [PAIR, PAIR], "test": [PAIR]},
            [],
            "data.source 'arc' has no evaluation tasks: set held_out_groups, how many",
        ),
        ({}, ["--data.source="], "data.source must be 'arc1', 'arc2' or a folder of ARC JSON files, got ''"),
        ({}, ["--data.source=gone"], "data.source must be 'arc1', 'arc2' or a folder of ARC JSON files, got 'gone'"),
        ({}, ["--data.max_size=0"], "data.max_size must be at least 1, got 0"),
        ({}, ["--data.votes=0"], "data.votes must be at least 1, got 0"),
        ({}, ["--data.demo_dropout=2"], "data.demo_dropout must be a probability below 1, got 2.0"),
    ],
)
def test_a_folder_that_is_wrong(
    here: Path, capsys: pytest.CaptureFixture[str], text: Any, options: list[str], said: str
) -> None:
    task = here / "arc/task.json"
    task.parent.mkdir()
    task.mkdir() if text is None else task.write_text(text if isinstance(text, str) else json.dumps(text))
    before = contents(here)
    refused(capsys, ["fit", *CONFIGS["bare"], "--data=ArcDataModule", "--data.source=arc", *options], [said])
    assert contents(here) == before
