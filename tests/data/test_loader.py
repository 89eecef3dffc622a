"""Sizes, order and resumption of the loaders, without a trainer."""

import itertools

import pytest
import torch

from rtrl_moe_pl.data import Request, Stream, StreamLoader, ValidationLoader
from rtrl_moe_pl.tasks import AnBn, Haystack

STREAM = Stream(AnBn(), seed=2, batch_size=3, steps=8)
WHOLE = Stream(AnBn(), seed=2, batch_size=3, steps=None)


def plain(requests) -> list[tuple[list[int], list[int]]]:
    return [(request.cursor.index.tolist(), request.cursor.offset.tolist()) for request in requests]


def unbroken(stream: Stream, batches: int) -> list[tuple[list[int], list[int]]]:
    cursor, found = stream.first(), []
    for _ in range(batches):
        found.append(Request("train", cursor))
        cursor = stream.advance(cursor)
    return plain(found)


@pytest.mark.parametrize("stream", [STREAM, WHOLE], ids=["stream", "sequences"])
def test_the_stream_goes_on_from_epoch_to_epoch(stream: Stream):
    loader = StreamLoader("train", stream, batches=5)
    assert len(loader) == 5
    epochs = [plain(loader) for _ in range(3)]
    assert [len(epoch) for epoch in epochs] == [5, 5, 5]
    assert list(itertools.chain(*epochs)) == unbroken(stream, 15)
    assert all(request.split == "train" for request in loader)


def test_an_iteration_left_early_loses_nothing():
    loader = StreamLoader("train", STREAM, batches=5)
    seen = plain(itertools.islice(loader, 3)) + plain(itertools.islice(loader, 2)) + plain(loader)
    assert seen == unbroken(STREAM, 10)


@pytest.mark.parametrize("stream", [STREAM, WHOLE], ids=["stream", "sequences"])
@pytest.mark.parametrize("before", [0, 1, 4, 5, 6, 13])
def test_resumed_equals_unbroken(stream: Stream, before: int):
    loader = StreamLoader("train", stream, batches=5)
    endless = itertools.chain.from_iterable(itertools.repeat(loader))
    seen = plain(itertools.islice(endless, before))
    state = loader.state_dict()
    assert {type(value) for value in state.values()} <= {int, str}
    resumed = StreamLoader("train", stream, batches=5)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    seen += plain(resumed)
    assert seen == unbroken(stream, before + 5)


def test_every_rank_resumes_from_the_state_of_rank_0():
    ranks = [StreamLoader("train", Stream(AnBn(), 2, 3, 8, rank, 2), batches=5) for rank in range(2)]
    for rank in ranks:
        plain(itertools.islice(rank, 4))
    resumed = StreamLoader("train", ranks[1].stream, batches=5)
    resumed.load_state_dict(ranks[0].state_dict())
    assert plain(resumed)[0] == plain(itertools.islice(ranks[1], 1))[0]


@pytest.mark.parametrize(
    "other",
    [
        Stream(AnBn(n_max=17), 2, 3, 8),
        Stream(AnBn(), 3, 3, 8),
        Stream(AnBn(), 2, 4, 8),
        Stream(AnBn(), 2, 3, 9),
        WHOLE,
        Stream(AnBn(), 2, 3, 8, 0, 2),
    ],
    ids=lambda stream: stream.identity,
)
def test_a_position_in_another_stream_is_not_used(other: Stream):
    loader = StreamLoader("train", other, batches=5)
    plain(loader)
    resumed = StreamLoader("train", STREAM, batches=5)
    with pytest.warns(UserWarning, match="training data have changed since the checkpoint"):
        resumed.load_state_dict(loader.state_dict())
    assert plain(resumed) == unbroken(STREAM, 5)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 3, 10, 24])
def test_validation_covers_each_sequence_once(world: int, size: int):
    loaders = [ValidationLoader("validation", Stream(AnBn(), 1, 4, None, rank, world), size) for rank in range(world)]
    assert len({len(loader) for loader in loaders}) == 1  # collectives need equal numbers of batches
    indices, weight = [], 0.0
    for loader in loaders:
        requests = list(loader)
        assert len(requests) == len(loader)
        assert plain(requests) == plain(loader)  # the same every time
        for request in requests:
            assert 1 <= len(request.cursor.index) <= 4
            indices += request.cursor.index.tolist()
            weight += float(loader.stream.batch(request.cursor).targets[1].sum())
    assert sorted(i for i in indices if i >= 0) == list(range(size))
    assert weight == size


def test_validation_needs_no_padding_on_one_process():
    loader = ValidationLoader("validation", Stream(AnBn(), 1, 4, None), 10)
    assert [len(request.cursor.index) for request in loader] == [4, 4, 2]
    assert torch.cat([request.cursor.index for request in loader]).tolist() == list(range(10))


@pytest.mark.parametrize("window", [1, 5, 9, 64])
@pytest.mark.parametrize("world", [1, 2])
def test_windows_join_to_whole_sequences(window: int, world: int):
    """Of variable length, in batches of which the last has fewer rows; on every rank as many."""
    task = AnBn(n_max=4)  # 5 to 9 tokens
    for rank in range(world):
        stream = Stream(task, 1, 4, None, rank, world)
        whole = [stream.batch(request.cursor) for request in ValidationLoader("validation", stream, 10)]
        loader = ValidationLoader("validation", stream, 10, window)
        windows = [stream.batch(request.cursor, request.columns) for request in loader]
        per_batch = -(-task.max_length // window)
        assert len(windows) == len(loader) == per_batch * len(whole)
        assert max(batch.inputs.shape[1] for batch in windows) <= window
        for number, batch in enumerate(whole):
            parts = windows[number * per_batch : (number + 1) * per_batch]
            for name in ("inputs", "starts"):
                assert torch.equal(torch.cat([getattr(part, name) for part in parts], 1), getattr(batch, name))
            for which in (0, 1):
                assert torch.equal(torch.cat([part.targets[which] for part in parts], 1), batch.targets[which])
            assert all(part.sequences is not None for part in parts)
            assert {tuple(part.sequences.tolist()) for part in parts} == {tuple(batch.sequences.tolist())}  # type: ignore[union-attr]
            assert parts[0].starts[:, 0].all()
            assert sum(int(part.starts.sum()) for part in parts) == len(batch.inputs)


def test_windows_of_a_million_steps_cost_nothing_until_asked_for():
    loader = ValidationLoader("test", Stream(Haystack(length=1 << 20), 1, 4, None), 4, 1000)
    assert len(loader) == 1049
    requests = iter(loader)
    assert next(requests).columns == 1000
    *_, last = requests
    assert last.columns == (1 << 20) % 1000
    batch = loader.stream.batch(last.cursor, last.columns)
    assert batch.inputs.shape == (4, last.columns)
    assert batch.targets[1].sum(0).nonzero().tolist() == [[last.columns - 1]]
