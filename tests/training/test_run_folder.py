"""Runs that begin at once in one folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from rtrl_moe_pl.training.run_folder import RunLogger


def versions(folder: Path, kind: type[TensorBoardLogger] = RunLogger) -> list[int | str]:
    """Of two loggers, before either has written anything."""
    first, second = kind(folder), kind(folder)
    return [first.version, second.version]


def test_two_runs_that_have_written_nothing_yet_have_a_folder_each(tmp_path: Path) -> None:
    assert versions(tmp_path, TensorBoardLogger) == [0, 0]  # the negative control
    assert versions(tmp_path) == [0, 1]


def test_a_run_that_looked_before_the_other_had_made_its_folder_looks_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = iter([0, 0, 1])
    monkeypatch.setattr(TensorBoardLogger, "_get_next_version", lambda self: next(seen))
    assert versions(tmp_path) == [0, 1]
