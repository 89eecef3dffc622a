"""Configurations that a run writes."""

from __future__ import annotations

from pathlib import Path

import torch

from rtrl_moe_pl.cli import main
from rtrl_moe_pl.training.checkpoints import newest_readable
from tests.test_cli import here, run  # noqa: F401

TIMER = '[{"class_path": "Timer", "init_args": {"duration": "00:00:10:00"}}]'


def test_a_default_that_is_a_string_of_its_own_class_is_saved_and_read_again(here: Path) -> None:  # noqa: F811
    """Lightning's Timer has one, of an Enum."""
    assert run("fit", "--trainer.callbacks", TIMER, "--trainer.max_steps", "1") == 0
    saved = here / "lightning_logs" / "version_0" / "config.yaml"
    assert "interval: step\n" in saved.read_text()
    assert "interval: step\n" in torch.load(newest_readable(here))["rtrl_moe_pl_config"]
    assert main(["fit", "--config", str(saved)]) == 0
    assert (here / "lightning_logs" / "version_1" / "config.yaml").read_text() == saved.read_text()
