"""Controls that must fail: algorithms that do all that exact ones do, but for the influence they carry."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rtrl_moe_pl.gradients import RTRL, LazyExpertRTRL
from rtrl_moe_pl.sensitivities import Sensitivity, ZeroSensitivity


class RTRLWithoutInfluence(RTRL):
    """RTRL whose influence is held at zero."""

    exact = carries_influence = False

    def __init__(self, window: int) -> None:
        super().__init__(window, chunk=window)  # a longer chunk would see beyond the window without P

    def _sensitivity(self, cell: nn.Module, shapes: dict[str, torch.Size], state: Tensor) -> Sensitivity:
        return ZeroSensitivity(shapes, state.shape[0], state.shape[1], state.dtype, state.device)


class LazyExpertRTRLWithoutInfluence(RTRLWithoutInfluence, LazyExpertRTRL):
    """LazyExpertRTRL whose influence is held at zero."""
