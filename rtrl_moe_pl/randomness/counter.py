"""Draws that depend on (seed, counters) alone, never on a generator's state, the batch or the device.

A draw is a chain of SplitMix64 steps, one per counter: with h_0 = mix(seed), counter c takes h to
mix(h + (c + 1) * gamma), the (c+1)-th output of the SplitMix64 generator in state h. Every operation is
64-bit integer arithmetic modulo 2^64, so that CPU and GPU agree bit for bit.

References: Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators", OOPSLA (variant 13 of
Stafford's mixers, as published with Java's SplittableRandom and in Vigna's splitmix64.c).
"""

from functools import lru_cache

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """The int64 with the same 64 bits as `value` modulo 2^64."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = _signed(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = _signed(0x94D049BB133111EB)
_MAX_SPAN = 1 << 31  # products of 32 random bits and a span must stay below 2^63


def _shift_right(z: Tensor, count: int) -> Tensor:
    """Logical right shift; torch's own shift of an int64 copies the sign bit."""
    return (z >> count).bitwise_and_((1 << (64 - count)) - 1)


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's output function, a bijection of 64-bit words. Overwrites `z`."""
    z = z.bitwise_xor_(_shift_right(z, 30)).mul_(_MULTIPLIER_1)
    z = z.bitwise_xor_(_shift_right(z, 27)).mul_(_MULTIPLIER_2)
    return z.bitwise_xor_(_shift_right(z, 31))


def _absorb(h: Tensor | int, counter: Tensor | int) -> Tensor:
    z = (torch.as_tensor(counter, dtype=torch.int64) + 1) * _GAMMA + h
    return _mix(z)


@lru_cache(maxsize=4096)
def _hash_constants(seed: int, counters: tuple[int, ...]) -> int:
    """The chain over a seed and plain integers. Cached: they are the same in every call of a task."""
    h = _mix(torch.tensor(_signed(seed)))
    for counter in counters:
        h = _absorb(h, _signed(counter))
    return int(h)


def bits(seed: int, *counters: int | Tensor) -> Tensor:
    """64 random bits for every combination of counters.

    Args:
        seed: any integer; taken modulo 2^64.
        counters: integers or int64 tensors, broadcast against each other. Their order matters. Put plain integers
            first: their share of the work is done once and cached.

    Returns:
        int64 tensor of the counters' broadcast shape, on their device (0-dim, on the CPU, if there is no tensor).
    """
    constants: list[int] = []
    for counter in counters:
        if isinstance(counter, Tensor):
            break
        constants.append(counter)
    h: Tensor | int = _hash_constants(seed, tuple(constants))
    for counter in counters[len(constants) :]:
        h = _absorb(h, counter if isinstance(counter, Tensor) else _signed(counter))
    return torch.tensor(h) if isinstance(h, int) else h


def uniform(seed: int, *counters: int | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform numbers in [0, 1), equally spaced: multiples of 2^-24 (float32) or 2^-53 (float64).

    Args:
        seed, counters: see `bits`.
        dtype: torch.float32 or torch.float64.

    Returns:
        Tensor of the counters' broadcast shape.

    Raises:
        ValueError: for another dtype.
    """
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"uniform draws float32 or float64, got dtype={dtype}: draw one of these and convert it")
    kept = 24 if dtype == torch.float32 else 53
    return _shift_right(bits(seed, *counters), 64 - kept).to(dtype).mul_(2.0**-kept)


def normal(seed: int, *counters: int | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers, by the inverse of their distribution function.

    Args:
        seed, counters: see `bits`.
        dtype: torch.float32 or torch.float64.

    Returns:
        Tensor of the counters' broadcast shape; between -5.5 and 5.3 (float32) or -8.3 and 8.3 (float64). Unlike the
        integers behind them, they agree between CPU and GPU to rounding only.

    Raises:
        ValueError: for another dtype.
    """
    half = 2.0 ** (-25 if dtype == torch.float32 else -54)  # from the lower end of each step to its middle: never 0
    return torch.special.ndtri(uniform(seed, *counters, dtype=dtype).add_(half).clamp_(max=1 - 2 * half))


def integers(seed: int, *counters: int | Tensor, low: int | Tensor, high: int | Tensor) -> Tensor:
    """Uniform integers in [low, high).

    Args:
        seed, counters: see `bits`.
        low, high: integers or int64 tensors, broadcast against the counters. The span high - low must lie in
            1..2^31; this is checked for plain integers only (checking a tensor would wait for the device).

    Returns:
        int64 tensor of the common broadcast shape. No value's probability differs from another's by more than
        2^-32.

    Raises:
        ValueError: if plain integers leave an empty or too wide range.
    """
    span = high - low
    if isinstance(span, int) and not 1 <= span <= _MAX_SPAN:
        raise ValueError(f"integers needs 1 <= high - low <= 2^31, got low={low}, high={high}")
    return (_shift_right(bits(seed, *counters), 32) * span >> 32) + low
