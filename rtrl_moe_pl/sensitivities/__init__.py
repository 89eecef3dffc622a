"""Representations of the influence matrix P = ds/dtheta."""

from rtrl_moe_pl.sensitivities.base import Sensitivity, ZeroSensitivity
from rtrl_moe_pl.sensitivities.dense import DenseSensitivity

__all__ = ["DenseSensitivity", "Sensitivity", "ZeroSensitivity"]
