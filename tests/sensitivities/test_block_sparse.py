"""The influence matrix by slots: in full, and in the rows that a window wrote."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from rtrl_moe_pl.linearization import Block, WindowLinearization
from rtrl_moe_pl.sensitivities import BlockSparseSensitivity
from tests.sensitivities.sensitivity_case import (
    BATCH,
    SHAPES,
    SIZE,
    Dense,
    SensitivityCase,
    advanced,
    assert_same,
    everything,
    random,
)


class TestBlockSparseSensitivity(SensitivityCase):
    def make(self, batch_size: int = BATCH) -> BlockSparseSensitivity:
        return BlockSparseSensitivity(SHAPES, batch_size, SIZE, torch.float64, torch.device("cpu"), slot_size=2)

    def truth(self, dense: Dense, linearization: WindowLinearization) -> Dense:
        return advanced(dense, linearization)

    def test_other_batch_is_refused(self) -> None:
        with pytest.raises(ValueError, match="batch size must stay the same"):
            self.make(BATCH + 1).advance(everything())


def by_rows(whole: WindowLinearization, written: torch.Tensor) -> WindowLinearization:
    """A window that wrote one of the two slots of each lane, [B]."""
    ends = written[:, None]
    rows = (2 * ends + torch.arange(2)).sort(1)[0]  # [B, 2] numbers of the state
    index = rows[:, None].expand(-1, SIZE, -1)
    terms: dict[Block, list[Any]] = {}
    for block, found in whole.terms.items():
        terms[block] = []
        for term in found:
            part: Any = copy.copy(term)
            for name in ("cotangents", "jacobian"):
                value = getattr(term, name, None)
                if name == "cotangents" and value is not None:
                    where = rows[None, :, None].expand(*value.values.shape[:3], -1)
                    part.cotangents = type(value)(value.values.gather(3, where), value.loss)
                elif value is not None:
                    part.jacobian = value.gather(3, rows[:, None, None].expand(*value.shape[:3], -1))
            terms[block].append(part)
    return replace(whole, transition=whole.transition.gather(2, index), terms=terms, ends=ends)


def test_rows_that_were_not_written_stay() -> None:
    torch.manual_seed(0)
    made = TestBlockSparseSensitivity().make()
    made.advance(everything())
    before = made.to_dense()
    whole = everything()
    written = torch.tensor([0, 1, 0])
    made.advance(by_rows(whole, written))
    full = advanced(before, whole)
    expected = {}
    for name, old in before.items():
        slots = torch.zeros(BATCH, 2, dtype=torch.bool).scatter(1, written[:, None], True)
        mask = slots.repeat_interleave(2, 1).view(BATCH, SIZE, *(1,) * (old.ndim - 2))
        expected[name] = torch.where(mask, full[name], old)
    assert_same(made.to_dense(), expected)
    assert (expected["weight"] - full["weight"]).norm() > 0.1  # control: the others would have changed


def test_sources_leave_out_zeros() -> None:
    """Rows of J known to be zero are not read: what P has there does not matter."""
    torch.manual_seed(0)
    made = TestBlockSparseSensitivity().make()
    made.advance(everything())
    window = everything()
    window.transition[:, :2] = 0.0
    other = TestBlockSparseSensitivity().make()
    other.load_state_dict(made.state_dict())
    made.advance(window)
    other.advance(replace(window, sources=torch.ones(BATCH, 1, dtype=torch.long)))
    assert_same(other.to_dense(), made.to_dense())
    cotangent = random(BATCH, SIZE)
    assert_same(other.vjp(cotangent), made.vjp(cotangent))
