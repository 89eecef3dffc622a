"""Small ARC tasks whose grids say what they are: [[task, pair, 1]] before and [[task, pair, 2]] after."""

import json
from pathlib import Path
from typing import Any


def content(task: int, train: int = 3, test: int = 1, answered: bool = True) -> dict[str, list[dict[str, Any]]]:
    """A task's JSON; pairs are numbered as in `ArcTask.pairs`: test pairs from 0 on, then demonstrations."""

    def pair(number: int) -> dict[str, Any]:
        return {"input": [[task, number, 1]], "output": [[task, number, 2]]}

    asked = [pair(number) if answered else {"input": pair(number)["input"]} for number in range(test)]
    return {"train": [pair(test + number) for number in range(train)], "test": asked}


def write(folder: Path, part: str, tasks: dict[str, Any]) -> Path:
    """Write tasks by name into a part ("" or training or evaluation) of a folder; strings as they are."""
    (folder / part).mkdir(parents=True, exist_ok=True)
    for name, task in tasks.items():
        (folder / part / f"{name}.json").write_text(task if isinstance(task, str) else json.dumps(task))
    return folder
