"""Compressed Jacobians against dense ones, by brute force."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from rtrl_moe_pl.linearization.sparse import MAX_COLOURS, Pattern, Run, SparseJacobian, colour_rows, compress

Draw = Callable[[st.SearchStrategy[Any]], Any]
STEPS, BATCH = 2, 3


@st.composite
def patterns(draw: Draw) -> list[Tensor]:
    """Sparse bool patterns [V, U_i] of one to three sources that share their rows; some in runs, some at random."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    rows = draw(st.integers(1, 9))
    result = []
    for _ in range(draw(st.integers(1, 3))):
        columns = draw(st.integers(1, 9))
        present = torch.rand(rows, columns) < draw(st.sampled_from([0.0, 0.1, 0.25]))
        if draw(st.booleans()):
            shift = draw(st.integers(-2, 2))
            for row in range(rows):
                if 0 <= row + shift < columns:
                    present[row, row + shift] = True
        result.append(present)
    return result


def jacobian_of(pattern: Tensor, colours: Tensor) -> tuple[SparseJacobian, Tensor]:
    """A random Jacobian [N, V, U] with this pattern, compressed as autograd would, and dense."""
    dense = torch.randn(STEPS * BATCH, *pattern.shape, dtype=torch.float64) * pattern
    count = int(colours.max()) + 1
    values = [dense[:, colours == c].sum(1) for c in range(count)]
    return SparseJacobian(compress(pattern, colours), values), dense


@settings(max_examples=80)
@given(patterns())
def test_colouring(present: list[Tensor]) -> None:
    """No two rows of a colour share a column, in any of the patterns."""
    colours = colour_rows(present)
    if colours is None:
        joint = torch.cat(present, 1).double()
        assert int(((joint @ joint.T) > 0).sum(1).max()) > MAX_COLOURS
        return
    assert colours.shape == (present[0].shape[0],)
    assert int(colours.max()) < MAX_COLOURS
    for pattern in present:
        for colour in range(int(colours.max()) + 1):
            assert int(pattern[colours == colour].sum(0).max()) <= 1
        assert torch.equal(compress(pattern, colours).to_bool(), pattern)


@settings(max_examples=120)
@given(patterns(), st.data())
def test_products(present: list[Tensor], data: Any) -> None:
    colours = colour_rows(present)
    if colours is None:
        return
    for pattern in present:
        rows, columns = pattern.shape
        jacobian, dense = jacobian_of(pattern, colours)
        assert_close(jacobian.to_dense(), dense)

        left = torch.randn(len(dense), rows, dtype=torch.float64)
        assert_close(jacobian.times_left(left), torch.einsum("nv,nvu->nu", left, dense))

        right = torch.randn(columns, 4, dtype=torch.float64)
        values, parts = jacobian.by_row(right)
        assert_close(torch.bmm(values, parts).transpose(0, 1), dense @ right)

        out = torch.randn(len(dense), 5, columns, dtype=torch.float64)
        matrix = torch.randn(len(dense), 5, rows, dtype=torch.float64)
        expected = out + matrix @ dense
        jacobian.add_left_product(matrix, out)
        assert_close(out, expected)

        first = data.draw(st.integers(0, columns - 1))
        last = data.draw(st.integers(first + 1, columns))
        lane = data.draw(st.integers(0, BATCH - 1))
        lanes = slice(lane, data.draw(st.integers(lane + 1, BATCH)))
        cotangents = torch.randn(STEPS, BATCH, rows, 3, dtype=torch.float64)
        part = torch.full((STEPS, lanes.stop - lane, last - first, 3), torch.nan, dtype=torch.float64)
        jacobian.unflatten(STEPS, BATCH).transposed_times(cotangents[:, lanes], part, lanes, first)
        whole = torch.einsum("kbvu,kbvc->kbuc", dense.unflatten(0, (STEPS, BATCH)), cotangents)
        assert_close(part, whole[:, lanes, first:last])


def test_too_many_colours() -> None:
    """One column that every row reaches: as many colours as rows."""
    full = torch.ones(MAX_COLOURS, 1, dtype=torch.bool)
    assert colour_rows([full]) is not None
    assert colour_rows([torch.ones(MAX_COLOURS + 1, 1, dtype=torch.bool)]) is None


def test_runs() -> None:
    """Consecutive rows over consecutive columns are one run; a gap or a jump begins another."""
    pattern = Pattern(torch.tensor([[0, 1, 2, -1, 5, 6, 4], [3, -1, -1, 0, -1, -1, -1]]), torch.zeros(7))
    assert pattern.runs == [
        [Run(0, 0, 3), Run(4, 5, 2), Run(6, 4, 1)],
        [Run(0, 3, 1), Run(3, 0, 1)],
    ]
    assert Run(4, 5, 3).clip(5, 7) == Run(5, 6, 2)
    assert Run(4, 5, 3).clip(0, 4) is None
    placed, width = pattern.slots
    assert width == 2  # row 0 and no other is met twice
    assert sorted(run.length for _, _, run in placed) == [1, 1, 1, 2, 3]


@pytest.mark.parametrize(
    ("row_of", "rows", "diagonal", "empty"),
    [
        ([[0, 1, 2]], 3, True, False),
        ([[0, 1, 2]], 4, False, False),
        ([[0, 2, 1]], 3, False, False),
        ([[0, 1, -1]], 3, False, False),
        ([[-1, -1]], 2, False, True),
        ([[0, 1], [1, 0]], 2, False, False),
    ],
)
def test_kinds(row_of: list[list[int]], rows: int, diagonal: bool, empty: bool) -> None:
    pattern = Pattern(torch.tensor(row_of), torch.zeros(rows))
    assert pattern.is_diagonal == diagonal
    assert pattern.is_empty == empty


def test_wrong_colours_are_not_silent() -> None:
    """Control: values compressed under a colouring that mixes two rows are not the Jacobian."""
    pattern = torch.tensor([[True, False], [True, True]])
    dense = torch.randn(6, 2, 2, dtype=torch.float64) * pattern
    wrong = torch.tensor([0, 0])
    mixed = SparseJacobian(compress(pattern, wrong), [dense.sum(1)])
    assert (mixed.to_dense() - dense).abs().max() > 0.1
