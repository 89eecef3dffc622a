"""Packed lanes against a slow reference that lays the sequences end to end one by one."""

import itertools
from typing import ClassVar, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rtrl_moe_pl.data import Batch, Cursor, Stream, window
from rtrl_moe_pl.data import stream as stream_module
from rtrl_moe_pl.tasks import AnBn, DelayedCopy, DelayedRecall, Haystack, Steps, Task


class Lane(NamedTuple):
    tokens: list[int]
    labels: list[int]
    weights: list[float]
    starts: list[bool]
    index: list[int]
    offset: list[int]


def reference_lane(task: Task, seed: int, first: int, stride: int, columns: int) -> Lane:
    """At least ``columns`` columns of one lane: whole sequences, one after the other."""
    lane = Lane([], [], [], [], [], [])
    index = first
    while len(lane.tokens) < columns:
        tokens, labels, weights, lengths = task.sample(seed, torch.tensor([index]))
        length = int(lengths)
        lane.tokens.extend(tokens[0, :length].tolist())
        lane.labels.extend(labels[0, :length].tolist())
        lane.weights.extend(weights[0, :length].tolist())
        lane.starts.extend([True] + [False] * (length - 1))
        lane.index.extend([index] * length)
        lane.offset.extend(range(length))
        index += stride
    return lane


def columns_of(batch: Batch) -> list[Tensor]:
    return [batch.inputs, *batch.targets, batch.starts]


tasks = st.one_of(
    st.builds(lambda low, more: AnBn(low, low + more), st.integers(2, 6), st.integers(0, 12)),
    st.builds(
        lambda low, more, layout: AnBn(low, low + more, layout, "predecessor"),
        st.integers(1, 6),
        st.integers(1, 12),
        st.sampled_from(["compact", "predecessor"]),
    ),
    st.builds(
        lambda values, noise, low, more: DelayedRecall(values, noise, low, low + more),
        st.integers(2, 5),
        st.integers(1, 3),
        st.integers(0, 30),
        st.integers(0, 60),
    ),
    st.builds(
        lambda more, needles, distractors: Haystack(3 * (needles + distractors) + 4 + more, 3, needles, distractors, 4),
        st.integers(0, 30),
        st.integers(1, 3),
        st.integers(0, 2),
    ),
    st.builds(lambda delay, more: DelayedCopy(2, delay, delay + more), st.integers(1, 9), st.integers(1, 20)),
)


@given(
    task=tasks,
    seed=st.integers(-5, 5),
    batch_size=st.integers(1, 4),
    steps=st.integers(1, 25),
    windows=st.integers(1, 6),
    world=st.integers(1, 3),
    rank=st.integers(0, 2),
)
def test_windows_equal_the_reference(
    task: Task, seed: int, batch_size: int, steps: int, windows: int, world: int, rank: int
):
    rank %= world
    stream = Stream(task, seed, batch_size, steps, rank, world)
    cursor, batches = stream.first(), []
    for _ in range(windows):
        batch, following = window(task, seed, cursor, steps, stream.lanes)
        assert batch.inputs.shape == (batch_size, steps)
        for a, b in zip(columns_of(batch), columns_of(stream.batch(cursor)), strict=True):
            assert torch.equal(a, b)
        for a, b in zip(following, stream.advance(cursor), strict=True):  # the loader's way, without the batch
            assert torch.equal(a, b)
        batches.append(batch)
        cursor = following
    made = [torch.cat(parts, 1) for parts in zip(*map(columns_of, batches), strict=True)]
    columns = steps * windows
    for number in range(batch_size):
        lane = reference_lane(task, seed, rank * batch_size + number, stream.lanes, columns + 1)
        for ours, theirs in zip(made, lane, strict=False):
            assert ours[number].tolist() == theirs[:columns]
        assert (int(cursor.index[number]), int(cursor.offset[number])) == (lane.index[columns], lane.offset[columns])


@pytest.mark.parametrize("task", [AnBn(), DelayedRecall(), DelayedRecall(min_gap=500, max_gap=900)], ids=repr)
@pytest.mark.parametrize("pieces", [1, 7, 1 << 20])
def test_skipping_equals_stepping(task: Task, pieces: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stream_module, "_SEEK_SEQUENCES", pieces)
    stream = Stream(task, 3, batch_size=5, steps=11, rank=1, world_size=2)
    cursor = stream.first()
    for batches in range(60):
        for a, b in zip(cursor, stream.advance(stream.first(), batches), strict=True):
            assert torch.equal(a, b)
        cursor = stream.advance(cursor)


