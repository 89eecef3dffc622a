"""What every module shares while it trains: the update, numerical failure, checkpoints, processes."""

from rtrl_moe_pl.training.failure import NumericalFailure
from rtrl_moe_pl.training.update import GradientSums, UpdateResult, update

__all__ = ["GradientSums", "NumericalFailure", "UpdateResult", "update"]
