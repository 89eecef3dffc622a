"""RulePuzzles, against the rules written out in plain Python."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from rtrl_moe_pl.tasks.puzzles.base import IGNORED, Puzzles
from rtrl_moe_pl.tasks.puzzles.grids import COLOR
from rtrl_moe_pl.tasks.puzzles.rules import FAMILIES, SPLITS, RulePuzzles

Grid = tuple[tuple[int, ...], ...]
INDEX = torch.arange(300)
TASKS = [
    RulePuzzles("colors", size=3, colors=4, train_rules=17, held_out_rules=7, demos=3),
    RulePuzzles("flips", size=4, colors=5, train_rules=6, held_out_rules=2, demos=2),  # all there are
    RulePuzzles("colors_and_flips", size=3, colors=3, train_rules=40, held_out_rules=8, demos=4),
    RulePuzzles("pattern", size=5, colors=3, train_rules=60, held_out_rules=21, demos=1),
]
ALL = (*SPLITS[:2], "train")


def grids(tokens: Tensor, n: int) -> list[Grid]:
    """Grids of colours from tokens [N, S]."""
    return [tuple(map(tuple, grid)) for grid in (tokens - COLOR).unflatten(-1, (n, n)).tolist()]


def shown(puzzles: Puzzles, row: int, n: int) -> list[tuple[Grid, Grid]]:
    """Demonstrations of a puzzle, before and after."""
    mask = puzzles.demo_mask[row]
    before, after = (grids(side[row][mask], n) for side in (puzzles.demo_inputs, puzzles.demo_labels))
    return list(zip(before, after, strict=True))


def asked(puzzles: Puzzles, row: int, n: int) -> tuple[Grid, Grid]:
    """Query and answer of a puzzle."""
    (before,), (after,) = (grids(side[row][None], n) for side in (puzzles.inputs, puzzles.labels))
    return before, after


# ---- the families in plain Python: a rule is what gives the answer of a grid


def symmetries(grid: Grid) -> list[Grid]:
    """All eight: turned counterclockwise, and then perhaps mirrored."""
    turned = [grid]
    for _ in range(3):
        turned.append(tuple(zip(*turned[-1], strict=True))[::-1])
    return turned + [tuple(row[::-1] for row in one) for one in turned]


def recoloured(grid: Grid, permutation: tuple[int, ...]) -> Grid:
    return tuple(tuple(permutation[color] for color in row) for row in grid)


def stamped(grid: Grid, pattern: tuple[int, ...]) -> Grid:
    """The pattern, by rows, with its upper left corner where the one cell of colour 1 is; black elsewhere."""
    n = len(grid)
    [corner] = [(r, c) for r, c in itertools.product(range(n), repeat=2) if grid[r][c]]
    assert grid[corner[0]][corner[1]] == 1
    answer = [[0] * n for _ in range(n)]
    for (down, right), color in zip(itertools.product(range(2), repeat=2), pattern, strict=True):
        answer[corner[0] + down][corner[1] + right] = color
    return tuple(map(tuple, answer))


def answers(task: RulePuzzles, grid: Grid) -> list[Grid]:
    """What each of the family's rules makes of a grid."""
    permutations = list(itertools.permutations(range(task.colors)))
    if task.family == "colors":
        return [recoloured(grid, permutation) for permutation in permutations]
    if task.family == "flips":
        return symmetries(grid)
    if task.family == "colors_and_flips":
        return [recoloured(one, permutation) for permutation in permutations for one in symmetries(grid)]
    patterns = itertools.product(range(1, 1 + task.colors), repeat=4)
    return [stamped(grid, pattern) for pattern in patterns]


def rules_of(task: RulePuzzles, pairs: list[tuple[Grid, Grid]]) -> set[int]:
    """Which rules agree with all of some pairs."""
    found = [{i for i, answer in enumerate(answers(task, before)) if answer == after} for before, after in pairs]
    return set.intersection(*found)


