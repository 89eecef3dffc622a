"""Recurrent cells: one step of a network on a flat state, ``cell(x [B, D], s [B, S]) -> [B, S]``."""

from rtrl_moe_pl.cells.adapters import TorchCell
from rtrl_moe_pl.cells.base import Cell
from rtrl_moe_pl.cells.experts import expert_linear
from rtrl_moe_pl.cells.gru import GRU
from rtrl_moe_pl.cells.integrator import LeakyIntegrator
from rtrl_moe_pl.cells.lstm import LSTM
from rtrl_moe_pl.cells.recurrent_moe import RecurrentMoE
from rtrl_moe_pl.cells.routed import RoutedCell, Routing
from rtrl_moe_pl.cells.simple import SimpleRNN
from rtrl_moe_pl.cells.stack import Stack
from rtrl_moe_pl.cells.vanilla import VanillaRNN

__all__ = [
    "GRU",
    "LSTM",
    "Cell",
    "LeakyIntegrator",
    "RecurrentMoE",
    "RoutedCell",
    "Routing",
    "SimpleRNN",
    "Stack",
    "TorchCell",
    "VanillaRNN",
    "expert_linear",
]
