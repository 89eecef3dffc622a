"""Haystack: its layout, its least gap at every length, and that only what follows the asked key tells the answer."""

import pytest
import torch
from torch import Tensor

from rtrl_moe_pl.tasks import Haystack
from rtrl_moe_pl.tasks.haystack import BOS, KEY, QUESTION, SEPARATOR, VALUES

N = 20_000
INDEX = torch.arange(N)
MANY = Haystack(length=40, values=3, needles=3, distractors=2, min_gap=9)
TASKS = [Haystack(), Haystack(length=20, values=2, min_gap=2), MANY, Haystack(length=20, needles=2, min_gap=14)]


def keys_of(task: Haystack) -> tuple[list[int], list[int], list[int]]:
    """The needles' keys, their questions and the distractors' keys, by the docstring's list of tokens."""
    others = VALUES + task.values
    keys = [KEY, *range(others, others + task.needles - 1)]
    questions = [QUESTION, *range(others + task.needles - 1, others + 2 * task.needles - 2)]
    return keys, questions, list(range(others + 2 * task.needles - 2, task.vocabulary_size))


def asked_place(task: Haystack, tokens: Tensor) -> Tensor:
    """Where the key that belongs to each row's question is, found by searching the tokens."""
    keys, questions, _ = keys_of(task)
    asked = torch.tensor([questions.index(question) for question in tokens[:, -1].tolist()])
    return (tokens == torch.tensor(keys)[asked][:, None]).int().argmax(1)


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_layout(task: Haystack):
    tokens, labels, weights, lengths = task.sample(1, INDEX)
    keys, questions, distractors = keys_of(task)
    assert (BOS, KEY, SEPARATOR, QUESTION, VALUES) == (0, 1, 2, 3, 4)
    assert task.vocabulary_size == 4 + task.values + 2 * (task.needles - 1) + task.distractors
    assert tokens.shape == (N, task.length)
    assert bool((lengths == task.length).all())
    assert bool((tokens[:, 0] == BOS).all())
    assert not (tokens[:, 1:] == BOS).any()
    assert set(tokens[:, -1].tolist()) == set(questions)
    assert not torch.isin(tokens[:, :-1], torch.tensor(questions)).any()
    assert torch.equal(weights, torch.nn.functional.one_hot(lengths - 1, task.length).float())  # asked at Q alone
    assert not labels[:, :-1].any()
    values = torch.arange(VALUES, VALUES + task.values)
    free = torch.ones(N, task.length, dtype=torch.bool)
    free[:, [0, -1]] = False
    for key in keys + distractors:  # each once, with a value and a separator: no two pairs overlap
        found = (tokens == key).nonzero()
        assert torch.equal(found[:, 0], INDEX)
        rows, place = found.unbind(1)
        assert torch.isin(tokens[rows, place + 1], values).all()
        assert bool((tokens[rows, place + 2] == SEPARATOR).all())
        for step in range(3):
            assert free[rows, place + step].all()
            free[rows, place + step] = False
    assert torch.isin(tokens[free], values).all()  # all else is noise, and looks like values
    answer = tokens[INDEX, asked_place(task, tokens) + 1]
    assert torch.equal(labels[:, -1], answer - VALUES)


@pytest.mark.parametrize("task", TASKS, ids=repr)
@pytest.mark.parametrize("factor", [1, 2, 4])
def test_least_gap_holds_at_every_length(task: Haystack, factor: int):
    scaled = task.scale(factor)
    assert (scaled.length, scaled.min_gap) == (factor * task.length, task.min_gap)
    gaps = scaled.gaps(3, INDEX)
    tokens = scaled.sample(3, INDEX).tokens
    assert torch.equal(gaps, scaled.length - 1 - (asked_place(scaled, tokens) + 1))
    assert int(gaps.min()) == task.min_gap  # reached, and never below
    assert int(gaps.max()) == scaled.length - 3  # the first place behind BOS


def test_places_are_uniform():
    task = Haystack(length=64, min_gap=33)
    share = torch.bincount(task.gaps(0, INDEX), minlength=64) / N
    places = 64 - 3 - 33 + 1
    assert bool(((share[33:62] - 1 / places).abs() < 5 * (1 / places / N) ** 0.5).all())
    assert share[33:62].sum() == pytest.approx(1)


@pytest.mark.parametrize(("insert_from", "insert_to", "gaps"), [(0.0, 0.0, 61), (1.0, 1.0, 33), (0.5, 1.0, (33, 47))])
def test_part_of_the_places(insert_from: float, insert_to: float, gaps):
    found = Haystack(insert_from=insert_from, insert_to=insert_to).gaps(0, INDEX)
    assert (int(found.min()), int(found.max())) == (gaps if isinstance(gaps, tuple) else (gaps, gaps))


def test_needles_are_asked_for_equally_and_stand_in_any_order():
    tokens = MANY.sample(0, INDEX).tokens
    keys, questions, distractors = keys_of(MANY)
    for question in questions:
        assert (tokens[:, -1] == question).double().mean() == pytest.approx(1 / 3, abs=0.02)
    places = torch.stack([(tokens == key).int().argmax(1) for key in keys + distractors])
    for first in range(5):
        for second in range(first):
            assert (places[first] < places[second]).double().mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("task", [*TASKS, MANY], ids=repr)
