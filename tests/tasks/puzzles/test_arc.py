from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rtrl_moe_pl.tasks.puzzles.arc import SPLITS, ArcPuzzles
from rtrl_moe_pl.tasks.puzzles.arc_grids import crop, off_canvas, transform
from rtrl_moe_pl.tasks.puzzles.base import IGNORED, Puzzles
from rtrl_moe_pl.tasks.puzzles.grids import COLOR, PAD, inverse
from tests.tasks.puzzles.arc_case import content, write

N = 400  # draws: enough to see all there is to see in the small tasks
INDEX = torch.arange(N)
PLAIN: Any = {"dihedral": False, "colors": False, "translate": False, "max_size": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """3 training and 2 held-out tasks; one with two test pairs, one of four demonstrations, one of one."""
    path = tmp_path_factory.mktemp("arc")
    write(path, "training", {"a": content(0, 3, 2), "b": content(1, 4), "c": content(2, 1)})
    write(path, "evaluation", {"d": content(3, 3), "e": content(4, 2, 2, answered=False)})
    return str(path)


@pytest.fixture(scope="module")
def whole() -> ArcPuzzles:
    return ArcPuzzles()


@pytest.fixture(scope="module")
def small() -> ArcPuzzles:
    return ArcPuzzles(max_size=10, votes=4)


# ---- data


def test_numbers_of_tasks_with_small_grids(small: ArcPuzzles, whole: ArcPuzzles):
    assert (len(small._parts[0]), len(small._parts[1])) == (178, 77)
    assert (small.shape.vocabulary, small.shape.height, small.shape.width, small.shape.max_demos) == (12, 10, 10, 10)
    assert small.shape.identities == 178 + 77
    assert (len(whole._parts[0]), len(whole._parts[1])) == (400, 400)
    assert [whole.count(split) for split in ("train", *SPLITS)] == [None, 419, 416, 419]


def test_versions_are_never_mixed(whole: ArcPuzzles):
    """376 evaluation tasks of ARC-1 are training tasks of ARC-2: one instance knows one version."""
    one, two = (
        [{task.name for task in part} for part in puzzles._parts] for puzzles in (whole, ArcPuzzles(source="arc2"))
    )
    assert [len(part) for part in one + two] == [400, 400, 1000, 120]
    assert len(one[1] & two[0]) == 376
    assert not one[0] & one[1]
    assert not two[0] & two[1]


def test_a_part_of_the_tasks_is_the_first_of_all(small: ArcPuzzles):
    part = ArcPuzzles(max_size=10, groups=32, held_out_groups=5)
    for all_of, some, count in zip(small._parts, part._parts, (32, 5), strict=True):
        assert [task.name for task in some] == [task.name for task in all_of[:count]]
        names = [task.name for task in all_of]
        assert names != sorted(names)


def decoded(puzzles: Puzzles) -> list[tuple[tuple[int, int], set[tuple[int, int]]]]:
    """(task, pair) of each query, and of its demonstrations, of puzzles from `folder` that are not augmented."""
    query = [tuple(cells) for cells in (puzzles.inputs[:, :2] - COLOR).tolist()]
    demos = (puzzles.demo_inputs[..., :2] - COLOR).tolist()
    kept = puzzles.demo_mask.tolist()
    return [
        (q, {tuple(demo) for demo, there in zip(d, k, strict=True) if there})
        for q, d, k in zip(query, demos, kept, strict=True)
    ]


def everything(folder: str, **options: Any) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """All (task, pair) that training asks for, and that it shows; what is asked for is never shown with it."""
    asked, shown = set(), set()
    for query, demos in decoded(ArcPuzzles(source=folder, **PLAIN, **options).sample("train", 0, INDEX)):
        assert query not in demos
        assert demos
        assert {task for task, _ in demos} == {query[0]}
        asked.add(query)
        shown |= demos
    return asked, shown


ALL_A, ALL_B, ALL_C = ({(task, pair) for pair in range(count)} for task, count in ((0, 5), (1, 5), (2, 2)))
DEMOS_A, DEMOS_B, DEMOS_C = ALL_A - {(0, 0), (0, 1)}, ALL_B - {(1, 0)}, {(2, 1)}
DEMOS_HELD_OUT = {(3, 1), (3, 2), (3, 3), (4, 2), (4, 3)}


def test_leave_one_out_asks_for_every_pair_and_never_shows_it(folder: str):
    asked, shown = everything(folder)
    assert asked == shown == ALL_A | ALL_B | ALL_C  # the check inside has something to find: all are shown as well


def test_queries_of_test_pairs_are_given_the_demonstrations(folder: str):
    asked, shown = everything(folder, queries="test")
    assert asked == {(0, 0), (0, 1), (1, 0), (2, 0)}
    assert shown == DEMOS_A | DEMOS_B | DEMOS_C


@pytest.mark.parametrize("queries", ["leave_one_out", "test"])
def test_training_sees_of_held_out_tasks_what_the_protocol_says(folder: str, queries: str):
    asked, shown = everything(folder, queries=queries)
    assert {task for task, _ in asked | shown} == {0, 1, 2}
    with_demos, with_shown = everything(folder, queries=queries, protocol="transductive")
    assert (with_demos - asked, with_shown - shown) == (DEMOS_HELD_OUT, DEMOS_HELD_OUT)  # and no test pair
    assert (asked - with_demos, shown - with_shown) == (set(), set())


def test_held_out_identities_are_never_trained(small: ArcPuzzles):
    train = small.sample("train", 0, INDEX).identity
    held_out = small.sample("held_out", 0, torch.arange(77)).identity
    assert int(train.max()) < 178 <= int(held_out.min())
    assert len(train.unique()) > 140
    transductive = ArcPuzzles(max_size=10, protocol="transductive").sample("train", 0, INDEX).identity
    assert bool((transductive >= 178).any())


def test_evaluation_asks_for_test_inputs_and_shows_the_demonstrations_in_order(folder: str):
    puzzles = ArcPuzzles(source=folder, **PLAIN)
    number = {task.name: i for i, task in enumerate(puzzles.tasks)}
    assert [puzzles.count(split) for split in SPLITS] == [3, 4, 3]
    for split, expected in (
        ("held_out", {(3, 0): [1, 2, 3], (4, 0): [2, 3], (4, 1): [2, 3]}),
        ("train_rules", {(0, 0): [2, 3, 4], (0, 1): [2, 3, 4], (1, 0): [1, 2, 3, 4], (2, 0): [1]}),
    ):
        index = torch.arange(len(expected))
        drawn = puzzles.sample(split, 0, index)
        assert {query: sorted(pair for _, pair in demos) for query, demos in decoded(drawn)} == expected
        order = drawn.demo_inputs[..., 1][drawn.demo_mask]
        assert order.tolist() == [COLOR + pair for query, _ in decoded(drawn) for pair in expected[query]]
        assert drawn.identity.tolist() == [number["abcde"[task]] for (task, _), _ in decoded(drawn)]


def test_the_control_shows_demonstrations_of_another_task(folder: str):
    puzzles = ArcPuzzles(source=folder, **PLAIN)
    index = torch.arange(3)
    for seed in range(20):
        plain, control = puzzles.sample("held_out", seed, index), puzzles.sample("shuffled_demos", seed, index)
        for name in ("inputs", "labels", "identity"):
            assert torch.equal(getattr(plain, name), getattr(control, name))
        for (query, demos), (same, others) in zip(decoded(plain), decoded(control), strict=True):
            assert query == same
            assert {task for task, _ in demos} == {query[0]}
            assert query[0] not in {task for task, _ in others}


def test_a_question_without_an_answer_asks_for_nothing_and_is_never_trained_on(folder: str, tmp_path: Path):
    puzzles = ArcPuzzles(source=folder, **PLAIN)
    drawn = puzzles.sample("held_out", 0, torch.arange(3))
    unanswered = drawn.inputs[:, 0] == COLOR + 4
    assert unanswered.sum() == 2
    assert torch.equal(drawn.valid, ~unanswered)
    write(tmp_path, "", {"a": content(0, 2, 1, answered=False), "b": content(1, 1, 1, answered=False), "c": content(2)})
    tasks = ArcPuzzles(source=write_parts(tmp_path), **PLAIN)
    drawn = tasks.sample("train", 0, INDEX)
    assert bool(drawn.valid.all())
    assert {query for query, _ in decoded(drawn)} == {(0, 1), (0, 2)}  # b has nothing to ask for


def write_parts(path: Path) -> str:
    """Move c into evaluation/, the others into training/."""
    for part, names in (("training", "ab"), ("evaluation", "c")):
        (path / part).mkdir()
        for name in names:
            (path / f"{name}.json").rename(path / part / f"{name}.json")
    return str(path)


def test_a_folder_without_evaluation_holds_out_what_it_is_told_to(tmp_path: Path):
    path = str(write(tmp_path, "", {name: content(task) for task, name in enumerate("abcdef")}))
    whole = ArcPuzzles(source=path, held_out_groups=2, max_size=6)
    assert [len(part) for part in whole._parts] == [4, 2]
    assert len({task.name for task in whole.tasks}) == 6
    with pytest.raises(ValueError, match="has no evaluation tasks: set held_out_groups"):
        ArcPuzzles(source=path)
    with pytest.raises(ValueError, match=r"^held_out_groups must be below 6, the number of tasks in .* got 6"):
        ArcPuzzles(source=path, held_out_groups=6)


# ---- what training draws


def test_a_puzzle_is_the_same_whatever_the_batch(small: ArcPuzzles):
    order = torch.randperm(N)
    for split in ("train", *SPLITS):
        index = INDEX % (small.count(split) or N)
        whole, shuffled = small.sample(split, 5, index), small.sample(split, 5, index[order])
        assert all(torch.equal(a[order], b) for a, b in zip(whole, shuffled, strict=True))
    assert not torch.equal(small.sample("train", 5, INDEX).inputs, small.sample("train", 6, INDEX).inputs)


def test_training_puzzles_undone_are_the_pairs_of_their_task(small: ArcPuzzles):
    origin = small.origin("train", 3, INDEX)
    puzzles = small.sample("train", 3, INDEX)
    assert len(origin.element.unique()) == 8
    assert len(origin.offset.unique(dim=0)) > 20
    for tokens, number in ((puzzles.inputs, 0), (puzzles.labels.masked_fill(puzzles.labels == IGNORED, PAD), 1)):
        cells, size = crop(tokens.view(N, 10, 10), origin.offset)
        back, _ = transform(cells[:, None], size[:, None], inverse(origin.element), origin.permutation.argsort(-1))
        for row, (group, query) in enumerate(zip(origin.group.tolist(), origin.query.tolist(), strict=True)):
            grid = small.tasks[group].pairs[query][number]
            assert grid is not None
            assert np.array_equal(off_canvas(back[row, 0].numpy()), grid)
    assert torch.equal(puzzles.demo_mask.any(1), torch.ones(N, dtype=torch.bool))
    assert not puzzles.demo_inputs[~puzzles.demo_mask].any()
    assert not puzzles.demo_labels[~puzzles.demo_mask].any()


@pytest.mark.parametrize("option", ["dihedral", "colors", "translate"])
def test_an_augmentation_can_be_left_out(folder: str, option: str):
    for value in (True, False):
        origin = ArcPuzzles(source=folder, **PLAIN | {option: value}).origin("train", 0, INDEX)
        made = {
            "dihedral": bool(origin.element.any()),
            "colors": bool((origin.permutation != torch.arange(10)).any()),
            "translate": bool(origin.offset.any()),
        }
        assert made == {name: value and name == option for name in made}


def test_all_grids_of_a_puzzle_are_augmented_alike(folder: str):
    puzzles = ArcPuzzles(source=folder, max_size=6).sample("train", 0, INDEX)
    query, demos = puzzles.inputs >= COLOR, puzzles.demo_inputs[puzzles.demo_mask] >= COLOR
    assert torch.equal(demos, query[puzzles.demo_mask.nonzero()[:, 0]])  # grids of one size lie on the same cells
    assert len(query.unique(dim=0)) == 48  # 1 x 3 or 3 x 1, at 24 places each


def test_more_pairs_than_demonstrations_are_left_out_at_random(folder: str):
    puzzles = ArcPuzzles(source=folder, max_demos=4, **PLAIN)
    drawn = decoded(puzzles.sample("train", 0, INDEX))
    assert {len(demos) for (task, _), demos in drawn if task == 0} == {4}
    shown = Counter(pair for query, demos in drawn if query == (1, 2) for pair in demos)
    assert set(shown) == ALL_B - {(1, 2)}
    with pytest.raises(ValueError, match="max_demos must be at least 4, the demonstrations of task 'b', got 3"):
        ArcPuzzles(source=folder, max_demos=3, **PLAIN)


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_leave_one_out_query_is_shown_any_of_too_many_others(tmp_path: Path, shuffle: bool):
    write(tmp_path, "training", {"a": content(0, 3, 3)})
    write(tmp_path, "evaluation", {"b": content(1)})
    puzzles = ArcPuzzles(source=str(tmp_path), max_demos=3, shuffle_demos=shuffle, **PLAIN)
    shown = Counter(frozenset(demos) for query, demos in decoded(puzzles.sample("train", 0, INDEX)) if query == (0, 0))
    assert {len(demos) for demos in shown} == {3}
    assert len(shown) == 10  # any 3 of the 5 others


def test_only_grids_that_are_there_bound_the_translation(tmp_path: Path):
    """A held-out test pair would tell its size."""
    task = content(1)
    task["test"] = [{"input": [[1] * 6] * 6, "output": [[2] * 6] * 6}]
    write(tmp_path, "training", {"a": content(0)})
    write(tmp_path, "evaluation", {"b": task})
    puzzles = ArcPuzzles(source=str(tmp_path), **PLAIN | {"translate": True, "protocol": "transductive"})
    origin = puzzles.origin("train", 0, INDEX)
    assert origin.offset[origin.group == 1].amax(0).tolist() == [5, 3]


def test_dropped_demonstrations_leave_at_least_one(folder: str):
    drawn = ArcPuzzles(source=folder, demo_dropout=0.7, **PLAIN).sample("train", 0, INDEX)
    counts = drawn.demo_mask.sum(1)
    assert int(counts.min()) == 1
    assert int(counts.max()) >= 3
    assert bool((drawn.demo_mask.long().cummin(1).values == drawn.demo_mask.long()).all())  # those kept come first
    assert (
        int(ArcPuzzles(source=folder, demo_dropout=0.7, **PLAIN).sample("held_out", 0, INDEX[:1]).demo_mask.sum()) > 1
    )


def test_demonstrations_come_in_any_order_or_in_their_own(folder: str):
    for shuffle in (True, False):
        drawn = ArcPuzzles(source=folder, shuffle_demos=shuffle, **PLAIN).sample("train", 0, INDEX)
        pair = drawn.demo_inputs[..., 1].masked_fill(~drawn.demo_mask, 99)
        assert bool((pair.diff() >= 0).all()) != shuffle


# ---- fixed augmentations and votes


def test_an_identity_names_a_group_and_its_augmentation():
    puzzles = ArcPuzzles(max_size=10, groups=4, held_out_groups=3, augmentations=3, votes=2)
    assert puzzles.shape.identities == 7 * 3
    known: dict[int, tuple] = {}
    for split, seed in (("train", 0), ("train", 1), ("held_out", 0), ("train_rules", 0)):
        index = torch.arange(puzzles.count(split) or N)
        origin, identity = puzzles.origin(split, seed, index), puzzles.sample(split, seed, index).identity
        assert torch.equal(identity // 3, origin.group)
        for number, element, permutation in zip(
            identity.tolist(), origin.element.tolist(), origin.permutation.tolist(), strict=True
        ):
            assert known.setdefault(number, (element, permutation)) == (element, permutation)
            assert ((element, permutation) == (0, list(range(10)))) == (number % 3 == 0)
    assert set(known) == {*range(4 * 3), *(group * 3 + number for group in range(4, 7) for number in range(2))}


def test_augmentations_that_give_the_same_puzzle_count_once(tmp_path: Path):
    one = {"train": [{"input": [[3]], "output": [[3]]}] * 2, "test": [{"input": [[3]], "output": [[4]]}]}
    write(tmp_path, "training", {"a": one})
    write(tmp_path, "evaluation", {"b": one})
    puzzles = ArcPuzzles(source=str(tmp_path), max_size=3, votes=50)
    assert puzzles.count("held_out") == 9  # 9 colours of one cell; its answer is not given, and tells nothing apart
    assert len(puzzles.sample("held_out", 0, torch.arange(9)).inputs.unique(dim=0)) == 9
    assert ArcPuzzles(source=str(tmp_path), max_size=3, votes=50, colors=False).count("held_out") == 1


def test_the_first_vote_is_not_augmented_and_the_others_differ(small: ArcPuzzles):
    size = small.count("held_out")
    assert size is not None
    index = torch.arange(size)
    origin = small.origin("held_out", 0, index)
    question = torch.stack([origin.group, origin.query], 1)
    start = torch.cat([torch.tensor([True]), (question.diff(dim=0) != 0).any(1)])
    assert int(start.sum()) == 88
    plain = (origin.element == 0) & (origin.permutation == torch.arange(10)).all(1)
    assert torch.equal(plain, start)
    assert not origin.offset.any()
    assert size == 4 * 88
    puzzles = small.sample("held_out", 0, index)
    seen = torch.cat([puzzles.inputs, puzzles.demo_inputs.flatten(1), puzzles.demo_labels.flatten(1)], 1)
    assert len(seen.unique(dim=0)) == size


def test_golden_puzzles(folder: str):
    puzzles = ArcPuzzles(source=folder, max_size=4)
    drawn = puzzles.sample("train", 0, torch.arange(2))
    assert drawn.inputs.view(2, 4, 4).tolist() == [
        [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 3, 2, 7]],
        [[0, 0, 10, 1], [0, 0, 10, 1], [0, 0, 10, 1], [0, 0, 1, 0]],
    ]
    assert drawn.demo_inputs[drawn.demo_mask].view(-1, 4, 4).tolist() == [
        [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 3, 3, 7]],
        [[0, 0, 10, 1], [0, 0, 7, 1], [0, 0, 10, 1], [0, 0, 1, 0]],
        [[0, 0, 10, 1], [0, 0, 5, 1], [0, 0, 10, 1], [0, 0, 1, 0]],
        [[0, 0, 10, 1], [0, 0, 6, 1], [0, 0, 10, 1], [0, 0, 1, 0]],
        [[0, 0, 10, 1], [0, 0, 2, 1], [0, 0, 10, 1], [0, 0, 1, 0]],
    ]
    assert drawn.identity.tolist() == [1, 2]


