"""One DataModule per task: the task's options, flat, beside those of every DataModule."""

from __future__ import annotations

from typing import Any, Literal

from rtrl_moe_pl.data.module import SequenceDataModule
from rtrl_moe_pl.tasks import AnBn, DelayedRecall


class AnBnDataModule(SequenceDataModule):
    """a^n b^n: does the number of a's equal the number of b's? See `rtrl_moe_pl.tasks.AnBn`.

    Args:
        n_min: smallest n, at least 2 (at least 1 with the predecessor's negatives).
        n_max: largest n.
        task_layout: "compact": tokens a..a b..b Q. "predecessor": a..a b..b PAD..PAD Q, all of one length.
        negatives: "balanced": of the same lengths as the positives. "predecessor": lengths tell the class.
        length: the one length of the predecessor's layout, at least 2 n_max + 1, which is the default.
        **options: those of `SequenceDataModule`.
    """

    def __init__(
        self,
        n_min: int = 2,
        n_max: int = 16,
        task_layout: Literal["compact", "predecessor"] = "compact",
        negatives: Literal["balanced", "predecessor"] = "balanced",
        length: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(AnBn(n_min, n_max, task_layout, negatives, length), **options)


class DelayedRecallDataModule(SequenceDataModule):
    """A value shown once is asked for after a gap. See `rtrl_moe_pl.tasks.DelayedRecall`.

    Args:
        values: number of values, at least 2; chance is 1 / values.
        noise_tokens: number of different tokens in the gap, drawn uniformly; 1 is a blank gap.
        min_gap: least number of steps strictly between value and query.
        max_gap: largest gap; gaps are uniform between the two.
        **options: those of `SequenceDataModule`.
    """

    def __init__(
        self, values: int = 4, noise_tokens: int = 4, min_gap: int = 20, max_gap: int = 40, **options: Any
    ) -> None:
        super().__init__(DelayedRecall(values, noise_tokens, min_gap, max_gap), **options)
