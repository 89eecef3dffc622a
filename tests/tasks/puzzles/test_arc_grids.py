import numpy as np
import pytest
import torch
from torch import Tensor

from rtrl_moe_pl.randomness import bits, integers
from rtrl_moe_pl.tasks.puzzles.arc_grids import crop, distinct, off_canvas, on_canvas, place, transform
from rtrl_moe_pl.tasks.puzzles.grids import COLOR, EOS, PAD, inverse


def random_grids(n: int = 7, count: int = 64) -> tuple[Tensor, Tensor]:
    """cells [count, 2, n, n] of random sizes [count, 2, 2], not square mostly."""
    row = torch.arange(count * 2).view(count, 2)
    size = integers(0, row[..., None], torch.arange(2), low=1, high=n + 1)
    color = integers(1, row[..., None], torch.arange(n * n), low=0, high=10).view(count, 2, n, n)
    step = torch.arange(n)
    inside = (step[:, None] < size[..., 0, None, None]) & (step < size[..., 1, None, None])
    return torch.where(inside, COLOR + color, PAD), size


def random_permutations(count: int) -> Tensor:
    shown = 1 + bits(2, torch.arange(count)[:, None], torch.arange(9)).argsort(-1)
    return torch.cat([torch.zeros(count, 1, dtype=torch.int64), shown], 1)


def test_an_augmentation_is_what_numpy_makes_of_it_and_its_inverse_undoes_it():
    cells, size = random_grids()
    element, permutation = torch.arange(64) % 8, random_permutations(64)
    moved, new_size = transform(cells, size, element, permutation)
    for row in range(64):
        for grid in range(2):
            expected = permutation[row].numpy()[off_canvas(cells[row, grid].numpy())]
            expected = np.rot90(expected, int(element[row]) % 4)
            expected = expected[:, ::-1] if element[row] >= 4 else expected
            assert tuple(new_size[row, grid].tolist()) == expected.shape
            assert np.array_equal(off_canvas(moved[row, grid].numpy()), expected)
    back, same_size = transform(moved, new_size, inverse(element), permutation.argsort(-1))
    assert torch.equal(back, cells)
    assert torch.equal(same_size, size)
    wrong, _ = transform(moved, new_size, element, permutation.argsort(-1))  # not the inverse: quarters are not undone
    assert (wrong != cells).flatten(1).any(1)[(element == 1) | (element == 3)].double().mean() > 0.9


@pytest.mark.parametrize("translated", [False, True])
def test_an_answer_is_cropped_as_it_was_placed_whatever_lies_around_it(translated: bool):
    cells, size = random_grids()
    room = 7 - size.amax(1)
    offset = integers(3, torch.arange(64)[:, None], torch.arange(2), low=0, high=room + 1) * translated
    placed = place(cells, size, offset)[:, 0]
    noise = integers(4, torch.arange(64 * 49), low=0, high=12).view(64, 7, 7)
    found, found_size = crop(torch.where(placed == PAD, noise, placed), offset)  # a model is not trained on PAD
    assert torch.equal(found, cells[:, 0])
    assert torch.equal(found_size, size[:, 0])
    elsewhere, _ = crop(placed, torch.zeros_like(offset))
    assert torch.equal(elsewhere, found) == (not translated)


def test_a_border_stands_below_and_right_where_there_is_room():
    cells = torch.full((1, 1, 4, 4), PAD)
    cells[..., :2, :3] = COLOR + 5
    size = torch.tensor([[[2, 3]]])
    assert place(cells, size, torch.tensor([[1, 0]])).tolist() == [
        [[[0] * 4, [7, 7, 7, 1], [7, 7, 7, 1], [1, 1, 1, 0]]]
    ]
    assert place(cells, size, torch.tensor([[2, 1]])).tolist() == [[[[0] * 4, [0] * 4, [0, 7, 7, 7], [0, 7, 7, 7]]]]


def test_what_is_cropped_is_the_largest_rectangle_of_colours_at_the_corner():
    c = COLOR
    tokens = torch.tensor([[c, c, c, EOS], [c, c, PAD, c], [c, EOS, c, c], [c, c, c, c]])
    for canvas, expected in (
        (tokens, [2, 2]),  # as large as 4 x 1, and with fewer rows
        (tokens.T, [1, 4]),
        (tokens.flip(1), [0, 0]),
        (tokens[3:].expand(4, 4), [4, 4]),
    ):
        found, size = crop(canvas[None], torch.zeros(1, 2, dtype=torch.int64))
        assert size.tolist() == [expected]
        assert int((found != PAD).sum()) == expected[0] * expected[1]


@pytest.mark.parametrize(
    "grids",
    [
        [[[1, 0], [0, 0]], [[0, 0], [0, 2]]],
        [[[3, 3], [3, 3]]],  # every element gives the same
        [[[1, 2], [2, 1]], [[5, 0, 5]]],
        [[[0, 0, 0]]],  # nothing changes but its direction
        [[[1, 2, 3], [4, 5, 6]], [[7, 8, 9]]],
        [[[1, 2], [0, 1]], [[1, 0], [2, 1]]],
    ],
)
def test_distinct_augmentations_are_those_that_look_different(grids: list):
    cells = torch.from_numpy(np.stack([on_canvas(np.array(grid, dtype=np.uint8), 4) for grid in grids]))
    size = torch.tensor([[len(grid), len(grid[0])] for grid in grids])
    number = torch.arange(300)
    element, permutation = integers(5, number, low=0, high=8), random_permutations(300)
    made, _ = transform(cells.expand(300, -1, -1, -1), size.expand(300, -1, -1), element, permutation)
    first: dict[bytes, int] = {}
    for row, puzzle in enumerate(made):
        first.setdefault(puzzle.numpy().tobytes(), row)
    assert distinct(cells, size, element, permutation).tolist() == list(first.values())
