"""The package's command line in a process of its own, and what it wrote for TensorBoard."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent


class Run(NamedTuple):
    """One run: its wall time in seconds, its folder of logs, and figures as (step, value, seconds since the start)."""

    seconds: float
    folder: Path
    figures: dict[str, list[tuple[int, float, float]]]


def arguments(options: dict[str, object]) -> list[str]:
    """``--KEY VALUE`` of every option."""
    return [text for key, value in options.items() for text in (f"--{key}", str(value))]


def run(action: str, config: str, options: list[str], folder: Path | str, threads: int = 1) -> Run:
    """``python -m rtrl_moe_pl ACTION --config configs/CONFIG.yaml OPTIONS``, logged to a new version under ``folder``.

    Raises:
        RuntimeError: if it fails, with the end of what it printed.
    """
    command = [sys.executable, "-m", "rtrl_moe_pl", action, "--config", str(ROOT / "configs" / f"{config}.yaml")]
    command += ["--trainer.default_root_dir", str(folder), "--trainer.enable_progress_bar", "false", *options]
    before, begin = set(Path(folder).rglob("events.out.tfevents.*")), time.time()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    taken = time.time() - begin
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    (events,) = set(Path(folder).rglob("events.out.tfevents.*")) - before
    log = EventAccumulator(str(events), {"scalars": 0}).Reload()  # 0: all of them
    figures = {
        tag: [(event.step, event.value, event.wall_time - begin) for event in log.Scalars(tag)]
        for tag in log.Tags()["scalars"]
    }
    return Run(taken, events.parent, figures)
