"""a^n b^n: its definition, and what can be guessed without counting."""

import pytest
import torch
from torch import Tensor

from rtrl_moe_pl.tasks import AnBn
from rtrl_moe_pl.tasks.anbn import PAD, QUESTION, A, B

# Data sets are made of these draws: a change here changes every data set.
GOLDEN = [
    ("aaaaaaabbbbbbbbbbbbbbbq", 0),
    ("aaaaaaaaaaaaaaaabbbbbbbbq", 0),
    ("aaaaaaabbbbbbbq", 1),
    ("aaaaaaaaabbbbbbbbbbbbbq", 0),
]
FITTED, JUDGED = torch.arange(50_000), torch.arange(50_000, 150_000)


def best_rule_accuracy(feature: Tensor, label: Tensor, new_feature: Tensor, new_label: Tensor) -> float:
    """Held-out accuracy of the best table on one integer feature: for each value, the commoner class."""
    size = int(max(feature.max(), new_feature.max())) + 1
    positives = torch.zeros(size).index_add_(0, feature, 2.0 * label - 1)
    return float(((positives > 0)[new_feature] == (new_label == 1)).double().mean())


def rule(task: AnBn, feature: str) -> float:
    tables = []
    for index in (FITTED, JUDGED):
        first, last, label = task.counts(3, index)
        value = {"length": task.lengths(3, index), "first": first, "last": last, "parity": (first + last) % 2}[feature]
        tables += [value, label]
    return best_rule_accuracy(*tables)


@pytest.mark.parametrize("task", [AnBn(), AnBn().scale(2), AnBn().scale(4), AnBn(layout="predecessor")], ids=repr)
@pytest.mark.parametrize("feature", ["length", "first", "last"])
def test_nothing_but_counting_helps(task: AnBn, feature: str):
    accuracy = rule(task, feature)
    assert accuracy < 0.60
    if feature == "length":
        assert abs(accuracy - 0.5) < 0.01


def test_one_count_alone_scores_what_the_docstring_says():
    for feature in ("first", "last"):
        assert rule(AnBn(), feature) == pytest.approx(0.55, abs=0.01)
        assert rule(AnBn(n_max=8), feature) == pytest.approx(0.57, abs=0.01)
        assert rule(AnBn(n_max=4), feature) == pytest.approx(0.67, abs=0.01)


@pytest.mark.parametrize(("n_max", "parity"), [(3, 0.83), (8, 0.79), (15, 0.77), (63, 0.75)])
def test_the_predecessors_lengths_tell_the_class(n_max: int, parity: float):
    """Negative control of the rules above, with the figures measured on the predecessor."""
    task = AnBn(n_min=1, n_max=n_max, negatives="predecessor")
    assert rule(task, "parity") == pytest.approx(parity, abs=0.01)
    assert rule(task, "length") > 0.74


def test_definition():
    task = AnBn()
    first, last, label = task.counts(0, FITTED)
    n = (first + last) // 2
    assert torch.equal(first + last, 2 * n)
    assert torch.equal(first == last, label == 1)
    assert (int(n.min()), int(n.max())) == (2, 16)
    difference = (first - last)[label == 0].abs() // 2
    assert set(difference.tolist()) == {1, 2, 3, 4}
    assert bool((difference <= (n[label == 0] - 1)).all())
    assert int(torch.stack([first, last]).min()) == 1
    assert int(torch.stack([first, last]).max()) == 17  # n = 16 cannot do without
    for group in (n[label == 1], n[label == 0]):
        share = torch.bincount(group, minlength=17)[2:] / len(group)
        assert bool(((share - 1 / 15).abs() < 0.01).all())
    longer = (first > last)[label == 0].double().mean()
    assert abs(longer - 0.5) < 0.02


def spell(tokens: Tensor) -> str:
    return "".join("abq."[token] for token in tokens)


@pytest.mark.parametrize("negatives", ["balanced", "predecessor"])
@pytest.mark.parametrize("layout", ["compact", "predecessor"])
def test_tokens_spell_the_counts(layout, negatives):
    assert (A, B, QUESTION, PAD) == (0, 1, 2, 3)
    task = AnBn(n_min=2, n_max=6, layout=layout, negatives=negatives)
    index = torch.arange(200)
    first, last, label = task.counts(5, index)
    tokens, labels, _, lengths = task.sample(5, index)
    for i in range(200):
        padding = "." * (13 - 1 - int(first[i] + last[i])) if layout == "predecessor" else ""
        assert spell(tokens[i, : lengths[i]]) == "a" * int(first[i]) + "b" * int(last[i]) + padding + "q"
        assert labels[i, lengths[i] - 1] == label[i] == (first[i] == last[i])


def test_predecessors_negatives_are_uniform_over_the_other_counts():
    first, last, label = AnBn(n_min=1, n_max=4, negatives="predecessor").counts(0, FITTED)
    negative = label == 0
    pairs = torch.bincount((first * 5 + last)[negative], minlength=25).view(5, 5)[1:, 1:] / negative.sum()
    expected = (1 - torch.eye(4)) / 12
    assert bool(((pairs - expected).abs() < 0.01).all())
    assert not pairs.diagonal().any()


def test_golden_sequences():
    tokens, labels, _, lengths = AnBn().sample(0, torch.arange(4))
    found = [
        (spell(row[:length]), int(label)) for row, length, label in zip(tokens, lengths, labels.sum(1), strict=True)
    ]
    assert found == GOLDEN


def test_scaled_ranges():
    assert (AnBn().scale(2).n_min, AnBn().scale(2).n_max) == (17, 32)
    assert (AnBn().scale(4).n_min, AnBn().scale(4).n_max) == (33, 64)
    predecessor = AnBn(n_min=1, n_max=63, layout="predecessor", negatives="predecessor", length=128)
    assert predecessor.scale(2) == AnBn(64, 126, "predecessor", "predecessor", 256)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_min": 1}, r"n_min \(with balanced negatives\) must be at least 2, got 1"),
        ({"n_min": 5, "n_max": 4}, r"n_max \(n_min is 5\) must be at least 5, got 4"),
        ({"n_min": 0, "negatives": "predecessor"}, "n_min must be at least 1, got 0"),
        ({"n_min": 1, "n_max": 1, "negatives": "predecessor"}, r"n_max \(n_min is 1, .*\) must be at least 2, got 1"),
        ({"layout": "square"}, "layout must be one of 'compact', 'predecessor', got 'square'"),
        ({"negatives": "none"}, "negatives must be one of 'balanced', 'predecessor', got 'none'"),
        ({"length": 40}, "length is an option of layout 'predecessor' alone, got length=40"),
        ({"layout": "predecessor", "length": 32}, r"length \(n_max is 16\) must be at least 33, got 32"),
    ],
)
def test_an_empty_task_is_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        AnBn(**options)


def test_a_fraction_is_refused():
    with pytest.raises(TypeError, match=r"n_max .* must be an integer, got 3\.5"):
        AnBn(n_max=3.5)  # pyright: ignore[reportArgumentType]
