"""Gradient algorithms for recurrent networks, usable without Lightning."""

from rtrl_moe_pl.gradients.base import GradientAlgorithm, WindowResult
from rtrl_moe_pl.gradients.memory import Forecast, Memory, MemoryForecastError
from rtrl_moe_pl.gradients.reverse import BPTT, TBPTT
from rtrl_moe_pl.gradients.rtrl import RTRL
from rtrl_moe_pl.gradients.sequence import SequenceResult, sequence_gradient

__all__ = [
    "BPTT",
    "RTRL",
    "TBPTT",
    "Forecast",
    "GradientAlgorithm",
    "Memory",
    "MemoryForecastError",
    "SequenceResult",
    "WindowResult",
    "sequence_gradient",
]
