"""Sudoku, against a solver and a canonical form written here: one solution, and nothing held out is trained."""

import itertools
import math
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from rtrl_moe_pl.tasks.puzzles.base import IGNORED
from rtrl_moe_pl.tasks.puzzles.sudoku import BLANK, DIGIT, Sudoku, fingerprint

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}
TASKS = [Sudoku(), Sudoku(6, 9, 14, 80, 20), Sudoku(9, 26, 32, 60, 10)]


def solutions(tokens: list[int], limit: int = 2) -> list[list[int]]:
    """Up to ``limit`` solutions, by trying every digit in the cell with the fewest."""
    n = math.isqrt(len(tokens))
    height, width = BOXES[n]

    def allowed(cell: int) -> set[int]:
        row, column = divmod(cell, n)
        seen = {
            tokens[other]
            for other in range(n * n)
            if other // n == row
            or other % n == column
            or (other // n // height, other % n // width) == (row // height, column // width)
        }
        return set(range(DIGIT, DIGIT + n)) - seen

    blanks = {cell: allowed(cell) for cell in range(n * n) if tokens[cell] == BLANK}
    if not blanks:
        return [tokens]
    cell = min(blanks, key=lambda blank: len(blanks[blank]))
    found = []
    for digit in sorted(blanks[cell]):
        found += solutions([*tokens[:cell], digit, *tokens[cell + 1 :]], limit - len(found))
        if len(found) == limit:
            break
    return found


def line_orders(groups: int, inside: int) -> list[list[int]]:
    """All orders of lines that keep bands (or stacks) together."""
    within = list(itertools.permutations(range(inside)))
    return [
        [group * inside + line for group, lines in zip(order, choice, strict=True) for line in lines]
        for order in itertools.permutations(range(groups))
        for choice in itertools.product(within, repeat=groups)
    ]


@lru_cache
def cell_orders(n: int) -> Tensor:
    """[G, n * n]: every symmetry of rows and columns."""
    height, width = BOXES[n]
    rows, columns = (torch.tensor(line_orders(n // size, size)) for size in (height, width))
    orders = (rows[:, None, :, None] * n + columns[None, :, None, :]).flatten(0, 1)
    return (torch.cat([orders, orders.mT]) if height == width else orders).flatten(1)


def canonical(puzzle: Tensor) -> tuple[int, ...]:
    """The least of all images, digits numbered as they come."""
    n = math.isqrt(len(puzzle))
    images = puzzle[cell_orders(n)]
    there = images[..., None] == torch.arange(DIGIT, DIGIT + n)  # [G, S, n]
    first = torch.where(there.any(1), there.int().argmax(1), n * n)
    names = torch.cat([torch.arange(DIGIT).expand(len(images), -1), DIGIT + first.argsort(1).argsort(1)], 1)
    return min(map(tuple, names.gather(1, images).tolist()))


@pytest.mark.parametrize("task", TASKS, ids=repr)
@pytest.mark.parametrize("split", ["held_out", "train"])
def test_the_answer_is_the_only_solution(task: Sudoku, split: str):
    """Of held-out puzzles, and of images of the others."""
    puzzles = task.sample(split, 7, torch.arange(10))
    clues = (puzzles.inputs != BLANK).sum(1)
    assert int(clues.min()) >= task.clues_min
    assert int(clues.max()) <= task.clues_max
    for question, answer in zip(puzzles.inputs.tolist(), puzzles.labels.tolist(), strict=True):
        assert solutions(question) == [answer]


def test_the_solver_here_finds_several_solutions():
    """The control: without its clues, a puzzle has more than one solution; with a wrong clue, none."""
    question = TASKS[0].sample("held_out", 0, torch.arange(1)).inputs[0].tolist()
    [answer] = solutions(question)
    assert len(solutions([BLANK] * 16, 1000)) == 288  # all there are
    blank = question.index(BLANK)
    question[blank] = next(digit for digit in range(DIGIT, DIGIT + 4) if digit != answer[blank])
    assert solutions(question) == []


def test_layout():
    task = TASKS[2]
    puzzles = task.draw("train", 0, torch.tensor([3, -1, 5]))
    assert (task.shape.vocabulary, task.shape.cells, task.shape.max_demos, task.shape.identities) == (11, 81, 0, 1)
    assert puzzles.demo_inputs.shape == puzzles.demo_labels.shape == (3, 0, 81)
    assert (puzzles.demo_mask.shape, puzzles.demo_mask.dtype) == ((3, 0), torch.bool)
    assert puzzles.inputs.dtype == puzzles.labels.dtype == torch.int64
    assert puzzles.valid.tolist() == [True, False, True]
    assert bool((puzzles.labels[1] == IGNORED).all())
    assert puzzles.identity.tolist() == [0, 0, 0]
    assert task.look.symbols == ("?", ".", "1", "2", "3", "4", "5", "6", "7", "8", "9")
    assert len(task.look.colors) == task.shape.vocabulary
    assert task.look.box == (3, 3)
    assert (task.evaluation_splits, task.count("held_out"), task.count("train")) == (("held_out",), 10, None)


@pytest.mark.parametrize("task", TASKS[:2], ids=repr)
def test_no_image_of_a_held_out_puzzle_is_trained(task: Sudoku):
    base = Sudoku(**(vars(task) | {"augment": False})).sample("train", 0, torch.arange(2000)).inputs.unique(dim=0)
    assert len(base) == task.puzzles
    trained = set(map(canonical, base))
    held_out = set(map(canonical, task.sample("held_out", 0, torch.arange(task.held_out)).inputs))
    assert (len(trained), len(held_out)) == (task.puzzles, task.held_out)  # no two are images of each other
    assert not trained & held_out
    for seed in (0, 1):  # the control: images of what is trained are recognised
        assert set(map(canonical, task.sample("train", seed, torch.arange(30)).inputs)) <= trained


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_fingerprints_stay_under_symmetries_and_tell_puzzles_apart(task: Sudoku):
    plain = Sudoku(**(vars(task) | {"augment": False})).sample("train", 5, torch.arange(2000))
    images = task.sample("train", 5, torch.arange(2000))
    held_out = task.sample("held_out", 0, torch.arange(task.held_out))
    known = fingerprint(plain.inputs, plain.labels)
    assert torch.equal(fingerprint(images.inputs, images.labels), known)
    changed = (images.inputs != plain.inputs).any(1).float().mean()
    assert changed > 0.99
    assert len(known.unique()) == task.puzzles
    assert not torch.isin(fingerprint(held_out.inputs, held_out.labels), known).any()
    one_less = plain.inputs.scatter(1, (plain.inputs != BLANK).int().argmax(1, keepdim=True), BLANK)
    assert not (fingerprint(one_less, plain.labels) == known).any()


def test_training_draws_every_image_of_a_puzzle_and_nothing_else():
    task = Sudoku(4, 5, 8, puzzles=1, held_out=1)
    puzzle = Sudoku(4, 5, 8, puzzles=1, held_out=1, augment=False).sample("train", 0, torch.arange(1)).inputs[0]
    digits = DIGIT + torch.tensor(list(itertools.permutations(range(4))))
    names = torch.cat([torch.arange(DIGIT).expand(24, -1), digits], 1)
    images = names[:, puzzle[cell_orders(4)]].flatten(0, 1).unique(dim=0)
    drawn = task.sample("train", 3, torch.arange(50_000)).inputs.unique(dim=0)
    assert len(images) > 1000
    assert torch.equal(drawn, images)


def test_puzzles_depend_on_seed_and_index_alone():
    task = TASKS[1]
    index = torch.tensor([5, 0, 1_000_000_007])
    together = task.sample("train", 1, index)
    for row, one in enumerate(index):
        alone = task.sample("train", 1, one[None])
        assert torch.equal(alone.inputs[0], together.inputs[row])
        assert torch.equal(alone.labels[0], together.labels[row])
    assert task.sample("train", 1, index[:0]).inputs.shape == (0, task.shape.cells)
    assert not torch.equal(task.sample("train", 2, index).inputs, together.inputs)


def test_the_held_out_set_depends_on_neither_the_seed_nor_the_training_set():
    index = torch.arange(20)
    held_out = TASKS[1].sample("held_out", 0, index).inputs
    assert torch.equal(TASKS[1].sample("held_out", 1, index).inputs, held_out)
    assert torch.equal(Sudoku(6, 9, 14, 500, 20, augment=False).sample("held_out", 0, index).inputs, held_out)
    assert not torch.equal(Sudoku(6, 10, 14, 80, 20).sample("held_out", 0, index).inputs, held_out)


def test_golden_puzzles():
    """What earlier runs were trained on stays what it is."""
    puzzles = TASKS[0].sample("held_out", 0, torch.arange(1)), TASKS[0].sample("train", 0, torch.arange(1))
    assert [(p.inputs[0].tolist(), p.labels[0].tolist()) for p in puzzles] == [
        ([1, 1, 5, 1, 1, 1, 2, 4, 1, 3, 1, 2, 4, 1, 3, 5], [2, 4, 5, 3, 3, 5, 2, 4, 5, 3, 4, 2, 4, 2, 3, 5]),
        ([5, 1, 3, 4, 1, 4, 2, 5, 1, 3, 5, 1, 1, 1, 1, 1], [5, 2, 3, 4, 3, 4, 2, 5, 4, 3, 5, 2, 2, 5, 4, 3]),
    ]


def test_an_index_behind_the_held_out_set_never_reads_a_training_puzzle():
    with pytest.raises(IndexError):
        TASKS[0].sample("held_out", 0, torch.tensor([50]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares the CPU with a GPU")
def test_a_gpu_draws_the_same_puzzles():
    index = torch.arange(1000)
    for mine, its in zip(TASKS[2].sample("train", 0, index), TASKS[2].sample("train", 0, index.cuda()), strict=True):
        assert torch.equal(its.cpu(), mine)


def test_there_are_thirteen_puzzles_of_four_clues():
    task = Sudoku(4, 4, 4, puzzles=10, held_out=3)
    puzzles = [task.sample("held_out", 0, torch.arange(3)), task.sample("train", 0, torch.arange(200))]
    assert len(set(map(canonical, torch.cat([p.inputs for p in puzzles])))) == 13
    with pytest.raises(ValueError, match=r"found only 13 .* 4 to 4 clues \(size 4\), but .* is 14: ask for fewer"):
        Sudoku(4, 4, 4, puzzles=10, held_out=4).sample("train", 0, torch.arange(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 8}, "size must be one of 4, 6, 9, got 8"),
        ({"clues_min": 3}, r"clues_min \(size 4\) must be at least 4, got 3"),
        ({"size": 6}, r"clues_min \(size 6\) must be at least 8, got 5"),
        ({"size": 9, "clues_min": 16, "clues_max": 30}, r"clues_min \(size 9\) must be at least 17, got 16"),
        ({"size": 9, "clues_min": 17, "clues_max": 21}, r"clues_max .* too rare .* must be at least 22, got 21"),
        ({"clues_min": 9}, "clues_min <= clues_max < 16, got 9 and 8"),
        ({"clues_max": 16}, "clues_min <= clues_max < 16, got 5 and 16"),
        ({"puzzles": 0}, "puzzles must be at least 1, got 0"),
        ({"held_out": 0}, "held_out must be at least 1, got 0"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Sudoku(**options)


def test_a_fraction_and_an_unknown_split_are_refused():
    with pytest.raises(TypeError, match=r"clues_min \(size 4\) must be an integer, got 5\.5"):
        Sudoku(clues_min=5.5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="split must be one of 'train', 'held_out', got 'test'"):
        Sudoku().sample("test", 0, torch.arange(1))
