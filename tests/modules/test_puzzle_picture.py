"""Pictures of puzzles after validation and test: when, of what, and where they go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import Logger
from matplotlib.figure import Figure

from rtrl_moe_pl.modules import PuzzlePicture
from tests.modules.helpers import data as sequences
from tests.modules.helpers import module as sequence_module
from tests.modules.helpers import trainer
from tests.modules.reasoning_helpers import data, module

SPLITS = ("held_out", "train_rules", "shuffled_demos")
FIGURES = [*(f"{split}_puzzles" for split in SPLITS), "by_step"]


def pictures(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.png"))


class Board(Logger):
    """A logger that takes images."""

    name, version = "board", 0  # pyright: ignore[reportAssignmentType]

    def __init__(self) -> None:
        super().__init__()
        self.images: list[tuple[str, int]] = []

    @property
    def experiment(self) -> Board:
        return self

    def add_image(self, tag: str, pixels: np.ndarray, global_step: int, dataformats: str) -> None:
        assert (dataformats, pixels.dtype, pixels.shape[2]) == ("HWC", np.uint8, 3)
        self.images.append((tag, global_step))

    def log_hyperparams(self, *args: Any, **options: Any) -> None: ...

    def log_metrics(self, *args: Any, **options: Any) -> None: ...


def test_every_set_is_drawn_after_every_validation_and_test(tmp_path: Path) -> None:
    board = Board()
    options: dict[str, Any] = {"logger": board, "limit_val_batches": 1.0, "callbacks": [PuzzlePicture(1)]}
    made = trainer(tmp_path, max_steps=8, **options)
    model, puzzles = module(), data()
    made.fit(model, datamodule=puzzles)
    assert board.images == [(f"val/{name}", step) for step in (3, 7) for name in FIGURES]
    files = [f"val_{name}.png" for name in FIGURES]
    assert pictures(tmp_path) == sorted(files)
    for path in tmp_path.rglob("*.png"):
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert path.stat().st_size > 5_000
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.png")}
    made.test(model, datamodule=puzzles, verbose=False)
    assert pictures(tmp_path) == sorted([*files, *(f"test_{name}.png" for name in FIGURES)])
    assert {path: path.read_bytes() for path in before} == before
    assert [tag for tag, _ in board.images[8:]] == [f"test/{name}" for name in FIGURES]


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
    for number, (task, shown, thoughts, step, names, title) in enumerate(drawn):
        split, model = SPLITS[number % 3], models[number // 3]
        expected = puzzles.task.draw(split, puzzles.evaluation_seed, torch.arange(2))
        assert all(torch.equal(a, b) for a, b in zip(shown, expected, strict=True))
        said = model(expected)
        assert torch.equal(thoughts.predictions, said.predictions)
        torch.testing.assert_close(thoughts.halt, said.halt)
        assert thoughts.halt.shape == (5, 2)
        assert torch.equal(step, said.halted_at(3))  # not the last of the five
        assert (task, names) == (puzzles.task, ["puzzle 0", "puzzle 1"])
        assert title == f"{split}, without training in this run"


def test_other_data_and_no_puzzles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"^PuzzlePicture needs a PuzzleDataModule, got AnBnDataModule$"):
        trainer(tmp_path, callbacks=[PuzzlePicture()]).fit(sequence_module(), datamodule=sequences())
    with pytest.raises(TypeError, match=r"^PuzzlePicture needs a PuzzleDataModule, got NoneType$"):
        trainer(tmp_path, callbacks=[PuzzlePicture()]).fit(module(), train_dataloaders=[0])
    with pytest.raises(ValueError, match=r"^puzzles must be at least 1, got 0$"):
        PuzzlePicture(0)


def test_a_picture_that_cannot_be_drawn_or_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: a full disk, or a fault of matplotlib, ended the fit."""
    (tmp_path / "val_by_step.png").mkdir()  # so that it cannot be written

    def broken(*arguments: Any) -> Figure:
        raise RuntimeError("no\nfonts")

    monkeypatch.setattr("rtrl_moe_pl.modules.puzzle_picture.puzzle_figure", broken)
    made = trainer(tmp_path, max_steps=4, limit_val_batches=1.0, callbacks=[PuzzlePicture()])
    with pytest.warns(UserWarning, match="no picture") as caught:
        made.fit(module(), datamodule=data())
    assert made.global_step == 4
    lines = [str(one.message) for one in caught if "no picture" in str(one.message)]
    assert lines[:3] == [
        f"no picture {tmp_path / f'val_{split}_puzzles.png'}, but the run goes on: RuntimeError: no fonts"
        for split in SPLITS
    ]
    assert lines[3].startswith(f"no picture {tmp_path / 'val_by_step.png'}, but the run goes on: IsADirectoryError: ")


def test_padding_is_not_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: rows of padding in the first batch were drawn as "puzzle -1"."""
    drawn: list[list[str]] = []

    def watched(*arguments: Any) -> Figure:
        drawn.append(arguments[4])
        return Figure()

    monkeypatch.setattr("rtrl_moe_pl.modules.puzzle_picture.puzzle_figure", watched)
    made = trainer(tmp_path, callbacks=[PuzzlePicture(3)])
    made.test(module(), datamodule=data(validation_size=2), verbose=False)
    assert drawn == [["puzzle 0", "puzzle 1"]] * 3
