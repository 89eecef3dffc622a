"""Maze, against a breadth-first search in plain Python."""

import time
from collections import Counter

import pytest
import torch
from torch import Tensor

from rtrl_moe_pl.tasks.puzzles.maze import FREE, GOAL, PATH, START, WALL, Maze

TASKS = [Maze(3), Maze(7), Maze(12, min_path=20), Maze(30, min_path=40)]


def neighbours(cells: set[tuple[int, int]], cell: tuple[int, int]) -> list[tuple[int, int]]:
    row, column = cell
    return [c for c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)) if c in cells]


def read(tokens: Tensor, n: int) -> tuple[set[tuple[int, int]], tuple[int, int], tuple[int, int]]:
    """Cells that are no wall, start, goal."""
    token = {divmod(cell, n): t for cell, t in enumerate(tokens.tolist())}
    [start] = [cell for cell, t in token.items() if t == START]
    [goal] = [cell for cell, t in token.items() if t == GOAL]
    return {cell for cell, t in token.items() if t != WALL}, start, goal


def search(cells: set[tuple[int, int]], start: tuple[int, int]) -> dict[tuple[int, int], tuple[int, tuple[int, int]]]:
    """Breadth-first: steps from the start, and the cell before, of each cell that can be reached."""
    found, queue = {start: (0, start)}, [start]
    for cell in queue:
        for other in neighbours(cells, cell):
            if other not in found:
                found[other] = found[cell][0] + 1, cell
                queue.append(other)
    return found


def shortest_path(cells: set[tuple[int, int]], start: tuple[int, int], goal: tuple[int, int]) -> set[tuple[int, int]]:
    """The cells between start and goal."""
    found, path, cell = search(cells, start), set(), goal
    while cell != start:
        path.add(cell)
        cell = found[cell][1]
    return path - {goal}


def marked(labels: Tensor, n: int) -> set[tuple[int, int]]:
    return {divmod(cell, n) for cell in (labels == PATH).nonzero().flatten().tolist()}


@pytest.mark.parametrize("task", TASKS, ids=repr)
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_the_answer_marks_the_shortest_path(task: Maze, split: str):
    n, puzzles = task.size, task.sample(split, 3, torch.arange(20))
    for tokens, labels in zip(puzzles.inputs, puzzles.labels, strict=True):
        assert set(tokens.tolist()) <= {WALL, FREE, START, GOAL}
        assert torch.equal(torch.where(labels == PATH, FREE, labels), tokens)
        path = shortest_path(*read(tokens, n))
        assert marked(labels, n) == path
        assert marked(labels.roll(1), n) != path  # the control


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_mazes_are_connected_and_without_loops(task: Maze):
    rooms = ((task.size + 1) // 2) ** 2
    for tokens in task.sample("train", 0, torch.arange(20)).inputs:
        cells, start, _ = read(tokens, task.size)
        assert len(cells) == 2 * rooms - 1  # rooms and doors
        assert set(search(cells, start)) == cells
        assert sum(len(neighbours(cells, cell)) for cell in cells) == 2 * (len(cells) - 1)  # a tree: the path is unique


def test_a_goal_is_as_far_as_asked_for_or_the_farthest():
    short = longest = 0
    for tokens in Maze(11, min_path=36).sample("train", 0, torch.arange(200)).inputs:
        cells, start, goal = read(tokens, 11)
        found = search(cells, start)
        steps, farthest = found[goal][0], max(distance for distance, _ in found.values())
        assert steps >= min(36, farthest)
        short, longest = short + (steps < 36), longest + (36 <= steps < farthest)
    assert short > 0  # some mazes are too small for it
    assert longest > 0  # and where others are not, the goal is drawn, not always the farthest


def test_all_small_mazes_are_drawn_with_all_starts_and_goals():
    inputs = Maze(3).sample("train", 0, torch.arange(8000)).inputs
    count = Counter(map(tuple, inputs.tolist()))
    assert len(count) == 4 * 4 * 3  # trees, starts, goals
    assert max(count.values()) < 2 * min(count.values())
    walls = (Maze(5).sample("train", 0, torch.arange(8000)).inputs == WALL).unique(dim=0)
    assert len(walls) == 192  # spanning trees of 3 x 3 rooms


def test_layout():
    task = Maze(8)
    puzzles = task.draw("train", 0, torch.tensor([3, -1]))
    assert (task.shape.vocabulary, task.shape.cells, task.shape.max_demos, task.shape.identities) == (6, 64, 0, 1)
    assert puzzles.demo_inputs.shape == puzzles.demo_labels.shape == (2, 0, 64)
    assert (puzzles.demo_mask.shape, puzzles.demo_mask.dtype) == ((2, 0), torch.bool)
    assert puzzles.inputs.dtype == puzzles.labels.dtype == torch.int64
    assert puzzles.valid.tolist() == [True, False]
    assert puzzles.identity.tolist() == [0, 0]
    grid = puzzles.inputs.view(2, 8, 8)
    assert bool((grid[:, 7] == WALL).all() and (grid[:, :, 7] == WALL).all())  # rooms are in even rows and columns
    assert len(task.look.symbols) == len(task.look.colors) == task.shape.vocabulary
    assert (task.evaluation_splits, task.count("held_out"), task.count("train")) == (("held_out",), None, None)


def test_mazes_depend_on_split_seed_and_index_alone():
    task, index = Maze(15), torch.tensor([5, 0, 1_000_000_007])
    together = task.sample("train", 1, index)
    for row, one in enumerate(index):
        alone = task.sample("train", 1, one[None])
        assert torch.equal(alone.inputs[0], together.inputs[row])
        assert torch.equal(alone.labels[0], together.labels[row])
    assert task.sample("train", 1, index[:0]).inputs.shape == (0, task.shape.cells)
    for other in (task.sample("train", 2, index), task.sample("held_out", 1, index)):
        assert not (other.inputs == together.inputs).all(1).any()


def test_golden_maze():
    """What earlier runs were trained on stays what it is."""
    assert Maze(5).sample("train", 0, torch.arange(1)).labels.view(5, 5).tolist() == [
        [3, 5, 5, 5, 5],
        [1, 1, 1, 1, 5],
        [2, 2, 5, 5, 5],
        [2, 1, 5, 1, 1],
        [2, 1, 4, 2, 2],
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares the CPU with a GPU")
def test_a_gpu_draws_the_same_mazes():
    index = torch.arange(100)
    for mine, its in zip(TASKS[3].sample("train", 0, index), TASKS[3].sample("train", 0, index.cuda()), strict=True):
        assert torch.equal(its.cpu(), mine)


def test_a_batch_of_large_mazes_takes_less_than_a_second():
    seconds = []
    for seed in range(3):
        start = time.process_time()
        Maze(30).sample("train", seed, torch.arange(32))
        seconds.append(time.process_time() - start)
    assert min(seconds) < 1  # 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 2}, "size must be at least 3, got 2"),
        ({"min_path": 1}, "min_path must be at least 2, got 1"),
        ({"size": 5, "min_path": 17}, "min_path must be at most 16, the longest path for size 5, got 17"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Maze(**options)


def test_a_fraction_and_an_unknown_split_are_refused():
    with pytest.raises(TypeError, match=r"size must be an integer, got 9\.5"):
        Maze(size=9.5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="split must be one of 'train', 'held_out', got 'test'"):
        Maze().sample("test", 0, torch.arange(1))
