"""Gradient algorithms for recurrent networks, usable without Lightning."""

from rtrl_moe_pl.gradients.audit import (
    AuditReport,
    Comparison,
    ParameterAudit,
    audit_gradient,
    compare_gradients,
    parameter_paths,
)
from rtrl_moe_pl.gradients.base import GradientAlgorithm, WindowResult
from rtrl_moe_pl.gradients.graph_memory import graph_bytes
from rtrl_moe_pl.gradients.memory import Forecast, Memory, MemoryForecastError
from rtrl_moe_pl.gradients.reverse import BPTT, TBPTT
from rtrl_moe_pl.gradients.routed import BlockRTRL, LazyExpertRTRL
from rtrl_moe_pl.gradients.rtrl import RTRL
from rtrl_moe_pl.gradients.sequence import SequenceResult, sequence_gradient

__all__ = [
    "BPTT",
    "RTRL",
    "TBPTT",
    "AuditReport",
    "BlockRTRL",
    "Comparison",
    "Forecast",
    "GradientAlgorithm",
    "LazyExpertRTRL",
    "Memory",
    "MemoryForecastError",
    "ParameterAudit",
    "SequenceResult",
    "WindowResult",
    "audit_gradient",
    "compare_gradients",
    "graph_bytes",
    "parameter_paths",
    "sequence_gradient",
]
