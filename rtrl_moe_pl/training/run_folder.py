"""The folder of a run."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only


class RunLogger(TensorBoardLogger):
    """TensorBoard, in a new folder ``version_N`` of the run's own: of two runs that begin at once, each gets another.

    Lightning's takes the number after the highest, and makes the folder later: two runs would write into one.
    """

    def _get_next_version(self) -> int:
        while True:
            number = super()._get_next_version()
            if rank_zero_only.rank != 0 or "://" in str(self.root_dir):
                return number
            try:
                (Path(self.root_dir) / f"version_{number}").mkdir(parents=True)
            except FileExistsError:
                continue
            return number

    @rank_zero_only
    def save(self) -> None:
        if self.hparams:  # else an empty hparams.yaml, beside config.yaml, which has them all
            super().save()
