"""Sudoku: generated puzzles with one solution; what is held out is no image of what is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from rtrl_moe_pl.cells.base import at_least
from rtrl_moe_pl.randomness import bits, integers
from rtrl_moe_pl.tasks.base import one_of
from rtrl_moe_pl.tasks.puzzles.base import Puzzles, PuzzleShape, PuzzleTask
from rtrl_moe_pl.tasks.puzzles.colors import NONE, Look

BLANK, DIGIT = 1, 2  # tokens, behind PAD: an empty cell, and the first of the digits (digit d is d + 1)
BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}  # rows and columns of a box
FEWEST = {4: 4, 6: 8, 9: 17}  # clues; no puzzle with fewer has only one solution
FOUND = {4: 4, 6: 8, 9: 22}  # clues; removing clues at random hardly ever ends with fewer
SPLITS = ("train", "held_out")
_CHUNK, _PATIENCE = 256, 16  # puzzles generated at once; chunks without a new one before giving up
# what a draw is for: of base puzzles, and of training puzzles
_FILL, _REMOVE, _TARGET, _BASE, _DIGITS, _BANDS, _ROWS, _STACKS, _COLUMNS, _TRANSPOSED = range(10)


@dataclass(frozen=True)
class Sudoku(PuzzleTask):
    """Grids of clues and blanks with exactly one solution; every cell of the solution is asked for.

    The base puzzles do not depend on the seed, and no two of them are images of each other under the symmetries of
    Sudoku (see `fingerprint`). The first ``held_out`` are the evaluation set "held_out"; training draws from the
    others, with ``augment`` as a random image: digits, bands, rows in bands, stacks and columns in stacks are
    permuted, and where boxes are square the grid may be transposed. So no image of a held-out puzzle is trained.
    That is proved for puzzles; solutions without clues may be images of each other (4 x 4 has two that are not).

    Tokens: PAD, a blank, and digit d as d + 1. A puzzle starts as a random solution (all are possible, not all equally
    likely); clues are removed in random order, where the solution stays the only one, down to a random number of
    clues between ``clues_min`` and ``clues_max``, or as near as this order gets.

    Args:
        size: 4, 6 or 9, with boxes of 2 x 2, 2 x 3 (rows x columns) or 3 x 3 cells.
        clues_min, clues_max: how many clues puzzles have; the fewer, the harder.
        puzzles: number of base puzzles to train on.
        held_out: number of puzzles held out.
        augment: whether training draws images, not only base puzzles.

    Raises:
        TypeError, ValueError: for options out of range; `sample`: ValueError where there are too few puzzles.
    Cost: base puzzles are generated once per process, on the CPU. Milliseconds a puzzle: 0.5 (4 x 4), 2 (6 x 6),
        5 (9 x 9 with 30 clues), 15 (9 x 9 with 22 to 26). Where so few clues are demanded that most tries fail: 300
        (6 x 6 with 8), 450 (9 x 9 with 22); for 9 x 9 a lower ``clues_max`` is refused.
    References: McGuire, Tugemann & Civario 2014, arXiv 1201.0749 (no 9 x 9 puzzle with 16 clues).
    """

    size: int = 4
    clues_min: int = 5
    clues_max: int = 8
    puzzles: int = 200
    held_out: int = 50
    augment: bool = True

    def __post_init__(self) -> None:
        if self.size not in BOXES:
            raise ValueError(f"size must be one of {', '.join(map(str, BOXES))}, got {self.size!r}")
        at_least(FEWEST[self.size], f"clues_min (size {self.size})", self.clues_min)
        too_rare = f"clues_max (size {self.size}; puzzles with fewer clues are too rare to be found)"
        at_least(FOUND[self.size], too_rare, self.clues_max)
        if not self.clues_min <= self.clues_max < self.size**2:
            raise ValueError(
                f"clues must be clues_min <= clues_max < {self.size**2}, got {self.clues_min} and {self.clues_max}"
            )
        at_least(1, "puzzles", self.puzzles)
        at_least(1, "held_out", self.held_out)

    @property
    def shape(self) -> PuzzleShape:
        return PuzzleShape(DIGIT + self.size, self.size, self.size)

    @property
    def evaluation_splits(self) -> tuple[str, ...]:
        return SPLITS[1:]

    def sample(self, split: str, seed: int, index: Tensor) -> Puzzles:
        one_of(SPLITS, "split", split)
        base = _base_puzzles(self.size, self.clues_min, self.clues_max, self.held_out + self.puzzles)
        rows, number = slice(self.held_out), index  # of others there are none, so that an index too high fails
        if split == "train":
            rows, number = slice(self.held_out, None), integers(seed, _BASE, index, low=0, high=self.puzzles)
        inputs, labels = (grids[rows].to(index.device)[number].long() for grids in base)
        if split == "train" and self.augment:
            source, digits = _symmetry(self.size, seed, index)
            inputs, labels = (digits.gather(1, grids.gather(1, source)) for grids in (inputs, labels))
        none = inputs.new_empty(len(index), 0, self.size**2)
        return Puzzles(inputs, labels, none, none, none[..., 0].bool(), torch.zeros_like(index))

    first_token = BLANK

    @property
    def look(self) -> Look:
        colors = ("#e8e8e8", *["#ffffff"] * (1 + self.size))
        return Look(colors, (NONE, ".", *map(str, range(1, 1 + self.size))), BOXES[self.size])

    def count(self, split: str) -> int | None:
        return self.held_out if split == "held_out" else None


def fingerprint(inputs: Tensor, labels: Tensor) -> Tensor:
    """A number that no symmetry of Sudoku changes: puzzles that differ in it are not images of each other.

    The converse is not claimed: a puzzle may be taken for an image of another that it is not (and is then left out).
    Colours of cells are refined by hashing the multisets of colours in the cell's unit of each kind; rows and columns
    are treated alike, so that transposition changes nothing either.

    Args:
        inputs, labels: [N, S] int64, puzzles and solutions as tokens.

    Returns:
        [N] int64.
    References: Weisfeiler & Leman 1968 (colour refinement).
    """
    size = math.isqrt(inputs.shape[1])
    height, width = BOXES[size]
    cell = torch.arange(size * size, device=inputs.device)
    row, column = cell // size, cell % size
    band, stack = row // height, column // width
    color = (inputs == labels).long()

    def within(unit: Tensor) -> Tensor:  # [N, S], of all cells in the same unit
        unit = unit.expand_as(color)
        return torch.zeros_like(color).scatter_add(1, unit, bits(0, color)).gather(1, unit)

    for _ in range(size):
        lines = bits(0, within(row), within(band)) + bits(0, within(column), within(stack))
        color = bits(0, color, within(labels), within(band * height + stack), lines)
    return bits(0, color).sum(1)


def _symmetry(size: int, seed: int, index: Tensor) -> tuple[Tensor, Tensor]:
    """A random symmetry per index: the cell that comes to each cell [B, S], the token that each becomes [B, V]."""
    height, width = BOXES[size]

    def order(purpose: int, *shape: int) -> Tensor:  # [B, *shape], permutations along the last axis
        number = torch.arange(math.prod(shape), device=index.device)
        return bits(seed, purpose, index[:, None], number).unflatten(1, shape).argsort(dim=-1, stable=True)

    rows = order(_BANDS, size // height)[..., None] * height + order(_ROWS, size // height, height)
    columns = order(_STACKS, size // width)[..., None] * width + order(_COLUMNS, size // width, width)
    source = rows.flatten(1)[:, :, None] * size + columns.flatten(1)[:, None, :]
    if height == width:
        transposed = integers(seed, _TRANSPOSED, index, low=0, high=2).bool()
        source = torch.where(transposed[:, None, None], source.mT, source)
    kept = torch.arange(DIGIT, device=index.device).expand(len(index), -1)  # PAD and blank
    return source.flatten(1), torch.cat([kept, DIGIT + order(_DIGITS, size)], 1)


@lru_cache(maxsize=8)
def _base_puzzles(size: int, clues_min: int, clues_max: int, count: int) -> tuple[Tensor, Tensor]:
    """Puzzles and their solutions, [count, S] uint8 tokens: the first that are no images of earlier ones."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    first = idle = 0
    while len(found) < count:
        if idle == _PATIENCE:
            raise ValueError(
                f"found only {len(found)} different puzzles of {clues_min} to {clues_max} clues (size {size}), "
                f"but puzzles + held_out is {count}: ask for fewer, or for clues from a wider range"
            )
        number = torch.arange(first, first + _CHUNK)
        solution = _solutions(size, number)
        clue = _clues(solution, number, clues_min, clues_max)
        labels = torch.from_numpy(solution.T + DIGIT)
        inputs = torch.where(torch.from_numpy(clue.T), labels, BLANK)
        few = torch.from_numpy(clue.sum(0) <= clues_max)
        inputs, labels, known = inputs[few], labels[few], len(found)
        for key, puzzle, answer in zip(fingerprint(inputs, labels).tolist(), inputs.byte(), labels.byte(), strict=True):
            found.setdefault(key, (puzzle, answer))
        first, idle = first + _CHUNK, 0 if len(found) > known else idle + 1
    inputs, labels = zip(*list(found.values())[:count], strict=True)
    return torch.stack(inputs), torch.stack(labels)


