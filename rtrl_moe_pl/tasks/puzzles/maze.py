"""Mazes: the shortest path from start to goal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rtrl_moe_pl.cells.base import at_least
from rtrl_moe_pl.randomness import bits, integers
from rtrl_moe_pl.tasks.base import one_of
from rtrl_moe_pl.tasks.puzzles.base import Puzzles, PuzzleShape, PuzzleTask
from rtrl_moe_pl.tasks.puzzles.colors import NONE, Look

PAD, WALL, FREE, START, GOAL, PATH = range(6)  # tokens
SPLITS = ("train", "held_out")
_WEIGHT, _START, _GOAL = range(3)  # what a draw is for
_INT64 = torch.iinfo(torch.int64)


@dataclass(frozen=True)
class Maze(PuzzleTask):
    """A maze with a start and a goal; the answer marks the path between them, and every cell is asked for.

    Rooms are the cells whose row and column (from 0) are even, and a random spanning tree connects neighbours: there
    are no loops, so that the path is unique. The tree is the minimum spanning tree of random weights (Prim's
    algorithm). Beyond the grid is wall; so are the last row and column of an even ``size``.

    Start is a random room, and goal a random one of those at least ``min_path`` steps away; where no room is so far,
    the farthest. Training and held-out mazes are drawn independently, without end: of small grids they share some (of
    3 x 3 there are 4 mazes, of 5 x 5 192, of 7 x 7 100352, each with all starts and goals).

    Args:
        size: n, height and width in cells, at least 3.
        min_path: least length of the path, in steps from cell to cell; rooms are two steps apart.

    Raises:
        TypeError, ValueError: for options out of range, naming the option.
    Cost: n^2 / 4 sequential steps of time B n^2 (B=32, n=30, one CPU core: 0.05 s), memory B n^2.
    References: Prim 1957, Bell System Technical Journal 36(6):1389-1401.
    """

    size: int = 9
    min_path: int = 2

    def __post_init__(self) -> None:
        at_least(3, "size", self.size)
        at_least(2, "min_path", self.min_path)
        longest = 2 * (self._rooms**2 - 1)
        if self.min_path > longest:
            raise ValueError(
                f"min_path must be at most {longest}, the longest path for size {self.size}, got {self.min_path}"
            )

    @property
    def _rooms(self) -> int:  # in a row
        return (self.size + 1) // 2

    @property
    def shape(self) -> PuzzleShape:
        return PuzzleShape(6, self.size, self.size)

    first_token = WALL

    @property
    def look(self) -> Look:
        colors = ("#ffffff", "#000000", "#ffffff", "#2ecc40", "#ff4136", "#ffdc00")
        return Look(colors, (NONE, "#", "", "S", "G", "."))

    @property
    def evaluation_splits(self) -> tuple[str, ...]:
        return SPLITS[1:]

    def sample(self, split: str, seed: int, index: Tensor) -> Puzzles:
        one_of(SPLITS, "split", split)
        seed = int(bits(seed, SPLITS.index(split)))
        start = integers(seed, _START, index[:, None], low=0, high=self._rooms**2)  # [B, 1], a room
        parent, depth = self._tree(seed, index, start)
        far = depth >= depth.amax(1, keepdim=True).clamp(max=(self.min_path + 1) // 2)
        draw = bits(seed, _GOAL, index[:, None], torch.arange(self._rooms**2, device=index.device))
        goal = torch.where(far, draw, _INT64.min).argmax(1, keepdim=True)
        on_path, room = torch.zeros_like(far), goal
        for _ in range(self._rooms**2 - 1):  # the longest path: asking for this batch's would wait for the device
            on_path.scatter_(1, room, True)
            room = parent.gather(1, room)  # the start stays where it is

        room = torch.arange(self._rooms**2, device=index.device)
        room = (2 * (room // self._rooms * self.size + room % self._rooms)).expand_as(parent)  # [B, R] cells
        door = (room + room.gather(1, parent)) // 2  # the cell between a room and its parent; the start itself
        inputs = torch.full((len(index), self.size**2), WALL, device=index.device)
        inputs.scatter_(1, room, FREE).scatter_(1, door, FREE)
        inputs.scatter_(1, room.gather(1, start), START).scatter_(1, room.gather(1, goal), GOAL)
        path = torch.zeros_like(inputs).scatter_(1, room, on_path.long()).scatter_(1, door, on_path.long())
        labels = torch.where((path == 1) & (inputs == FREE), PATH, inputs)
        none = inputs.new_empty(len(index), 0, self.size**2)
        return Puzzles(inputs, labels, none, none, none[..., 0].bool(), torch.zeros_like(index))

    def _tree(self, seed: int, index: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """A random spanning tree: for each room its neighbour towards the start, and how many rooms away that is.

        Returns:
            parent (start's: itself), depth: [B, R] int64.
        """
        room = torch.arange(self._rooms**2, device=index.device).unflatten(0, (self._rooms, self._rooms))
        one = torch.cat([room[:, :-1].flatten(), room[:-1].flatten()])  # [E], ends of all possible connections
        two = torch.cat([room[:, 1:].flatten(), room[1:].flatten()])
        weight = bits(seed, _WEIGHT, index[:, None], torch.arange(len(one), device=index.device))  # [B, E]
        parent = room.flatten().repeat(len(index), 1)
        depth = torch.zeros_like(parent)
        inside = torch.zeros_like(parent, dtype=torch.bool).scatter_(1, start, True)
        for _ in range(self._rooms**2 - 1):
            leaves = inside[:, one] ^ inside[:, two]
            least = torch.where(leaves, weight, _INT64.max).argmin(1, keepdim=True)
            forward = inside.gather(1, one[least])
            known, new = torch.where(forward, one[least], two[least]), torch.where(forward, two[least], one[least])
            parent.scatter_(1, new, known)
            depth.scatter_(1, new, depth.gather(1, known) + 1)
            inside.scatter_(1, new, True)
        return parent, depth
