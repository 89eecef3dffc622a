"""Dense derivatives of many rows, found some rows at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rtrl_moe_pl.cells import SimpleRNN
from rtrl_moe_pl.linearization import step as step_module
from rtrl_moe_pl.linearization.derivatives import StepDerivatives, in_tiles, leaves
from rtrl_moe_pl.linearization.taps import Tap
from tests.gradients.user_cells import vectors
from tests.linearization.test_guards import planned

ROWS = 20


@pytest.mark.parametrize("make", [lambda: SimpleRNN(3, 20), vectors.AffineNorm])
def test_tiles_are_put_together(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    step, plan, x, state = planned(make(), ROWS)
    assert plan.patterns is None
    outputs, whole = step.derivatives(plan, x, state)
    seen = []
    dense = step._dense
    monkeypatch.setattr(step, "_dense", lambda plan, x, state: seen.append(len(state)) or dense(plan, x, state))
    monkeypatch.setattr(step_module, "TILE_BYTES", 1)
    again, tiled = step.derivatives(plan, x, state)
    assert seen == [8, 8, 4]
    torch.testing.assert_close(again, outputs)
    torch.testing.assert_close(tiled.dense, whole.dense)
    for (tap, jacobian), (expected_tap, expected) in zip(tiled.taps, whole.taps, strict=True):
        torch.testing.assert_close(jacobian, expected)
        assert tap.signature == expected_tap.signature
        assert (tap.input is None) == (expected_tap.input is None)
        if tap.input is not None:
            torch.testing.assert_close(tap.input, expected_tap.input)


def pair(shared: bool, rows: int) -> StepDerivatives:
    """Two taps, with one Jacobian, input and table of experts, or with two."""
    held = torch.randn(rows, 2, 3), torch.randn(rows, 1, 3), torch.randint(5, (rows, 1))
    taps: list[Any] = []
    for name in ("a", "b"):
        jacobian, source, experts = held if shared else [value.clone() for value in held]
        taps.append((Tap(torch.zeros(1, 1, 3), source, name, None, experts=experts), jacobian))
    return StepDerivatives([], torch.randn(rows, 2, 2), taps)


@pytest.mark.parametrize("together", [True, False])
def test_what_is_one_tensor_in_every_tile_stays_one(together: bool) -> None:
    def differentiate(x: Any, state: Tensor) -> tuple[Tensor, StepDerivatives]:
        return state, pair(together, len(state))

    state = torch.randn(5, 2)
    outputs, found = in_tiles(differentiate, state, state, 2)
    torch.testing.assert_close(outputs, state, rtol=0, atol=0)
    assert len(leaves(found.taps)) == (3 if together else 6)
    assert all(len(leaf) == 5 for leaf in leaves(found.taps).values())


def test_tiles_that_share_differently_are_one() -> None:
    sizes = []

    def differentiate(x: Any, state: Tensor) -> tuple[Tensor, StepDerivatives]:
        sizes.append(len(state))
        return state, pair(bool(x[0, 0] > 0), len(state))

    x = torch.tensor([[1.0], [1.0], [-1.0]])
    _, found = in_tiles(differentiate, x, torch.randn(3, 2), 2)
    assert sizes == [2, 1, 3]
    assert all(len(leaf) == 3 for leaf in leaves(found.taps).values())