def test_marks_point_out_what_is_asked_for(task: Haystack):
    tokens = task.sample(0, INDEX).tokens
    marks, (keys, questions, distractors) = task.marks(tokens), keys_of(task)
    for name, meant in (("key", keys), ("question", questions), ("distractor", distractors)):
        expected = torch.isin(tokens, torch.tensor(meant, dtype=torch.long))
        assert torch.equal(marks.get(name, torch.zeros_like(expected)), expected), name
    assert torch.equal(marks["value"][:, 1:], marks["key"][:, :-1])
    assert not marks["value"][:, 0].any()


def test_more_pairs_than_places_never_overlap():
    """All in one place: the pairs stand close, in random order."""
    task = Haystack(length=3 * 300 + 2, needles=1, distractors=299, min_gap=2)
    tokens = task.sample(0, torch.arange(3)).tokens
    assert bool((tokens[:, 3:-1:3] == SEPARATOR).all())
    first = tokens[:, 1:-1:3]
    assert bool((first.sort().values == first[0].sort().values).all())
    assert not torch.equal(first[0], first[1])


def best_rule_accuracy(feature: Tensor, label: Tensor) -> float:
    """Held-out accuracy of the best table on one integer feature: for each value, the commonest label."""
    half = N // 2
    counts = torch.zeros(int(feature.max()) + 1, int(label.max()) + 1)
    counts.index_put_((feature[:half], label[:half]), torch.ones(half), accumulate=True)
    return float((counts.argmax(1)[feature[half:]] == label[half:]).double().mean())


@pytest.mark.parametrize("needles", [1, 2])
def test_nothing_but_what_follows_the_asked_key_tells_the_answer(needles: int):
    task = Haystack(length=24, values=4, needles=needles, distractors=1, min_gap=6)
    tokens, labels, _, _ = task.sample(5, INDEX)
    label, place = labels[:, -1], asked_place(task, tokens)
    keys, _, [distractor] = keys_of(task)
    noise = (tokens[..., None] == torch.arange(VALUES, VALUES + 4)).sum(1)
    noise[INDEX, tokens[INDEX, place + 1] - VALUES] -= 1  # the answer itself is a value as well
    features = {
        "place of the key": place,
        "the question": tokens[:, -1],
        "the distractor's value": tokens[INDEX, (tokens == distractor).int().argmax(1) + 1],
        "the commonest other value": noise.argmax(1),
        "before the key": tokens[INDEX, place - 1],
        "behind the separator": tokens[INDEX, place + 3],
    }
    features |= {f"step {step}": tokens[:, step] * (place + 1 != step) for step in range(1, 23)}
    if needles == 2:
        other = torch.where(tokens[:, -1] == QUESTION, keys[1], keys[0])
        features["the other needle's value"] = tokens[INDEX, (tokens == other[:, None]).int().argmax(1) + 1]
    for name, feature in features.items():
        assert best_rule_accuracy(feature, label) == pytest.approx(0.25, abs=0.025), name
    assert best_rule_accuracy(tokens[INDEX, place + 1], label) == 1  # the rule finds what is there to be found


def test_golden_sequences():
    assert Haystack(length=16, min_gap=4).sample(0, torch.arange(3)).tokens.tolist() == [
        [0, 7, 4, 5, 7, 4, 1, 4, 2, 6, 4, 4, 6, 6, 4, 3],
        [0, 4, 6, 6, 5, 7, 1, 4, 2, 6, 6, 6, 7, 7, 4, 3],
        [0, 6, 4, 6, 1, 4, 2, 5, 7, 5, 4, 5, 6, 7, 7, 3],
    ]
    two = Haystack(length=20, needles=2, distractors=1, min_gap=4)
    tokens, labels, _, _ = two.sample(0, torch.arange(2))
    assert tokens.tolist() == [
        [0, 7, 10, 5, 2, 4, 5, 5, 1, 4, 2, 8, 7, 2, 4, 4, 6, 5, 4, 3],
        [0, 4, 6, 6, 5, 1, 4, 2, 8, 6, 2, 6, 7, 7, 10, 5, 2, 6, 7, 9],
    ]
    assert labels[:, -1].tolist() == [0, 2]


def test_a_million_steps_cost_nothing_until_asked_for():
    task = Haystack(length=1 << 20)
    index = torch.arange(5)
    value = (1 << 20) - 1 - task.gaps(0, index)
    question = task.at(0, index, torch.tensor([(1 << 20) - 1]))
    assert question.tokens.tolist() == [QUESTION] * 5
    assert torch.equal(question.labels, task.at(0, index, value).tokens - VALUES)
    assert task.at(0, index, value - 1).tokens.tolist() == [KEY] * 5
    assert question.weights.tolist() == [1] * 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"values": 1}, "values must be at least 2, got 1"),
        ({"needles": 0}, "needles must be at least 1, got 0"),
        ({"distractors": -1}, "distractors must be at least 0, got -1"),
        ({"min_gap": 1}, "min_gap must be at least 2, got 1"),
        ({"length": 35}, r"length \(for 1 key-value pairs and min_gap 33\) must be at least 36, got 35"),
        ({"needles": 2, "distractors": 9}, r"length \(for 11 .* and min_gap 33\) must be at least 66, got 64"),
        ({"insert_from": 0.6, "insert_to": 0.5}, "insert_from <= insert_to <= 1, got 0.6 and 0.5"),
        ({"insert_to": 1.5}, "insert_to <= 1, got 0.0 and 1.5"),
        ({"insert_from": float("nan")}, "got nan and 1.0"),
    ],
)
def test_an_empty_task_is_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Haystack(**options)


def test_a_fraction_is_refused():
    with pytest.raises(TypeError, match=r"length .* must be an integer, got 64\.5"):
        Haystack(length=64.5)  # pyright: ignore[reportArgumentType]
