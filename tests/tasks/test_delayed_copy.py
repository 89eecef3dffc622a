"""Delayed copy: its definition, and that nothing but the token ``delay`` steps ago tells the answer."""

import pytest
import torch

from rtrl_moe_pl.tasks import DelayedCopy

INDEX = torch.arange(4000)


@pytest.mark.parametrize("delay", [1, 3, 9])
def test_definition(delay: int):
    task = DelayedCopy(symbols=3, delay=delay, length=10)
    tokens, labels, weights, lengths = task.sample(1, INDEX)
    assert (task.vocabulary_size, task.num_classes) == (3, 3)
    assert bool((lengths == 10).all())
    assert torch.equal(labels[:, delay:], tokens[:, :-delay])
    assert bool((weights[:, delay:] == 1).all())
    assert not weights[:, :delay].any()
    assert not labels[:, :delay].any()
    share = torch.bincount(tokens.flatten(), minlength=3) / tokens.numel()
    assert bool(((share - 1 / 3).abs() < 0.015).all())


def test_no_other_token_tells_the_answer():
    tokens, labels, _, _ = DelayedCopy(symbols=2, delay=4, length=12).sample(2, INDEX)
    answer = labels[:, 9].double() - 0.5
    told = [float((answer * (tokens[:, step] - 0.5)).mean()) * 4 for step in range(12)]
    assert told.pop(5) == 1  # the rule finds what is there to be found
    assert max(map(abs, told)) < 5 / len(INDEX) ** 0.5


def test_golden_sequence():
    tokens, labels, _, _ = DelayedCopy(delay=3, length=8).sample(0, torch.arange(2))
    assert tokens.tolist() == [[2, 2, 1, 2, 3, 0, 3, 1], [1, 0, 3, 0, 1, 2, 1, 1]]
    assert labels.tolist() == [[0, 0, 0, 2, 2, 1, 2, 3], [0, 0, 0, 1, 0, 3, 0, 1]]


def test_scaled_sequences_keep_the_delay():
    task = DelayedCopy(delay=3, length=8)
    assert task.scale(4) == DelayedCopy(delay=3, length=32)
    assert torch.equal(task.scale(4).sample(0, INDEX).tokens[:, :8], task.sample(0, INDEX).tokens)


def test_a_million_steps_cost_nothing_until_asked_for():
    task = DelayedCopy(delay=10**6, length=10**6 + 1)
    steps = task.at(0, torch.tensor([5]), torch.tensor([10**6]))
    assert steps.weights.item() == 1
    assert steps.labels.item() == task.at(0, torch.tensor([5]), torch.tensor([0])).tokens.item()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"symbols": 1}, "symbols must be at least 2, got 1"),
        ({"delay": 0}, "delay must be at least 1, got 0"),
        ({"delay": 8, "length": 8}, r"length \(delay is 8\) must be at least 9, got 8"),
    ],
)
def test_an_empty_task_is_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        DelayedCopy(**options)


def test_a_fraction_is_refused():
    with pytest.raises(TypeError, match=r"delay must be an integer, got 1\.5"):
        DelayedCopy(delay=1.5)  # pyright: ignore[reportArgumentType]
