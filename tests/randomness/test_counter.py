"""The draws against the published generator, an independent implementation, and simple statistics."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rtrl_moe_pl.randomness import bits, integers, normal, uniform

MASK = (1 << 64) - 1
# First outputs of the published splitmix64.c from state 0 and from state 1234567.
SPLITMIX_STATE_0 = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC, 0x1B39896A51A8749B]
SPLITMIX_STATE_1234567 = [6457827717110365317, 3203168211198807973, 9817491932198370423]
# Data sets are made of these draws: a change here changes every data set.
GOLDEN_INTEGERS = [818, 129, 949, 0, 200, 683]
GOLDEN_UNIFORM = [13730737, 2176922, 15924649, 4965, 3356466, 11468447]
GOLDEN_UNIFORM_64 = [
    7371633522991141,
    1168726218679322,
    8549481280210501,
    2665797394928,
    1801989317638605,
    6157075782175909,
]


def mix(z: int) -> int:
    """The published output function, on Python integers."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def chain(h: int, counters: tuple[int, ...]) -> int:
    for counter in counters:
        h = mix((h + (counter + 1) * 0x9E3779B97F4A7C15) & MASK)
    return h


def unsigned(tensor: torch.Tensor) -> list[int]:
    return [value & MASK for value in tensor.tolist()]


def test_first_counter_reproduces_the_published_generator():
    assert unsigned(bits(0, torch.arange(5))) == SPLITMIX_STATE_0  # mix(0) = 0: seed 0 is state 0
    assert [chain(1234567, (i,)) for i in range(3)] == SPLITMIX_STATE_1234567  # the oracle below is the generator


words = st.integers(-(2**63), 2**63 - 1)


@given(st.integers(-(2**70), 2**70), st.lists(words, max_size=4))
def test_equals_integer_arithmetic(seed: int, counters: list[int]):
    expected = chain(mix(seed & MASK), tuple(counters))
    assert unsigned(bits(seed, *counters)[None]) == [expected]  # all constants
    as_tensors = [torch.tensor([c]) for c in counters]
    if counters:
        assert unsigned(bits(seed, *as_tensors)) == [expected]
        assert unsigned(bits(seed, as_tensors[0], *counters[1:])) == [expected]  # constants after a tensor


def test_golden_values():
    index = torch.arange(6)
    assert integers(7, 3, index, low=0, high=1000).tolist() == GOLDEN_INTEGERS
    assert uniform(7, 3, index).mul(2**24).long().tolist() == GOLDEN_UNIFORM
    assert uniform(7, 3, index, dtype=torch.float64).mul(2**53).long().tolist() == GOLDEN_UNIFORM_64


def test_a_draw_does_not_depend_on_the_rest_of_the_batch():
    index = torch.arange(100)[:, None]
    position = torch.arange(30)
    table = bits(5, index, position)
    assert table.shape == (100, 30)
    assert torch.equal(bits(5, index[17:18], position)[0], table[17])
    shuffled = torch.randperm(100)
    assert torch.equal(bits(5, index[shuffled], position), table[shuffled])
    assert torch.equal(bits(5, index.int(), position), table)


def test_counters_are_left_alone():
    index = torch.arange(10)
    bits(1, index, index)
    assert torch.equal(index, torch.arange(10))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares the CPU with a GPU")
def test_same_numbers_on_the_gpu():
    index, position = torch.arange(1000)[:, None], torch.arange(50)
    assert torch.equal(bits(3, 1, index.cuda(), position.cuda()).cpu(), bits(3, 1, index, position))
    assert torch.equal(uniform(3, index.cuda()).cpu(), uniform(3, index))


def chi_square(counts: torch.Tensor) -> float:
    expected = counts.sum() / counts.numel()
    return float(((counts - expected) ** 2 / expected).sum())


def far_from_uniform(counts: torch.Tensor) -> bool:
    """Chi-square more than five standard deviations off its mean, on either side."""
    free = counts.numel() - 1
    return abs(chi_square(counts.double()) - free) > 5 * (2 * free) ** 0.5