# Candidates: [bands, rows in a band, stacks, columns in a stack, digits, N] bool, N boards (last: 20 times as fast).
# Exactly one must be left of each cell, and of each digit in each row, column and box: the sums over these axes.
_ONE_OF = ((4,), (2, 3), (0, 1), (1, 3))


def _candidates(size: int, flat: np.ndarray) -> np.ndarray:
    """Of [S, digits, N]."""
    height, width = BOXES[size]
    return flat.reshape(size // height, height, size // width, width, size, -1)


def _propagate(boards: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Strike out candidates by naked and hidden singles until nothing changes.

    Returns:
        [S, digits, N] candidates; [N], whether the board may have a solution; [S, N], candidates left per cell.
    """
    while True:
        single, possible = np.zeros_like(boards), np.ones(boards.shape[-1], bool)
        for axes in _ONE_OF:
            left = boards.sum(axes, keepdims=True, dtype=np.uint8)
            possible &= (left > 0).all((0, 1, 2, 3, 4))
            single |= left == 1
        single &= boards
        before, boards = boards, boards.copy()
        for axes in _ONE_OF:
            boards &= single | ~single.any(axes, keepdims=True)
        if not (possible & (boards != before).any((0, 1, 2, 3, 4))).any():
            size = boards.shape[4]
            flat = boards.reshape(size * size, size, -1)
            return flat, possible, flat.sum(1, dtype=np.uint8)


def _solvable(boards: np.ndarray) -> np.ndarray:
    """[N] bool, whether boards have a solution: depth-first search of all at once."""
    size = boards.shape[4]
    found = np.zeros(boards.shape[-1], bool)
    todo = [(boards, np.arange(len(found)))]
    while todo:
        boards, owner = todo.pop()
        boards, owner = boards[..., ~found[owner]], owner[~found[owner]]
        flat, possible, left = _propagate(boards)
        found[owner[possible & (left == 1).all(0)]] = True
        undecided = possible & ~found[owner]
        if not undecided.any():
            continue
        flat, owner = flat[..., undecided], owner[undecided]
        cell, board = _most_constrained(left[:, undecided]), np.arange(len(owner))
        digit = flat[cell, :, board].argmax(1)
        other = flat.copy()
        other[cell, digit, board] = False
        flat[cell, :, board] = np.arange(size) == digit[:, None]
        todo += [(_candidates(size, other), owner), (_candidates(size, flat), owner)]
    return found


def _most_constrained(left: np.ndarray) -> np.ndarray:
    """[N], the undecided cell with the fewest candidates."""
    return np.where(left > 1, left, 99).argmin(0)


def _solutions(size: int, number: Tensor) -> np.ndarray:
    """Random solutions, [S, N] int64 from 0: random digits, and from the start again where they contradict."""
    solutions = np.empty((size * size, len(number)), np.int64)
    board, step = np.arange(len(number)), 0
    flat = np.ones((size * size, size, len(number)), bool)
    while board.size:
        flat, possible, left = _propagate(_candidates(size, flat))
        done = possible & (left == 1).all(0)
        solutions[:, board[done]] = flat[..., done].argmax(1)
        flat[..., ~possible] = True
        left[:, ~possible] = size
        flat, left, board = flat[..., ~done], left[:, ~done], board[~done]
        cell, one = _most_constrained(left), np.arange(len(board))
        draw = bits(0, _FILL, step, number[board][:, None], torch.arange(size)).numpy()
        digit = np.where(flat[cell, :, one], draw, np.iinfo(np.int64).min).argmax(1)
        flat[cell, :, one] = np.arange(size) == digit[:, None]
        step += 1
    return solutions


def _clues(solution: np.ndarray, number: Tensor, clues_min: int, clues_max: int) -> np.ndarray:
    """[S, N] bool, cells that stay when clues are removed in random order while the solution is the only one."""
    cells, size = len(solution), math.isqrt(len(solution))
    order = bits(0, _REMOVE, number, torch.arange(cells)[:, None]).numpy().argsort(0, kind="stable")
    target = integers(0, _TARGET, number, low=clues_min, high=clues_max + 1).numpy()
    digit = np.arange(size)[:, None] == solution[:, None]  # [S, digits, N]
    clue = np.ones(solution.shape, bool)
    for next_cell in order:
        board = np.flatnonzero(clue.sum(0) > target)
        cell, one = next_cell[board], np.arange(len(board))
        clue[cell, board] = False
        boards = digit[..., board] | ~clue[:, None, board]
        boards[cell, solution[cell, board], one] = False  # is there a solution with another digit here?
        clue[cell, board] = _solvable(_candidates(size, boards))
    return clue
