"""Recursive reasoning: a small network that rewrites its answer, encoders of demonstrations, halting and losses."""

from rtrl_moe_pl.reasoning.carry import Carry, Halting
from rtrl_moe_pl.reasoning.encoders import Encoder, Encoding, PairTokenEncoder, PuzzleEmbedding
from rtrl_moe_pl.reasoning.etrm import Thoughts, supervise, think
from rtrl_moe_pl.reasoning.losses import ReasoningLoss
from rtrl_moe_pl.reasoning.trm import TRM

__all__ = [
    "TRM",
    "Carry",
    "Encoder",
    "Encoding",
    "Halting",
    "PairTokenEncoder",
    "PuzzleEmbedding",
    "ReasoningLoss",
    "Thoughts",
    "supervise",
    "think",
]
