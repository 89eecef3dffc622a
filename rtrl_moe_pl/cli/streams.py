"""What the process prints: warnings and a full disk in one line, and a quiet end where nobody reads on."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def warnings_in_one_line() -> Iterator[None]:
    """Within it warnings are printed as ``warning: ..``, without the line of code they come from."""
    before = warnings.formatwarning
    warnings.formatwarning = _one_line  # what catches warnings stays as it is
    try:
        yield
    finally:
        warnings.formatwarning = before


@contextlib.contextmanager
def full_disk_in_one_line(debug: bool = False) -> Iterator[None]:
    """Within it a thread that finds the disk full (TensorBoard's, which writes events) prints no traceback.

    Its error is raised where its writer is used next; if nowhere, there is a warning at the end.

    Args:
        debug: print the traceback.

    Raises:
        OSError: for a full disk that no other words were found for.
    """
    before, found = threading.excepthook, []

    def hook(arguments: threading.ExceptHookArgs) -> None:
        full = _of_full_disk(arguments.exc_value)
        if full is not None:
            found.append(full)
        if full is None or debug:
            before(arguments)

    threading.excepthook = hook
    try:
        yield
    except Exception as error:
        # Lightning's logger has words of its own for any error
        full = _of_full_disk(error if isinstance(error, OSError) else error.__cause__)
        if full is None:
            raise
        raise OSError(_in_words(full)) from error
    else:
        for full in found:
            warnings.warn(_in_words(full), stacklevel=2)
    finally:
        threading.excepthook = before


def _of_full_disk(error: BaseException | None) -> OSError | None:
    return error if isinstance(error, OSError) and error.errno in FULL else None


def _in_words(full: OSError) -> str:
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(full.__traceback__)]
    log = any(name.startswith("tensorboard.") for name in modules)
    what = full.filename or ("TensorBoard's events" if log else "a file")
    return f"cannot write {what}: {full.strerror}: make room and go on with --ckpt_path last"


def without_tips() -> None:
    """Lightning recommends another product in every run; nobody who reads a run's messages asked for it."""
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    if _is_no_tip not in log.filters:
        log.addFilter(_is_no_tip)


def _is_no_tip(record: logging.LogRecord) -> bool:
    return "litlogger" not in record.getMessage()


def _one_line(message: Warning | str, *place: Any) -> str:
    return f"warning: {' '.join(str(message).split())}\n"


def printed(text: str = "") -> bool:
    """Print the text and what was not yet printed; False if nobody reads it.

    If nobody does (``.. | head``), the rest goes nowhere, without a word.
    """
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return False
    return True