def rules_by_identity(task: RulePuzzles, puzzles: Puzzles) -> dict[int, set[int]]:
    """Which rules agree with everything that was shown under an identity."""
    found: dict[int, set[int]] = {}
    for row, identity in enumerate(puzzles.identity.tolist()):
        pairs = [asked(puzzles, row, task.size), *shown(puzzles, row, task.size)]
        found[identity] = found.get(identity, set(range(task.rules))) & rules_of(task, pairs)
    return found


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.family)
def test_all_grids_of_a_puzzle_follow_one_rule_and_no_rule_has_two_identities(task: RulePuzzles):
    assert len(answers(task, asked(task.sample("train", 0, INDEX[:1]), 0, task.size)[0])) == task.rules
    by_split = {split: rules_by_identity(task, task.sample(split, 3, INDEX)) for split in ALL}
    for found in by_split.values():
        assert all(len(rules) == 1 for rules in found.values())
    train, held_out = by_split["train"], by_split["held_out"]
    assert set(train) <= set(range(task.train_rules))
    assert set(held_out) <= set(range(task.train_rules, task.train_rules + task.held_out_rules))
    assert set(held_out) == set(range(task.train_rules, task.shape.identities))  # each is asked for
    assert not set.union(*train.values()) & set.union(*held_out.values())
    assert len(set.union(*train.values())) == len(train)
    assert all(train[identity] == rules for identity, rules in by_split["train_rules"].items() if identity in train)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.family)
def test_an_answer_that_is_changed_follows_no_rule(task: RulePuzzles):
    """Negative control of the checks here."""
    puzzles = task.sample("train", 3, INDEX[:20])
    other = puzzles._replace(labels=puzzles.labels.roll(1, 1))
    wrong = [rules_of(task, [asked(other, row, task.size), *shown(other, row, task.size)]) for row in range(20)]
    assert sum(not rules for rules in wrong) >= 18


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.family)
def test_no_seed_changes_which_rules_are_held_out(task: RulePuzzles):
    one, two = (rules_by_identity(task, task.sample("held_out", seed, INDEX)) for seed in (0, 1))
    assert one == two


def test_more_training_rules_keep_those_there_were():
    few, many = (RulePuzzles(train_rules=count, held_out_rules=1) for count in (10, 100))
    one, two = (rules_by_identity(task, task.sample("train_rules", 0, torch.arange(600))) for task in (few, many))
    assert set(one) == set(range(10))
    assert all(two[identity] == rules for identity, rules in one.items() if identity in two)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.family)
def test_the_control_asks_for_the_same_and_shows_another_rule(task: RulePuzzles):
    real, control = (task.sample(split, 5, INDEX) for split in ("held_out", "shuffled_demos"))
    for name in ("inputs", "labels", "demo_inputs", "demo_mask", "identity"):
        assert torch.equal(getattr(real, name), getattr(control, name))
    assert not torch.equal(real.demo_labels, control.demo_labels)
    known = rules_by_identity(task, real)
    seen, deceived = set(), 0
    for row, identity in enumerate(control.identity.tolist()):
        rules = rules_of(task, shown(control, row, task.size))
        assert rules  # one and the same rule for all demonstrations of a puzzle
        deceived += not rules & known[identity]
        seen |= rules
    assert deceived >= 0.8 * len(INDEX)  # some demonstrations leave several rules open
    trained = set.union(*rules_by_identity(task, task.sample("train_rules", 0, INDEX)).values())
    assert seen & trained  # of all the others, trained and not
    assert seen & set.union(*known.values())


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.family)
def test_the_control_never_shows_the_rule_that_is_asked_for(task: RulePuzzles):
    """By the numbers of rules: grids may not tell two rules apart."""
    index = torch.arange(20_000)
    shown_numbers: list[Tensor] = []

    class Watched(RulePuzzles):
        def _apply(self, identity: Tensor, grids: Tensor) -> Tensor:
            shown_numbers.append(identity)
            return super()._apply(identity, grids)

    Watched(task.family, task.size, task.colors, 1, 2, 1).sample("shuffled_demos", 0, index)  # 3 rules in all
    query, demos = shown_numbers
    assert not (query == demos).any()
    assert set(demos.tolist()) == {0, 1, 2}


