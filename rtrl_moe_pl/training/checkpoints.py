"""Checkpoints on disk: how they are written, which is the newest that can be read, and where new ones go."""

from __future__ import annotations

import contextlib
import os
import pickle
import tempfile
import time
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn

# What a checkpoint holds besides what is equal on all ranks: the carry of a module (see modules.base).
PER_RANK = "rtrl_moe_pl_per_rank"
SAVED_AT = "rtrl_moe_pl_saved_at"  # seconds since 1970: a copied or touched file has another time than its own
MISSING = "does not exist"
WEIGHTS = ("state_dict",)
WHOLE = (*WEIGHTS, "pytorch-lightning_version")  # what Lightning needs


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under another name, flushes it to the disk, and renames it.

    Under its own name there is a whole checkpoint or none, whenever the process or the machine dies. Paths with a
    scheme (``s3://..``) are left to Lightning.

    Raises:
        OSError: if it cannot be written: one line; an earlier one of that name stays as it is.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        place = Path(path)
        unfinished = place.with_name(f".{place.name}.{os.getpid()}.unfinished")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with unfinished.open("wb") as file:
                torch.save({**checkpoint, SAVED_AT: time.time()}, file)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(place)
            flush_folder(place.parent)
        except (OSError, RuntimeError) as error:  # torch's writer has errors of its own
            raise OSError(
                f"cannot write the checkpoint {place}: {getattr(error, 'strerror', None) or error}; earlier "
                "checkpoints are untouched: make room and go on with --ckpt_path last"
            ) from error
        finally:
            with contextlib.suppress(OSError):  # there is none, or no folder for it
                unfinished.unlink()


def flush_folder(folder: Path) -> None:
    """Make a rename in a folder outlast a failure of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def require_readable(path: Path, option: str = "--ckpt_path") -> None:
    """Raise ValueError or FileNotFoundError, in one line, unless the file is a whole Lightning checkpoint
    (of another option than --ckpt_path: unless it holds a state_dict).

    Of several processes' checkpoint, their shards too. Cost: it is read once, for its checksums.
    """
    if path.is_dir():
        raise ValueError(f"{option}: {path} is a folder: give a checkpoint, or last for the newest one")
    needed = WHOLE if option == "--ckpt_path" else WEIGHTS
    fault = _fault(path, needed)
    if fault is None:
        return
    if fault == MISSING:
        newest = ": name one, or give last for the newest" if option == "--ckpt_path" else ""
        raise FileNotFoundError(f"{option}: there is no file {path}{newest}")
    others = (other for other in _newest_first(path.parent.glob("*.ckpt")) if _fault(other, needed) is None)
    whole = next(others, None)
    raise ValueError(f"{option}: {path} {fault}" + (f"; the newest whole one beside it is {whole}" if whole else ""))


def newest_readable(folder: Path, resumable: bool = False) -> Path:
    """The newest whole checkpoint below a folder; a warning names damaged ones that are newer.

    Args:
        folder: where to look, at any depth.
        resumable: leave out those of weights alone.

    Raises:
        FileNotFoundError: if there is none: training never restarts from scratch in silence.
    """
    found = [path for path in _newest_first(folder.glob("**/*.ckpt")) if not path.is_symlink()]
    needed = (*WHOLE, "optimizer_states") if resumable else WHOLE
    faults: list[str] = []
    for path in found:
        fault = _fault(path, needed)
        if fault is None:
            for passed in faults:
                rank_zero_warn(f"--ckpt_path last: {passed}: passed over, an older one is taken")
            return path
        faults.append(f"{path} {fault}")
    passed = f" ({faults[0]}{f', and {len(faults) - 1} more' if len(faults) > 1 else ''})" if faults else ""
    raise FileNotFoundError(
        f"--ckpt_path last: no complete checkpoint below {folder}{passed}; "
        "set trainer.default_root_dir to where the run was written, or leave out --ckpt_path"
    )


def _newest_first(paths: Iterable[Path]) -> list[Path]:
    """By the time of saving; of the same time, by name."""
    present = [path for path in paths if path.exists()]  # a running training removes old ones
    return sorted(present, key=lambda path: (_saved_at(path), path.name), reverse=True)


def _saved_at(path: Path) -> float:
    """What the file says, or else its time."""
    held: Any = None
    with contextlib.suppress(Exception):  # what is wrong with it is said when it is read
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if isinstance(held, dict) and SAVED_AT in held:
        return held[SAVED_AT]
    with contextlib.suppress(OSError):  # it has gone since
        return path.stat().st_mtime
    return 0.0


def _fault(path: Path, needed: Sequence[str]) -> str | None:
    """What is wrong with a checkpoint that has to hold something, beginning with a verb; None if nothing is."""
    if not path.is_file():
        return MISSING
    checkpoint = _read(path)
    if isinstance(checkpoint, str):
        return checkpoint
    held = checkpoint if isinstance(checkpoint, dict) else {}
    missing = [key for key in needed if held.get(key) is None]
    if missing:
        return f"is no checkpoint of a training: it holds no {missing[0]}"
    for rank in range(1, checkpoint.get(PER_RANK, {}).get("world_size", 1)):
        shard = shard_of(path, rank)
        part = _read(shard) if shard.is_file() else MISSING
        if isinstance(part, str):
            return f"is incomplete: its shard {shard.name} {part}"
        if any(part.get(PER_RANK, {}).get(key) != checkpoint[PER_RANK].get(key) for key in ("global_step", "batches")):
            return f"is incomplete: its shard {shard.name} is of another step or batch"
    return None


def _read(path: Path) -> Any:
    """What a file of torch holds; in words, what is wrong with it."""
    try:
        with path.open("rb") as file:
            begins = file.read(2)
        if begins != b"PK":  # as every archive of torch.save, also one that is cut short
            return "is no checkpoint of a training: torch.save has not written it" if begins else "is an empty file"
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        damaged = None if zipfile.ZipFile(path).testzip() is None else "its checksum is wrong"
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        damaged = type(error).__name__
        checkpoint = None
    return checkpoint if damaged is None else f"is truncated or corrupt ({damaged})"


def shard_of(path: str | Path, rank: int) -> Path:
    """Where the part of a checkpoint lies that only one rank r > 0 has; of a link, beside what it points to."""
    whole = os.path.realpath(path)
    return Path(f"{whole}.rank{rank}")


def require_writable(folder: Path) -> None:
    """Raise OSError, in one line, unless files can be made in the folder, or where it is to be made."""
    try:
        place = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise OSError(
            f"trainer.default_root_dir: cannot write to {folder} ({error.strerror}): choose another"
        ) from error
