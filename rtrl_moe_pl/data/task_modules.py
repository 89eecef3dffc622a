"""One DataModule per task: the task's options, flat, beside those of every DataModule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

from rtrl_moe_pl.data.curriculum import CurriculumDataModule
from rtrl_moe_pl.data.module import SequenceDataModule
from rtrl_moe_pl.tasks import AnBn, DelayedCopy, DelayedRecall, Haystack


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


class DelayedCopyDataModule(SequenceDataModule):
    """Uniform tokens are said again some steps later. See `rtrl_moe_pl.tasks.DelayedCopy`.

    Args:
        symbols: number of tokens, at least 2; chance is 1 / symbols.
        delay: in steps, at least 1.
        length: steps of every sequence, more than ``delay``.
        **options: those of `SequenceDataModule`.
    """

    def __init__(self, symbols: int = 4, delay: int = 1, length: int = 400, **options: Any) -> None:
        super().__init__(DelayedCopy(symbols, delay, length), **options)


class HaystackDataModule(CurriculumDataModule):
    """A value named by a key, hidden in noise, is asked for at the end. See `rtrl_moe_pl.tasks.Haystack`.

    With a curriculum, training begins with shorter sequences. The least gap is the same at every length: what holds
    for it, say that every gap is above twice the window, holds from the first step of training to the last.

    Args:
        length: steps of every sequence; with a curriculum, that of its last stage, of test and of prediction.
        values: number of values, at least 2; chance is 1 / values.
        needles: number of key-value pairs that may be asked for, at least 1.
        distractors: number of key-value pairs that are never asked for.
        min_gap: least distance from a needle's value to the question, in steps, at least 2.
        insert_from: where the part of the allowed places that is used begins: 0 is the first place.
        insert_to: where it ends: 1 is the last place.
        curriculum: lengths to train at before ``length``, increasing; see `CurriculumDataModule`.
        promote_at: validation accuracy at which a length is left for the next, above 0 and at most 1.
        **options: those of `SequenceDataModule`.
    """

    def __init__(
        self,
        length: int = 64,
        values: int = 4,
        needles: int = 1,
        distractors: int = 0,
        min_gap: int = 33,
        insert_from: float = 0.0,
        insert_to: float = 1.0,
        curriculum: Sequence[int] | None = None,
        promote_at: float = 0.99,
        **options: Any,
    ) -> None:
        lengths = [*(curriculum or ()), length]
        if any(shorter >= longer for shorter, longer in pairwise(lengths)):
            raise ValueError(f"curriculum must be increasing lengths, all below length={length}, got {lengths[:-1]}")
        last = Haystack(length, values, needles, distractors, min_gap, insert_from, insert_to)
        try:
            tasks = [replace(last, length=steps) for steps in lengths]
        except ValueError as error:
            raise ValueError(f"curriculum {lengths[:-1]}: {error}") from None
        super().__init__(tasks, promote_at, **options)