@pytest.mark.parametrize("split", ["train", *SPLITS])
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.family)
def test_puzzles_depend_on_seed_and_index_alone(task: RulePuzzles, split: str):
    index = torch.tensor([5, 0, 1_000_000_007, 5])
    together = task.sample(split, 1, index)
    for row, one in enumerate(index):
        for alone, whole in zip(task.sample(split, 1, one[None]), together, strict=True):
            assert torch.equal(alone[0], whole[row])
    assert all(len(part) == 0 for part in task.sample(split, 1, index[:0]))
    other = task.sample(split, 2, INDEX)
    assert not torch.equal(other.inputs, task.sample(split, 1, INDEX).inputs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares the CPU with a GPU")
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.family)
def test_a_gpu_draws_the_same_puzzles(task: RulePuzzles):
    for split in ("train", "shuffled_demos"):
        pair = (task.sample(split, 0, index) for index in (INDEX, INDEX.cuda()))
        for mine, its in zip(*pair, strict=True):
            assert torch.equal(its.cpu(), mine)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.family)
def test_layout(task: RulePuzzles):
    shape, k, s = task.shape, task.demos, task.size**2
    puzzles = task.draw("train", 0, torch.tensor([3, -1, 7]))
    assert (shape.height, shape.width, shape.max_demos) == (task.size, task.size, k)
    assert shape.identities == task.train_rules + task.held_out_rules
    assert puzzles.inputs.shape == puzzles.labels.shape == (3, s)
    assert puzzles.demo_inputs.shape == puzzles.demo_labels.shape == (3, k, s)
    assert (puzzles.demo_mask.shape, puzzles.demo_mask.dtype) == ((3, k), torch.bool)
    assert all(part.dtype == torch.int64 for name, part in puzzles._asdict().items() if name != "demo_mask")
    assert puzzles.valid.tolist() == [True, False, True]
    assert bool((puzzles.labels[1] == IGNORED).all())  # the rest of padding is a puzzle like others
    first = task.sample("train", 0, torch.tensor([0]))
    assert torch.equal(puzzles.inputs[1], first.inputs[0])
    many = task.sample("train", 0, INDEX)
    tokens = torch.cat([part.flatten() for part in many[:4]])
    assert set(tokens.tolist()) == set(range(COLOR, shape.vocabulary))  # every one, and none beyond
    assert len(task.look.colors) == len(task.look.symbols) == shape.vocabulary
    assert task.evaluation_splits == SPLITS
    assert [task.count(split) for split in ("train", *SPLITS)] == [None] * 4


def test_the_widest_vocabulary_has_a_colour_and_a_symbol_for_every_token():
    for task in (RulePuzzles("colors", colors=9), RulePuzzles("pattern", colors=9)):
        look, vocabulary = task.look, task.shape.vocabulary
        assert len(set(look.colors)) == len(look.colors) == len(look.symbols) == vocabulary
        assert look.symbols[COLOR:] == tuple(str(color) for color in range(vocabulary - COLOR))


