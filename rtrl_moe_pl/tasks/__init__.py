"""Tasks: sequences of tokens with labels, as pure functions of (seed, index)."""

from rtrl_moe_pl.tasks.anbn import AnBn
from rtrl_moe_pl.tasks.base import Sequences, Steps, Task
from rtrl_moe_pl.tasks.delayed_recall import DelayedRecall

__all__ = ["AnBn", "DelayedRecall", "Sequences", "Steps", "Task"]
