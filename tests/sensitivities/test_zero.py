"""P held at zero."""

from __future__ import annotations

import torch

from rtrl_moe_pl.linearization import WindowLinearization
from rtrl_moe_pl.sensitivities import ZeroSensitivity
from tests.sensitivities.sensitivity_case import BATCH, SHAPES, SIZE, Dense, SensitivityCase, everything


class TestZeroSensitivity(SensitivityCase):
    def make(self, batch_size: int = BATCH) -> ZeroSensitivity:
        return ZeroSensitivity(SHAPES, batch_size, SIZE, torch.float64, torch.device("cpu"))

    def truth(self, dense: Dense, linearization: WindowLinearization) -> Dense:
        return dense

    def test_holds_nothing(self) -> None:
        made = self.make()
        made.advance(everything())
        assert made.nbytes == 0
        assert made.state_dict() == {}
        assert made.vjp(torch.ones(BATCH, SIZE)) == {}
        assert not made.exact
