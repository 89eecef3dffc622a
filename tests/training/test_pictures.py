"""Where figures go, what titles say, and what a fault costs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from rtrl_moe_pl.training.pictures import save, show, when
from tests.modules.helpers import trainer
from tests.modules.reasoning_helpers import data, module


class Board:
    """What loggers are to a figure."""

    def __init__(self, *takes: str) -> None:
        self.taken: list[tuple[Any, ...]] = []
        self.experiment = self
        for name in takes:
            setattr(self, name, lambda *given, name=name, **options: self.taken.append((name, *given, options)))


def small() -> Figure:
    figure = Figure(figsize=(2, 1))
    figure.add_axes((0, 0, 0.5, 1)).set_facecolor("red")
    return figure


def shown(folder: Path, monkeypatch: pytest.MonkeyPatch, *boards: Any) -> Path:
    made = trainer(folder)
    monkeypatch.setattr(made, "_loggers", list(boards))
    show(small, made, folder / "new", "val", "name", dpi=50)
    return folder / "new/val_name.png"


def test_a_figure_is_rendered_once_for_the_file_and_for_loggers_that_take_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, figures, neither = Board("add_image", "add_figure"), Board("add_figure"), Board()
    path = shown(tmp_path, monkeypatch, images, figures, neither)
    [(name, tag, pixels, options)] = images.taken
    assert (name, tag, options) == ("add_image", "val/name", {"global_step": 0, "dataformats": "HWC"})
    assert (pixels.dtype, pixels.shape) == (np.uint8, (50, 100, 3))
    written = (255 * imread(path)).round().astype(np.uint8)
    assert np.array_equal(written[..., :3], pixels)
    assert pixels[25, 25].tolist() == [255, 0, 0]
    assert [call[:2] for call in figures.taken] == [("add_figure", "val/name")]
    assert isinstance(figures.taken[0][2], Figure)


def test_a_fault_is_one_line_that_names_the_file_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*a: Any, **k: Any) -> Figure:
        raise ValueError("two\nlines")

    with pytest.warns(UserWarning, match=r"^no picture .*a\.png, but the run goes on: ValueError: two lines$"):
        save(broken, tmp_path / "a.png", dpi=50)
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match=r"^no picture .*b\.png, but the run goes on: "):
        save(small, tmp_path / "file/b.png", dpi=50)
    logger = Board()
    logger.add_image = broken  # type: ignore[attr-defined]
    with (
        pytest.warns(UserWarning, match=r"^no picture .*val_name\.png, but the run goes on: ValueError: two lines$"),
        caplog.at_level(logging.DEBUG, "rtrl_moe_pl.training.pictures"),
    ):
        shown(tmp_path, monkeypatch, logger)
    assert "in broken" in caplog.text  # the place, for who looks for it

    def stopped() -> Figure:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(stopped, tmp_path / "c.png", dpi=50)


def test_a_title_says_how_long_was_trained_or_where_weights_come_from(tmp_path: Path) -> None:
    made, model = trainer(tmp_path), module()
    assert when(made) == "without training in this run"
    made.fit(model, datamodule=data())
    assert when(made) == "after 6 batches"
    made.save_checkpoint(tmp_path / "some.ckpt")
    options: dict[str, Any] = {"datamodule": data(), "weights_only": False}
    other = trainer(tmp_path, limit_val_batches=1)
    other.validate(model, ckpt_path=tmp_path / "some.ckpt", verbose=False, **options)
    assert when(other) == "with the weights of some.ckpt"
    resumed = trainer(tmp_path, max_steps=8)
    resumed.fit(model, ckpt_path=tmp_path / "some.ckpt", **options)
    assert when(resumed) == "after 8 batches"
