"""The symmetries of the square, against torch.rot90 and torch.flip."""

import pytest
import torch
from torch import Tensor

from rtrl_moe_pl.tasks.puzzles.grids import COLOR, DIHEDRAL, EOS, PAD, dihedral, inverse

ELEMENTS = torch.arange(DIHEDRAL)


def expected(grid: Tensor, element: int) -> Tensor:
    turned = torch.rot90(grid, element % 4)  # counterclockwise
    return turned.flip(1) if element >= 4 else turned


def test_tokens_do_not_overlap():
    assert (PAD, EOS, COLOR, DIHEDRAL) == (0, 1, 2, 8)


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_every_element_is_its_turn_and_then_its_mirror(n: int):
    grids = torch.randint(10, (DIHEDRAL, 5, n, n))
    moved = dihedral(grids, ELEMENTS[:, None].expand(-1, 5))
    for element in range(DIHEDRAL):
        for before, after in zip(grids[element], moved[element], strict=True):
            assert torch.equal(after, expected(before, element))


def test_all_eight_differ():
    grid = torch.arange(9).view(3, 3)
    moved = dihedral(grid.expand(DIHEDRAL, 3, 3), ELEMENTS)
    assert len(moved.flatten(1).unique(dim=0)) == DIHEDRAL


@pytest.mark.parametrize(("height", "width"), [(2, 5), (5, 2), (1, 6), (3, 3), (6, 4)])
def test_a_grid_that_is_not_square_stays_in_the_upper_left_corner(height: int, width: int):
    n = 6
    canvas = torch.randint(10, (n, n))  # what lies outside moves nowhere sensible, and is not looked at
    sizes = (torch.full((DIHEDRAL,), side) for side in (height, width))
    moved = dihedral(canvas.expand(DIHEDRAL, n, n), ELEMENTS, *sizes)
    for element in range(DIHEDRAL):
        wanted = expected(canvas[:height, :width], element)
        assert wanted.shape == ((width, height) if element % 2 else (height, width))
        assert torch.equal(moved[element, : wanted.shape[0], : wanted.shape[1]], wanted)
    whole = dihedral(canvas.expand(DIHEDRAL, n, n), ELEMENTS)  # the control: sizes matter
    assert not torch.equal(moved[:, :height, :width], whole[:, :height, :width])


@pytest.mark.parametrize("of_size", [False, True])
def test_the_inverse_undoes(of_size: bool):
    n, height, width = 5, torch.tensor(4), torch.tensor(2)
    canvas = torch.randint(10, (n, n)).expand(DIHEDRAL, n, n)
    size = (height.expand(DIHEDRAL), width.expand(DIHEDRAL)) if of_size else ()
    turned = tuple(torch.where(ELEMENTS % 2 == 1, other, side) for side, other in zip(size, size[::-1], strict=True))
    back = dihedral(dihedral(canvas, ELEMENTS, *size), inverse(ELEMENTS), *turned)
    rows, columns = (4, 2) if of_size else (n, n)
    assert torch.equal(back[:, :rows, :columns], canvas[:, :rows, :columns])
    twice = dihedral(dihedral(canvas, ELEMENTS, *size), ELEMENTS, *turned)
    same = (twice[:, :rows, :columns] == canvas[:, :rows, :columns]).flatten(1).all(1)
    assert same.tolist() == [True, False, True, False, True, True, True, True]  # a quarter does not undo itself


def test_every_element_has_one_inverse():
    assert inverse(ELEMENTS).tolist() == [0, 3, 2, 1, 4, 5, 6, 7]
    assert torch.equal(inverse(inverse(ELEMENTS)), ELEMENTS)


def test_leading_dimensions_are_free():
    grids, element = torch.randint(10, (2, 3, 4, 5, 5)), torch.randint(DIHEDRAL, (2, 3, 4))
    moved = dihedral(grids, element)
    assert moved.shape == grids.shape
    assert torch.equal(moved[1, 2, 3], expected(grids[1, 2, 3], int(element[1, 2, 3])))
    assert dihedral(grids[:0], element[:0]).shape == (0, 3, 4, 5, 5)