def test_a_million_step_sequence_passes_through_small_windows():
    task = DelayedRecall(values=4, noise_tokens=2, min_gap=10**6, max_gap=10**6)
    stream = Stream(task, 0, batch_size=3, steps=16)
    first = stream.batch(stream.first())
    assert first.starts[:, 0].all()
    assert first.starts.sum() == 3
    last = stream.advance(stream.first(), (10**6 + 2) // 16)  # 1,000,002 = 62,500 * 16 + 2
    assert last.offset.tolist() == [10**6] * 3
    batch = stream.batch(last)
    assert batch.targets[1].nonzero()[:, 1].tolist() == [1, 1, 1]
    assert torch.equal(batch.targets[0][:, 1], first.inputs[:, 0])  # the query asks for the value a million ago
    assert batch.starts.nonzero()[:, 1].tolist() == [2, 2, 2]


class Watched(DelayedRecall):
    """Notes how many numbers it is asked for at once."""

    asked: ClassVar[list[int]] = []

    def lengths(self, seed: int, index: Tensor) -> Tensor:
        self.asked.append(index.numel())
        return super().lengths(seed, index)

    def at(self, seed: int, index: Tensor, position: Tensor) -> Steps:
        self.asked.append(position.numel())
        return super().at(seed, index, position)


@pytest.mark.parametrize("gap", [0, 1, 30, 10**6])
def test_memory_is_one_window_whatever_the_lengths(gap: int):
    stream = Stream(Watched(min_gap=gap, max_gap=gap + 5), 0, batch_size=4, steps=16)
    cursor = stream.first()
    Watched.asked.clear()
    for _ in range(20):
        stream.batch(cursor)
        cursor = stream.advance(cursor)
    assert max(Watched.asked) == 4 * 16


def test_every_weighted_column_survives_the_cut():
    """Nothing is lost or doubled at window borders: each finished sequence is asked for once."""
    stream = Stream(AnBn(), 0, batch_size=4, steps=7)
    cursor, asked = stream.first(), torch.zeros(4)
    for _ in range(500):
        batch = stream.batch(cursor)
        cursor = stream.advance(cursor)
        asked += batch.targets[1].sum(1)
    assert torch.equal(asked.long(), cursor.index // 4)


def sequences_in(batch: Batch) -> list[list[tuple[int, int, float]]]:
    """The (token, label, weight) steps of each lane's sequences, cut at starts; padding dropped."""
    found = []
    for tokens, labels, weights, starts in zip(*columns_of(batch), strict=True):
        rows = list(zip(tokens.tolist(), labels.tolist(), weights.tolist(), strict=True))
        begins = [*starts.nonzero()[:, 0].tolist(), len(rows)]
        for begin, end in itertools.pairwise(begins):
            sequence = rows[begin:end]
            asked = [i for i, row in enumerate(sequence) if row[2]]
            if asked:  # else cut off by the end of the last window
                found.append(sequence[: asked[-1] + 1])
    return found


def test_both_layouts_hold_the_same_sequences():
    packed, whole = Stream(AnBn(), 1, 3, 400), Stream(AnBn(), 1, 3, None)
    from_windows = sequences_in(packed.batch(packed.first()))
    cursor, from_rows = whole.first(), []
    for _ in range(40):
        from_rows += sequences_in(whole.batch(cursor))
        cursor = whole.advance(cursor)
    assert len(from_windows) > 30
    by_lane = {lane: from_rows[lane::3] for lane in range(3)}
    position = 0
    for lane in range(3):
        while position < len(from_windows) and by_lane[lane] and from_windows[position] == by_lane[lane][0]:
            by_lane[lane].pop(0)
            position += 1
    assert position == len(from_windows)  # lane by lane, in order, none missing


def test_whole_sequences_are_padded_without_weight():
    stream = Stream(AnBn(), 1, 64, None)
    batch = stream.batch(stream.first())
    tokens, labels, weights, lengths = AnBn().sample(1, torch.arange(64))
    assert torch.equal(batch.inputs, tokens)
    assert torch.equal(batch.targets[0], labels)
    assert torch.equal(batch.targets[1], weights)
    padding = torch.arange(tokens.shape[1]) >= lengths[:, None]
    assert padding.any()
    assert not batch.targets[1][padding].any()
    assert batch.starts[:, 0].all()
    assert not batch.starts[:, 1:].any()


def test_an_absent_sequence_weighs_nothing():
    stream = Stream(AnBn(), 1, 2, None)
    batch = stream.batch(Cursor(torch.tensor([4, -1]), torch.zeros(2, dtype=torch.int64)))
    assert batch.targets[1].sum(1).tolist() == [1, 0]


@pytest.mark.parametrize("steps", [None, 9])
def test_ranks_share_the_lanes_of_one_big_process(steps: int | None):
    """Two ranks of 3 lanes see what one process of 6 lanes sees, and nothing twice."""
    together = Stream(AnBn(), 5, 6, steps)
    ranks = [Stream(AnBn(), 5, 3, steps, rank, 2) for rank in range(2)]
    cursors = [together.first(), *(rank.first() for rank in ranks)]
    seen: list[set[int]] = [set(), set()]
    for _ in range(30):
        whole, *parts = [s.batch(c) for s, c in zip([together, *ranks], cursors, strict=True)]
        for a, *b in zip(*map(columns_of, [whole, *parts]), strict=True):
            assert torch.equal(a, torch.cat(b))
        for rank, cursor in enumerate(cursors[1:]):
            seen[rank] |= set(cursor.index.tolist())
        cursors = [s.advance(c) for s, c in zip([together, *ranks], cursors, strict=True)]
    assert not seen[0] & seen[1]
    assert ranks[0].identity == ranks[1].identity == together.identity


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares the CPU with a GPU")
@pytest.mark.parametrize("task", [DelayedRecall(), Haystack(needles=2, distractors=2), DelayedCopy()], ids=repr)
@pytest.mark.parametrize("steps", [None, 50])
def test_the_gpu_makes_the_same_batches(task: Task, steps: int | None):
    stream = Stream(task, 5, 6, steps)
    cursor = stream.advance(stream.first(), 100)
    on_gpu = stream.batch(Cursor(cursor.index.cuda(), cursor.offset.cuda()))
    for a, b in zip(columns_of(stream.batch(cursor)), columns_of(on_gpu), strict=True):
        assert torch.equal(a, b.cpu())
