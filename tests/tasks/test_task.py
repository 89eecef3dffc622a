"""What every task must hold, by the Task interface alone."""

import pytest
import torch

from rtrl_moe_pl.tasks import AnBn, DelayedCopy, DelayedRecall, Haystack, Task

ASKED_ONCE: list[Task] = [  # by one token, which is the last
    AnBn(),
    AnBn(n_min=2, n_max=2),
    AnBn(n_min=1, n_max=5, layout="predecessor", negatives="predecessor", length=14),
    AnBn(n_min=3, n_max=9, negatives="predecessor"),
    AnBn(n_max=7, layout="predecessor"),
    AnBn().scale(2),
    AnBn(n_max=7, layout="predecessor", length=20).scale(4),
    DelayedRecall(),
    DelayedRecall(values=2, noise_tokens=1, min_gap=0, max_gap=0),
    DelayedRecall(values=7, noise_tokens=3, min_gap=5, max_gap=5).scale(4),
    Haystack(),
    Haystack(length=20, values=3, distractors=2, min_gap=9).scale(2),
]
TASKS: list[Task] = [
    *ASKED_ONCE,
    Haystack(length=30, needles=3, distractors=1, min_gap=7),
    DelayedCopy(),
    DelayedCopy(symbols=2, delay=5, length=6),
]
N = 3000


@pytest.fixture(params=TASKS, ids=repr)
def task(request: pytest.FixtureRequest) -> Task:
    return request.param


def test_shapes_types_and_ranges(task: Task):
    tokens, labels, weights, lengths = task.sample(1, torch.arange(N))
    assert tokens.shape == labels.shape == weights.shape == (N, task.max_length)
    assert (tokens.dtype, labels.dtype, weights.dtype, lengths.dtype) == (
        torch.int64,
        torch.int64,
        torch.float32,
        torch.int64,
    )
    assert tokens.min() >= 0
    assert tokens.max() < task.vocabulary_size
    if task.max_length > 2:  # a gap of 0 has no noise
        assert len(tokens.unique()) == task.vocabulary_size
    assert set(labels.unique().tolist()) == set(range(task.num_classes))
    assert lengths.min() == task.min_length  # the bounds are reached: packing and padding waste nothing
    assert lengths.max() == task.max_length
    assert torch.equal(task.lengths(1, torch.arange(N)), lengths)


@pytest.mark.parametrize("task", ASKED_ONCE, ids=repr)
def test_asks_once_and_at_the_last_step(task: Task):
    tokens, labels, weights, lengths = task.sample(1, torch.arange(N))
    last = torch.nn.functional.one_hot(lengths - 1, task.max_length)
    assert torch.equal(weights, last.float())
    assert not (labels * (1 - last)).any()
    query = tokens.gather(1, lengths[:, None] - 1)
    assert len(query.unique()) == 1
    padding = torch.arange(task.max_length) >= lengths[:, None]
    assert torch.equal(tokens[padding], query.expand_as(tokens)[padding])  # padding repeats the last token
    inside = ~padding & (last == 0)
    assert not (tokens[inside] == query[0]).any()  # nothing else is the query token


def test_any_step_can_be_made_alone(task: Task):
    index = torch.randint(0, 10**9, (N,))
    position = (torch.rand(N) * task.lengths(8, index)).long()
    steps = task.at(8, index, position)
    whole = task.sample(8, index)
    rows = torch.arange(N)
    for alone, table in zip(steps, whole[:3], strict=True):
        assert torch.equal(alone, table[rows, position])


def test_depends_on_seed_and_index_alone(task: Task):
    index = torch.arange(N)
    first, again = task.sample(1, index), task.sample(1, index.flip(0))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b.flip(0))
    assert not torch.equal(first.labels, task.sample(2, index).labels)
    assert not torch.equal(first.labels, task.sample(1, index + N).labels)


def test_classes_are_balanced(task: Task):
    _, labels, weights, _ = task.sample(1, torch.arange(N))
    asked = labels[weights > 0]
    share = torch.bincount(asked, minlength=task.num_classes) / len(asked)
    chance = 1 / task.num_classes
    deviation = (chance * (1 - chance) / len(asked)) ** 0.5
    assert bool(((share - chance).abs() < 5 * deviation).all())


def test_scaled_sequences_are_longer_than_any_trained(task: Task):
    assert task.scale(1) is task
    if isinstance(task, DelayedRecall) and task.max_gap == 0:
        with pytest.raises(ValueError, match="max_gap"):
            task.scale(2)
        return
    for factor in (2, 3, 4):
        scaled = task.scale(factor)
        assert scaled.min_length > task.max_length
        assert scaled.vocabulary_size == task.vocabulary_size
        assert scaled.num_classes == task.num_classes
    with pytest.raises(ValueError, match="factor must be at least 1, got 0"):
        task.scale(0)


def test_repr_names_every_option(task: Task):
    for name, value in vars(task).items():
        assert f"{name}={value!r}" in repr(task)
