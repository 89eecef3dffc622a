"""The update, optimizers, schedules, averaging and callbacks: what does not depend on what is trained."""

from rtrl_moe_pl.training.averaging import EMA
from rtrl_moe_pl.training.failure import NumericalFailure
from rtrl_moe_pl.training.freezing import Freeze
from rtrl_moe_pl.training.optimizers import AdamATan2, CombinedOptimizer, SignSGD
from rtrl_moe_pl.training.schedules import Warmup
from rtrl_moe_pl.training.update import GradientSums, UpdateResult, sum_over_ranks, update

__all__ = [
    "EMA",
    "AdamATan2",
    "CombinedOptimizer",
    "Freeze",
    "GradientSums",
    "NumericalFailure",
    "SignSGD",
    "UpdateResult",
    "Warmup",
    "sum_over_ranks",
    "update",
]
