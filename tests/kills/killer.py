"""Run by test_kills: trains without a break, then again with a SIGKILL at every point asked for, each time resumed.

Usage: killer.py CONFIG FOLDER POINT..., where a POINT is PLACE:N, the N-th time (from 1) that a run comes to a place
of PLACES, or time:F, the fraction F of the time of the unbroken run. After spoiled:PLACE:N the carry is lost before
the run is resumed, which has to show. Prints one line of JSON per point.

Every run is a fork of this process, which has imported what takes seconds and started no thread.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import rtrl_moe_pl.modules.base
from rtrl_moe_pl.cli import main
from rtrl_moe_pl.modules import ManualModule
from rtrl_moe_pl.training.checkpoints import PER_RANK, newest_readable, require_readable
from rtrl_moe_pl.training.last_checkpoint import LastCheckpoint
from tests.nested import differing

COMPARED = ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers", "global_step", PER_RANK)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def write_half_and_die(checkpoint: Any, file: Any) -> None:
    whole = io.BytesIO()
    save(checkpoint, whole)
    file.write(whole.getvalue()[: whole.tell() // 2])
    file.flush()
    die()


# Place: what is replaced, and whether the run dies before it or after it.
save = torch.save
PLACES: dict[str, tuple[Any, str, str]] = {
    "writing": (torch, "save", "half"),
    "flushing": (os, "fsync", "before"),
    "renaming": (Path, "replace", "before"),
    "linking": (LastCheckpoint, "_link_checkpoint", "before"),
    "rotating": (ModelCheckpoint, "_remove_checkpoint", "before"),
    "updated": (rtrl_moe_pl.modules.base, "update", "after"),
    "validating": (ManualModule, "on_validation_start", "after"),
    "epoch": (ManualModule, "on_train_epoch_start", "before"),
}


def lay(place: str, count: int) -> None:
    """Make this process die at a place."""
    owner, name, when = PLACES[place]
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def deadly(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count and when == "half":
            write_half_and_die(*args)
        if calls == count and when == "before":
            die()
        result = original(*args, **kwargs)
        if calls == count:
            die()
        return result

    setattr(owner, name, staticmethod(deadly) if isinstance(vars(owner).get(name), staticmethod) else deadly)


def start(config: str, folder: Path, point: str | None = None, resume: bool = False) -> int:
    """Fork a run; its process."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    log = os.open(folder.with_name(f"{folder.name}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    status = 70
    try:
        if point is not None and not point.startswith("time:"):
            place, count = point.split(":")
            lay(place, int(count))
        options = ["--ckpt_path", "last"] if resume else []
        status = main(["fit", "--config", config, "--trainer.default_root_dir", str(folder), *options])
    finally:
        sys.stdout.flush()
        os._exit(status)


def wait(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def final(folder: Path) -> dict[str, Any]:
    """What the newest checkpoint holds of the training, and of what was watched; all but the time it took."""
    checkpoint = torch.load(newest_readable(folder), weights_only=True)
    del checkpoint[PER_RANK]["figures"]["seconds"]
    watches = {name: state for name, state in checkpoint["callbacks"].items() if "Watch" in name}
    for state in watches.values():
        if "influence" in state.get("_sizes", {}):  # of experts: added up in another order
            del state["_sizes"]["influence"]
    assert watches
    return {key: checkpoint[key] for key in COMPARED if key in checkpoint} | {"watches": watches}


def spoil(path: Path) -> None:
    """Take the carry out of a checkpoint."""
    checkpoint = torch.load(path, weights_only=True)
    checkpoint[PER_RANK]["carry"] = None
    torch.save(checkpoint, path)


def kill_and_resume(config: str, folder: Path, named: str, seconds: float, expected: dict[str, Any]) -> dict[str, Any]:
    point = named.removeprefix("spoiled:")
    place, at = point.split(":")
    killed = False
    while not killed:
        process = start(config, folder, point)
        if place == "time":
            time.sleep(float(at) * seconds)
            os.kill(process, signal.SIGKILL)
        killed = wait(process) == -signal.SIGKILL
        if place != "time":
            break
        if not killed:  # it was faster than the unbroken one: again, and earlier
            shutil.rmtree(folder)
            seconds /= 2
    written = sorted(folder.rglob("*.ckpt"))
    for path in written:
        require_readable(path)  # none is half-written under its final name
    resumed = bool(written)
    if point != named:
        spoil(newest_readable(folder))
    status = wait(start(config, folder, resume=resumed))
    found = differing(expected, final(folder)) if status == 0 else [f"the resumed run ended with {status}"]
    return {"point": named, "killed": killed, "resumed": resumed, "differing": found}


def run(config: str, folder: Path, points: list[str]) -> None:
    began = time.monotonic()
    assert wait(start(config, folder / "unbroken")) == 0, (folder / "unbroken.log").read_text()
    seconds = time.monotonic() - began
    expected = final(folder / "unbroken")
    for number, point in enumerate(points):
        print(json.dumps(kill_and_resume(config, folder / f"killed_{number}", point, seconds, expected)), flush=True)


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
