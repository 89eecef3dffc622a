"""The tree against brute force: any operator, any range, across the wrap."""

from __future__ import annotations

from functools import reduce

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from rtrl_moe_pl.sensitivities import CircularSegmentTree

EYE = torch.eye(3, dtype=torch.float64)


def matrices(count: int, lanes: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, lanes, 3, 3, dtype=torch.float64, generator=generator)


def product(items: list[Tensor], like: Tensor) -> Tensor:
    """The later on the left."""
    return reduce(lambda earlier, later: later @ earlier, items, EYE.expand_as(like))


@settings(max_examples=200, deadline=None)
@given(capacity=st.integers(1, 70), count=st.integers(0, 150), data=st.data())
def test_any_associative_operator_in_order(capacity: int, count: int, data: st.DataObject) -> None:
    """Strings do not commute: an order that is wrong anywhere shows."""
    tree = CircularSegmentTree(capacity, lambda later, earlier: earlier + later, "")
    items = [chr(200 + number) for number in range(count)]
    for item in items:
        tree.append(item)
    kept = items[-capacity:]
    assert len(tree) == len(kept)
    start = data.draw(st.integers(0, len(kept)))
    stop = data.draw(st.integers(start, len(kept)))
    assert tree.query(start, stop) == "".join(kept[start:stop])


@settings(max_examples=60, deadline=None)
@given(capacity=st.sampled_from([1, 2, 5, 8, 64]), count=st.integers(1, 140), data=st.data())
def test_ranges_per_lane_and_expert(capacity: int, count: int, data: st.DataObject) -> None:
    items = matrices(count)
    tree = CircularSegmentTree(capacity, torch.matmul, EYE)
    for item in items:
        tree.append(item)
    kept = items[-capacity:]
    pairs = [sorted(data.draw(st.tuples(*[st.integers(0, len(kept))] * 2))) for _ in range(6)]
    start, stop = torch.tensor(pairs).T.reshape(2, 2, 3)  # two lanes, three experts
    found = tree.query(start, stop)
    assert found.shape == (2, 3, 3, 3)
    for lane in range(2):
        for expert in range(3):
            here = kept[start[lane, expert] : stop[lane, expert], lane]
            truth = product(list(here), EYE)
            scale = 1 + truth.abs().max()
            assert_close(found[lane, expert] / scale, truth / scale, rtol=0, atol=1e-12)
    numbers = tree.query(int(start[0, 0]), int(stop[0, 0]))
    assert_close(numbers[0], found[0, 0])


def test_an_order_reversed_beyond_the_wrap_would_show() -> None:
    """The predecessor's tree combined wrapped ranges the wrong way round."""
    items = matrices(7)
    tree = CircularSegmentTree(5, torch.matmul, EYE)
    for item in items:
        tree.append(item)
    kept = items[2:]  # places 2 3 4 | 0 1
    assert_close(tree.query(1, 5), product(list(kept[1:]), kept[0]))
    wrong = product(list(kept[1:3]), kept[0]) @ product(list(kept[3:]), kept[0])
    assert not torch.allclose(tree.query(1, 5), wrong)


def test_reset_of_lanes_leaves_the_others() -> None:
    items = matrices(6)
    tree = CircularSegmentTree(4, torch.matmul, EYE)
    for item in items[:5]:
        tree.append(item)
    tree.reset(torch.tensor([True, False]))
    tree.append(items[5])
    assert_close(tree.query(0, 4)[0], items[5, 0])
    assert_close(tree.query(0, 4)[1], product(list(items[2:, 1]), EYE))
    tree.reset()
    assert len(tree) == 0
    assert_close(tree.query(0, 0), EYE)


def test_an_empty_range_is_the_identity() -> None:
    tree = CircularSegmentTree(4, torch.matmul, EYE)
    tree.append(matrices(1)[0])
    assert_close(tree.query(1, 1), EYE.expand(2, 3, 3))
    assert_close(tree.query(torch.tensor([0, 1]), torch.tensor([0, 1])), EYE.expand(2, 3, 3))


def test_items_are_copied() -> None:
    item = matrices(1)[0]
    tree = CircularSegmentTree(2, torch.matmul, EYE)
    tree.append(item)
    before = item.clone()
    item.zero_()
    assert_close(tree.query(0, 1), before)


def test_what_was_saved_is_restored_bit_for_bit() -> None:
    tree, again = (CircularSegmentTree(5, torch.matmul, EYE) for _ in range(2))
    for item in matrices(8):
        tree.append(item)
    saved = tree.state_dict()
    before = [tree.query(start, 5) for start in range(6)]
    for item in matrices(3):
        tree.append(item)  # what was saved is a copy
    again.load_state_dict(saved)
    assert all(torch.equal(again.query(start, 5), product) for start, product in enumerate(before))
    for capacity in (3, 4, 9):  # another one keeps the newest
        other = CircularSegmentTree(capacity, torch.matmul, EYE)
        other.load_state_dict(saved)
        kept = min(capacity, 5)
        assert len(other) == kept
        assert_close(other.query(0, kept), before[5 - kept])
        other.append(matrices(1)[0])
        assert torch.equal(other[len(other) - 1], matrices(1)[0])
    empty = CircularSegmentTree(5, torch.matmul, EYE)
    again.load_state_dict(empty.state_dict())
    assert len(again) == 0


def test_items_by_number() -> None:
    items, tree = matrices(7), CircularSegmentTree(5, torch.matmul, EYE)
    for item in items:
        tree.append(item)
    assert all(torch.equal(tree[i], items[2 + i]) for i in range(5))
    for index in (-1, 5):
        with pytest.raises(IndexError, match=f"no item {index} among 5"):
            tree[index]


@pytest.mark.parametrize(("start", "stop"), [(-1, 1), (2, 1), (0, 3)])
def test_ranges_outside_are_refused(start: int, stop: int) -> None:
    tree = CircularSegmentTree(4, torch.matmul, EYE)
    for item in matrices(2):
        tree.append(item)
    with pytest.raises(IndexError, match="0 <= start <= stop"):
        tree.query(start, stop)
    with pytest.raises(IndexError, match="0 <= start <= stop"):
        tree.query(torch.tensor([start, 0]), torch.tensor([stop, 0]))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
        CircularSegmentTree(0, torch.matmul, EYE)
    tree = CircularSegmentTree(4, torch.matmul, EYE)
    tree.append(matrices(1)[0])
    with pytest.raises(ValueError, match="shape"):
        tree.append(torch.eye(4))
    with pytest.raises(ValueError, match="lanes"):
        tree.query(torch.zeros(3, dtype=torch.long), 1)
    with pytest.raises(ValueError, match="lanes"):
        tree.reset(torch.ones(3, dtype=torch.bool))