def test_rules_and_grids_are_drawn_evenly():
    task, count = RulePuzzles(train_rules=96, held_out_rules=24), 24_000
    puzzles = task.sample("train", 0, torch.arange(count))
    per_rule = torch.bincount(puzzles.identity, minlength=96) / count
    assert bool(((per_rule - 1 / 96).abs() < 5 * (1 / 96 / count) ** 0.5).all())
    colors = torch.bincount(puzzles.inputs.flatten() - COLOR, minlength=5) / (16 * count)
    assert bool(((colors - 1 / 5).abs() < 5 * (0.2 / (16 * count)) ** 0.5).all())
    places = RulePuzzles("pattern", size=4).sample("train", 0, torch.arange(count)).inputs.argmax(1)
    assert sorted(set(places.tolist())) == [0, 1, 2, 4, 5, 6, 8, 9, 10]  # wherever the pattern fits in


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.9])
def test_dropped_demonstrations_leave_at_least_one(rate: float):
    task, count = RulePuzzles("flips", 2, 2, 4, 4, demos=4, demo_dropout=rate), 20_000
    index = torch.arange(count)
    puzzles = task.sample("train", 0, index)
    assert bool(puzzles.demo_mask.any(1).all())
    left_out = (~puzzles.demo_mask).double().mean(0)  # of each place
    assert left_out.tolist() == pytest.approx([rate * 3 / 4] * 4, abs=5 * (0.25 / count) ** 0.5)
    whole = RulePuzzles("flips", 2, 2, 4, 4, demos=4).sample("train", 0, index)
    assert torch.equal(whole.demo_inputs, puzzles.demo_inputs)  # else nothing changes
    for split in SPLITS:
        assert bool(task.sample(split, 0, index).demo_mask.all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"family": "shapes"}, "family must be one of 'colors', 'flips', 'colors_and_flips', 'pattern', got 'shapes'"),
        ({"size": 1}, "size must be at least 2, got 1"),
        ({"colors": 1}, "colors must be at least 2, got 1"),
        ({"colors": 10}, "colors must be at most 9, got 10"),
        ({"demos": 0}, "demos must be at least 1, got 0"),
        ({"train_rules": 0}, "train_rules must be at least 1, got 0"),
        ({"held_out_rules": 0}, "held_out_rules must be at least 1, got 0"),
        (
            {"train_rules": 100, "held_out_rules": 21},
            r"train_rules \+ held_out_rules must be at most 120, the number of rules of family 'colors' with 5 colors, "
            r"got 100 \+ 21",
        ),
        ({"family": "flips"}, "at most 8, the number of rules of family 'flips'"),
        ({"family": "colors_and_flips", "colors": 2}, "at most 16, "),
        ({"family": "pattern", "colors": 3}, "at most 81, "),
        ({"demo_dropout": 1.0}, r"demo_dropout must be a probability below 1, got 1\.0"),
        ({"demo_dropout": -0.1}, r"demo_dropout must be a probability below 1, got -0\.1"),
        ({"demo_dropout": float("nan")}, "demo_dropout must be a probability below 1, got nan"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        RulePuzzles(**options)


@pytest.mark.parametrize("option", ["size", "colors", "demos", "train_rules", "held_out_rules"])
def test_a_fraction_is_refused(option: str):
    with pytest.raises(TypeError, match=rf"^{option} must be an integer, got 2\.5$"):
        RulePuzzles(**{option: 2.5})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unknown_set_is_refused(family: str):
    task = RulePuzzles(family, train_rules=4, held_out_rules=4)
    with pytest.raises(ValueError, match=r"split must be one of 'train', 'held_out', 'train_rules', 'shuffled_demos'"):
        task.sample("test", 0, INDEX)


def test_golden_puzzles():
    """What earlier runs were trained on stays what it is."""
    task = RulePuzzles("colors_and_flips", 2, 3, train_rules=4, held_out_rules=2, demos=2, demo_dropout=0.5)
    assert [part.tolist() for part in task.sample("train", 0, INDEX[:2])] == [
        [[3, 3, 2, 4], [3, 3, 4, 4]],
        [[4, 4, 3, 2], [4, 4, 3, 3]],
        [[[3, 3, 4, 3], [4, 3, 3, 4]], [[3, 2, 2, 4], [2, 4, 2, 4]]],
        [[[4, 4, 4, 3], [4, 3, 3, 4]], [[2, 4, 3, 2], [3, 2, 3, 2]]],
        [[True, True], [False, True]],
        [2, 2],
    ]
