"""What is called bad, and which bad tensor is named."""

import pytest
import torch

from rtrl_moe_pl.training.failure import describe_bad, first_bad


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 2.0], None),
        ([1.0, float("nan")], "holds 1 NaN and 0 infinite of 2 values"),
        ([float("-inf"), float("nan")], "holds 1 NaN and 1 infinite of 2 values"),
        ([1e30, 1.0], "is finite, but its norm overflows torch.float32"),
        ([], None),
    ],
)
def test_describe(values: list[float], expected: str | None) -> None:
    assert describe_bad(torch.tensor(values)) == expected


def test_integers_are_never_bad() -> None:
    assert describe_bad(torch.tensor([2**62, -(2**62)])) is None


def test_the_first_bad_tensor_is_named() -> None:
    nan = torch.tensor([float("nan")])
    assert first_bad([("a", torch.ones(1)), ("b", nan), ("c", nan)]) == "b holds 1 NaN and 0 infinite of 1 values"
    assert first_bad([("a", torch.ones(1))]) is None
