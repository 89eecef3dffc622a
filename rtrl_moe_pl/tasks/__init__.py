"""Tasks: sequences of tokens with labels, as pure functions of (seed, index)."""

from rtrl_moe_pl.tasks.anbn import AnBn
from rtrl_moe_pl.tasks.base import Sequences, Steps, Task
from rtrl_moe_pl.tasks.delayed_copy import DelayedCopy
from rtrl_moe_pl.tasks.delayed_recall import DelayedRecall
from rtrl_moe_pl.tasks.haystack import Haystack

__all__ = ["AnBn", "DelayedCopy", "DelayedRecall", "Haystack", "Sequences", "Steps", "Task"]
