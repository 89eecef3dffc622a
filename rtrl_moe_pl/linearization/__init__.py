"""Derivatives of a window of any cell, in the factors that an influence matrix can be advanced by."""

from rtrl_moe_pl.linearization.experts import ExpertTerm, Uses
from rtrl_moe_pl.linearization.linearizer import Linearizer, refuse_batch_norm
from rtrl_moe_pl.linearization.pending import multiply_out, pull_back
from rtrl_moe_pl.linearization.routed_linearizer import RoutedLinearizer
from rtrl_moe_pl.linearization.tail import Steps, Tail
from rtrl_moe_pl.linearization.window import Block, DenseTerm, IndexTerm, Member, OuterTerm, Term, WindowLinearization

__all__ = [
    "Block",
    "DenseTerm",
    "ExpertTerm",
    "IndexTerm",
    "Linearizer",
    "Member",
    "OuterTerm",
    "RoutedLinearizer",
    "Steps",
    "Tail",
    "Term",
    "Uses",
    "WindowLinearization",
    "multiply_out",
    "pull_back",
    "refuse_batch_norm",
]
