"""What the process prints: warnings in one line, and a quiet end where nobody reads on."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def warnings_in_one_line() -> Iterator[None]:
    """Within it warnings are printed as ``warning: ..``, without the line of code they come from."""
    before = warnings.formatwarning
    warnings.formatwarning = _one_line  # what catches warnings stays as it is
    try:
        yield
    finally:
        warnings.formatwarning = before


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
