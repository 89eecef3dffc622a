"""Checkpoints on disk: which is the newest that can be read, and where new ones go."""

from __future__ import annotations

import pickle
import tempfile
import zipfile
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_warn


def require_readable(path: Path, option: str = "--ckpt_path") -> None:
    """Raise ValueError or FileNotFoundError, in one line, unless the file is a complete Lightning checkpoint."""
    if not path.is_file():
        raise FileNotFoundError(f"{option}: there is no file {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        damaged = None if zipfile.ZipFile(path).testzip() is None else "its checksum is wrong"
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise ValueError(f"{option}: {path} is truncated or corrupt ({type(error).__name__})") from error
    if damaged is None and not (isinstance(checkpoint, dict) and "state_dict" in checkpoint):
        damaged = "it holds no state_dict"
    if damaged:
        raise ValueError(f"{option}: {path} is truncated or corrupt ({damaged})")


def newest_readable(folder: Path) -> Path:
    """The newest complete checkpoint below a folder; a warning names damaged ones that are newer.

    Raises:
        FileNotFoundError: if there is none: training never restarts from scratch in silence.
    """
    found = sorted(folder.glob("**/*.ckpt"), key=lambda path: path.stat().st_mtime, reverse=True)
    faults: list[str] = []
    for path in found:
        try:
            require_readable(path)
        except ValueError as fault:
            faults.append(str(fault))
            continue
        for fault in faults:
            rank_zero_warn(f"{fault}: passed over, an older one is taken")
        return path
    raise FileNotFoundError(
        f"--ckpt_path last: no complete checkpoint below {folder} ({len(found)} damaged); "
        "set trainer.default_root_dir to where the run was written, or leave out --ckpt_path"
    )


def require_writable(folder: Path) -> None:
    """Raise OSError, in one line, unless files can be made in the folder (which is made if it is missing)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"trainer.default_root_dir: cannot write to {folder} ({error.strerror}): choose another"
        ) from error
