"""Counter-based random numbers: pure functions of (seed, counters), identical on every device."""

from rtrl_moe_pl.randomness.counter import bits, integers, normal, uniform

__all__ = ["bits", "integers", "normal", "uniform"]
