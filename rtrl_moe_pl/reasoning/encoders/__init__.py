"""Encoders: demonstrations (or a puzzle's identity) to the prefix of a recursive model."""

from rtrl_moe_pl.reasoning.encoders.base import Encoder, Encoding
from rtrl_moe_pl.reasoning.encoders.composed import (
    HybridEncoder,
    HybridVariationalEncoder,
    LPNEncoder,
    StandardEncoder,
    VariationalEncoder,
)
from rtrl_moe_pl.reasoning.encoders.embedding import PuzzleEmbedding
from rtrl_moe_pl.reasoning.encoders.iterative import IterativeEncoder
from rtrl_moe_pl.reasoning.encoders.pair_token import PairTokenEncoder

__all__ = [
    "Encoder",
    "Encoding",
    "HybridEncoder",
    "HybridVariationalEncoder",
    "IterativeEncoder",
    "LPNEncoder",
    "PairTokenEncoder",
    "PuzzleEmbedding",
    "StandardEncoder",
    "VariationalEncoder",
]
