"""Representations of the influence matrix P = ds/dtheta."""

from rtrl_moe_pl.sensitivities.base import Sensitivity, ZeroSensitivity
from rtrl_moe_pl.sensitivities.block_sparse import BlockSparseSensitivity
from rtrl_moe_pl.sensitivities.dense import DenseSensitivity
from rtrl_moe_pl.sensitivities.lazy_experts import LazyExpertSensitivity
from rtrl_moe_pl.sensitivities.segment_tree import CircularSegmentTree

__all__ = [
    "BlockSparseSensitivity",
    "CircularSegmentTree",
    "DenseSensitivity",
    "LazyExpertSensitivity",
    "Sensitivity",
    "ZeroSensitivity",
]
