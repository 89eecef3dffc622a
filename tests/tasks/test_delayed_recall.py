"""Delayed recall: its definition, and that nothing but the first step tells the answer."""

import pytest
import torch

from rtrl_moe_pl.tasks import DelayedRecall


def test_definition():
    task = DelayedRecall(values=3, noise_tokens=2, min_gap=4, max_gap=7)
    tokens, labels, weights, lengths = task.sample(1, torch.arange(4000))
    assert (task.vocabulary_size, task.num_classes) == (6, 3)
    gaps = torch.bincount(lengths - 2, minlength=8) / 4000
    assert not gaps[:4].any()
    assert bool(((gaps[4:] - 1 / 4).abs() < 0.04).all())
    answer = labels.sum(1)
    assert torch.equal(answer, tokens[:, 0])  # the value is the first token
    assert torch.equal(weights.argmax(1), lengths - 1)
    assert bool((tokens.gather(1, lengths[:, None] - 1) == 5).all())
    inside = (torch.arange(task.max_length) > 0) & (torch.arange(task.max_length) < lengths[:, None] - 1)
    assert set(tokens[inside].tolist()) == {3, 4}


def test_noise_and_length_do_not_tell_the_value():
    task = DelayedRecall(values=2, noise_tokens=2, min_gap=3, max_gap=6)
    tokens, labels, _, lengths = task.sample(1, torch.arange(40_000))
    answer = labels.sum(1).double() - 0.5
    for position in range(1, task.max_length):
        noise = (tokens[:, position] == 2).double()
        present = lengths - 1 > position
        if present.any():
            assert abs((answer * (noise - 0.5))[present].mean()) * 4 < 5 / present.sum() ** 0.5
    assert abs((answer * (lengths - 6.5)).mean()) * 2 < 0.03


def test_blank_gap():
    task = DelayedRecall(values=2, noise_tokens=1, min_gap=3, max_gap=3)
    assert task.sample(0, torch.arange(50)).tokens[:, 1:].unique(dim=0).tolist() == [[2, 2, 2, 3]]


def test_golden_sequence():
    tokens = DelayedRecall(min_gap=6, max_gap=6).sample(0, torch.arange(3)).tokens
    assert tokens.tolist() == [
        [2, 7, 5, 5, 4, 4, 4, 8],
        [2, 6, 5, 6, 5, 7, 5, 8],
        [1, 4, 4, 5, 5, 7, 7, 8],
    ]


def test_scaled_ranges():
    assert DelayedRecall(min_gap=17, max_gap=20).scale(2) == DelayedRecall(min_gap=21, max_gap=40)
    assert DelayedRecall(min_gap=17, max_gap=20).scale(4) == DelayedRecall(min_gap=41, max_gap=80)


def test_a_million_steps_cost_nothing_until_asked_for():
    task = DelayedRecall(min_gap=10**6, max_gap=10**6)
    steps = task.at(0, torch.tensor([5]), torch.tensor([10**6 + 1]))
    assert steps.weights.item() == 1
    assert steps.labels.item() == task.at(0, torch.tensor([5]), torch.tensor([0])).tokens.item()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"values": 1}, "values must be at least 2, got 1"),
        ({"noise_tokens": 0}, r"noise_tokens \(1 is a blank gap\) must be at least 1, got 0"),
        ({"min_gap": -1}, "min_gap must be at least 0, got -1"),
        ({"min_gap": 9, "max_gap": 8}, r"max_gap \(min_gap is 9\) must be at least 9, got 8"),
    ],
)
def test_an_empty_task_is_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        DelayedRecall(**options)
