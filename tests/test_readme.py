"""The README's examples run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "readme"}
    exec(compile(code, "README.md", "exec"), names)
    return names


def test_there_are_two_examples() -> None:
    assert len(BLOCKS) == 2


def test_own_cell() -> None:
    names = run(BLOCKS[0])
    for name, truth in names["truth"].grads.items():
        assert (names["exact"].grads[name] - truth).norm() <= 1e-9 * truth.norm()
    assert any(
        (names["biased"].grads[name] - truth).norm() > 1e-3 * truth.norm()
        for name, truth in names["truth"].grads.items()
    )


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*GPU available")
def test_own_data() -> None:
    names = run(BLOCKS[1])
    assert names["model"].global_step == 20


def test_every_file_named_exists() -> None:
    root = Path(__file__).parent.parent
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (root / target).exists(), target
    for name in re.findall(r"configs/(\w+)\.yaml", README):
        assert (root / "configs" / f"{name}.yaml").exists(), name
