"""The folder of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only


class RunLogger(TensorBoardLogger):
    """TensorBoard, in a new folder ``version_N`` of the run's own: of two runs that begin at once, each gets another.

    Lightning's takes the number after the highest, and makes the folder later: two runs would write into one.

    Attributes:
        made: the folders above it that were not there, from within.
    """

    made: Sequence[Path] = ()

    def _get_next_version(self) -> int:
        while True:
            number = super()._get_next_version()
            if rank_zero_only.rank != 0 or "://" in str(self.root_dir):
                return number
            root = Path(self.root_dir)
            self.made = self.made or [path for path in (root, *root.parents) if not path.exists()]
            try:
                (root / f"version_{number}").mkdir(parents=True)
            except FileExistsError:
                continue
            return number

    @rank_zero_only
    def save(self) -> None:
        if self.hparams:  # else an empty hparams.yaml, beside config.yaml, which has them all
            super().save()
        else:
            self.experiment.flush()