# ---- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "arc3"}, "source must be 'arc1', 'arc2' or a folder of ARC JSON files, got 'arc3'"),
        ({"max_size": 31}, "max_size must be at most 30, got 31"),
        ({"max_size": 0}, "max_size must be at least 1, got 0"),
        ({"max_size": 2}, "^max_size must be at least 3, or no task of '.*' is left, got 2"),
        ({"groups": 4}, "groups must be at most 3, .* up to 30 x 30, got 4"),
        ({"groups": 0}, "groups must be at least 1, got 0"),
        ({"held_out_groups": 3}, "held_out_groups must be at most 2, "),
        ({"protocol": "both"}, "protocol must be one of 'held_out', 'transductive', got 'both'"),
        ({"queries": "all"}, "queries must be one of 'leave_one_out', 'test', got 'all'"),
        ({"max_demos": 0}, "max_demos must be at least 1, got 0"),
        ({"demo_dropout": 1.0}, r"demo_dropout must be a probability below 1, got 1\.0"),
        ({"votes": 0}, "votes must be at least 1, got 0"),
        ({"augmentations": 3, "votes": 4}, "votes must be at most augmentations=3, got 4"),
        ({"augmentations": -1}, "augmentations must be at least 0, got -1"),
    ],
)
def test_options_out_of_range_are_refused(folder: str, options: dict[str, Any], message: str):
    options = {"source": folder} | options
    with pytest.raises(ValueError, match=message):
        ArcPuzzles(**options)


def test_a_task_on_both_sides_and_nothing_to_train_on_are_refused(tmp_path: Path):
    write(tmp_path, "training", {"a": content(0, 1, 1, answered=False)})
    write(tmp_path, "evaluation", {"b": content(1)})
    with pytest.raises(ValueError, match="has nothing to train on"):
        ArcPuzzles(source=str(tmp_path))
    write(tmp_path, "training", {"b": content(1)})
    with pytest.raises(ValueError, match="task 'b' is both for training and for evaluation"):
        ArcPuzzles(source=str(tmp_path))


def test_an_unknown_set_is_refused(small: ArcPuzzles):
    with pytest.raises(ValueError, match=r"split must be one of 'train', 'held_out', .*, got 'valid'"):
        small.sample("valid", 0, INDEX)
