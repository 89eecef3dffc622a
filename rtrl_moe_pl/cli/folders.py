"""What a run that is refused leaves behind: nothing."""

from __future__ import annotations

import contextlib
from pathlib import Path

from lightning.pytorch import Trainer

from rtrl_moe_pl.training.run_folder import RunLogger

_EVENTS = "events.out.tfevents.*"  # opened by a logger before anything else is done
_OF_EVERY_RUN = ("config.yaml", "hparams.yaml", "metrics.csv", _EVENTS)


def is_fresh(folder: Path) -> bool:
    """Whether the folder of a run's logs holds nothing but the one file that its logger has opened."""
    found = list(folder.iterdir()) if folder.is_dir() else []
    return len(found) <= 1 and all(path.match(_EVENTS) for path in found)


def discard_unused(folder: Path, trainer: Trainer, own: bool) -> None:
    """Remove the folder of a run's logs if it has nothing but what is written before a run begins.

    And those above it that were made for it, if nothing else is in them.

    Args:
        folder: of the logs.
        trainer: whose loggers are closed before, so that they write no more.
        own: whether all that is in it is known to be of this run.
    """
    own = own or is_fresh(folder)
    for logger in trainer.loggers:
        logger.finalize("failed")
    if not (own and folder.is_dir()):
        return
    files = list(folder.iterdir())
    if all(path.is_file() and any(map(path.match, _OF_EVERY_RUN)) for path in files):
        for path in files:
            path.unlink()
        folder.rmdir()
        for above in [path for logger in trainer.loggers if isinstance(logger, RunLogger) for path in logger.made]:
            with contextlib.suppress(OSError):  # another run has begun in it
                above.rmdir()