@pytest.mark.parametrize("span", [2, 3, 7, 64, 1000])
def test_integers_are_uniform(span: int):
    draws = integers(11, torch.arange(200_000), low=-3, high=span - 3)
    assert draws.min() == -3
    assert draws.max() == span - 4
    counts = torch.bincount(draws + 3, minlength=span)
    assert not far_from_uniform(counts)
    counts[0] += 2000  # negative control: the check sees one per cent of the draws moved to one value
    assert far_from_uniform(counts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_is_uniform(dtype: torch.dtype):
    draws = uniform(2, torch.arange(200_000), dtype=dtype)
    assert draws.dtype == dtype
    assert draws.min() >= 0
    assert draws.max() < 1
    assert not far_from_uniform(torch.bincount((draws * 100).long(), minlength=100))


def test_consecutive_counters_are_jointly_uniform():
    draws = integers(2, torch.arange(400_001), low=0, high=16)
    assert not far_from_uniform(torch.bincount(draws[:-1] * 16 + draws[1:], minlength=256))


def test_seeds_and_counters_are_uncorrelated():
    index = torch.arange(20_000)
    streams = [
        uniform(seed, purpose, index, dtype=torch.float64) - 0.5 for seed in (0, 1, 2**32, -1) for purpose in (0, 1, 2)
    ]
    streams += [uniform(0, index, purpose, dtype=torch.float64) - 0.5 for purpose in (0, 1)]
    for a, b in itertools.combinations(streams, 2):
        for shift in (0, 1, 2):  # no stream is another one shifted
            correlation = 12 * (a[shift:] * b[: len(b) - shift]).mean()
            assert abs(correlation) < 6 / 20_000**0.5


def test_every_input_bit_flips_half_of_the_output_bits():
    index = torch.arange(2000)
    base = bits(9, index)
    for bit in range(63):
        changed = bits(9, index ^ (1 << bit)) ^ base
        flipped = sum(int((changed >> k & 1).sum()) for k in range(64)) / (64 * 2000)
        assert 0.49 < flipped < 0.51, bit


def test_bounds_may_be_tensors():
    index = torch.arange(5000)
    low, high = index % 7, index % 7 + 1 + index % 5
    draws = integers(4, index, low=low, high=high)
    assert bool(((draws >= low) & (draws < high)).all())
    assert torch.equal(draws[:10], torch.stack([integers(4, i, low=low[i], high=high[i]) for i in range(10)]))


def test_widest_range_does_not_overflow():
    draws = integers(4, torch.arange(10_000), low=-(2**30), high=2**30)
    assert draws.min() < -(2**29)
    assert draws.max() > 2**29


@pytest.mark.parametrize(("low", "high"), [(3, 3), (3, 2), (0, 2**31 + 1)])
def test_impossible_range_is_refused(low: int, high: int):
    with pytest.raises(ValueError, match=f"got low={low}, high={high}"):
        integers(0, low=low, high=high)


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match="float32 or float64, got dtype"):
        uniform(0, dtype=torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normal_numbers_are_standard_and_finite(dtype: torch.dtype) -> None:
    x = normal(3, torch.arange(400_000), dtype=dtype)
    assert x.dtype == dtype
    assert torch.isfinite(x).all()
    assert abs(x.mean()) < 0.01
    assert abs(x.std() - 1) < 0.01
    for bound, share in ((1.0, 0.8413), (2.0, 0.9772)):
        assert abs((x < bound).double().mean() - share) < 0.003
    assert torch.equal(x[:7], normal(3, torch.arange(7), dtype=dtype))
    assert not torch.equal(x[:7], normal(4, torch.arange(7), dtype=dtype))


def test_the_ends_of_the_unit_interval_give_finite_normal_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As likely as one draw in sixteen million, so given by hand."""
    ends = torch.tensor([0.0, 1 - 2.0**-24])
    monkeypatch.setattr("rtrl_moe_pl.randomness.counter.uniform", lambda *_, dtype: ends.clone())
    assert normal(0, 0).tolist() == pytest.approx([-5.42, 5.29], abs=0.01)
