"""Losses of a supervision step, row by row."""

import pytest
import torch
from torch.nn import functional

from rtrl_moe_pl.reasoning import ReasoningLoss
from rtrl_moe_pl.reasoning.losses import correct_rows, log_stablemax
from rtrl_moe_pl.reasoning.trm import Answer
from rtrl_moe_pl.tasks.puzzles import IGNORED

LABELS = torch.tensor([[0, 1, 2, 3], [3, IGNORED, IGNORED, 1], [IGNORED] * 4])


def answer() -> Answer:
    torch.manual_seed(0)
    return Answer(torch.randn(3, 4, 5, requires_grad=True), torch.randn(3), torch.randn(3))


def test_stablemax_is_its_definition() -> None:
    x = torch.tensor([-3.0, -0.5, 0.0, 2.0])
    s = torch.tensor([1 / 4, 1 / 1.5, 1.0, 3.0], dtype=torch.float64)
    assert torch.allclose(log_stablemax(x), (s / s.sum()).log())
    assert log_stablemax(x).dtype == torch.float64


def test_stablemax_has_finite_gradients_for_large_logits() -> None:
    x = torch.tensor([1e6, -1e6, 0.0], requires_grad=True)
    log_stablemax(x)[1].backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_softmax_is_cross_entropy_per_row() -> None:
    given = answer()
    found = ReasoningLoss("softmax")(given, LABELS)
    for row in (0, 1):
        expected = functional.cross_entropy(given.logits[row], LABELS[row], ignore_index=IGNORED)
        assert torch.allclose(found.answer[row], expected)


@pytest.mark.parametrize("kind", ["softmax", "stablemax"])
def test_rows_of_padding_weigh_nothing_and_are_not_correct(kind: str) -> None:
    """Regression: padded rows counted as solved."""
    given = answer()
    found = ReasoningLoss(kind)(given, LABELS)
    assert found.answer[2] == 0
    assert found.halt[2] == 0
    assert not found.correct[2]
    gradient = torch.autograd.grad(found.total(0.5), given.logits)[0]
    assert not gradient[2].any()
    assert gradient[0].any()


def test_the_total_is_a_sum_over_rows() -> None:
    """Regression: losses divided by the batch twice, or a row's by another row's cells."""
    found = ReasoningLoss()(answer(), LABELS)
    assert torch.allclose(found.total(0.5), sum(found.answer[i] + 0.5 * found.halt[i] for i in range(3)))  # type: ignore[arg-type]
    one = ReasoningLoss()(Answer(*(t[:1] for t in answer())), LABELS[:1])
    assert torch.allclose(one.answer[0], found.answer[0])


def test_halting_learns_whether_the_answer_is_right() -> None:
    logits = functional.one_hot(LABELS.clamp(min=0), 5).float()
    logits[1, 3] = torch.tensor([9.0, 0, 0, 0, 0])
    found = ReasoningLoss()(Answer(logits, torch.tensor([2.0, 2.0, 2.0]), torch.zeros(3)), LABELS)
    assert found.correct.tolist() == [True, False, False]
    assert torch.allclose(found.halt[:2], functional.softplus(torch.tensor([-2.0, 2.0])))


def test_q_continue_is_trained_only_if_it_has_a_target() -> None:
    given = answer()._replace(go_on=torch.zeros(3, requires_grad=True))
    without = ReasoningLoss()(given, LABELS)
    target = torch.tensor([1.0, 0.25, 0.5])
    found = ReasoningLoss()(given, LABELS, target)
    assert without.go_on is None
    assert torch.equal(found.halt, without.halt)  # that of q_halt alone
    assert torch.allclose(found.go_on, torch.tensor([2.0, 2.0, 1.0]).log())  # type: ignore[arg-type]
    assert torch.allclose(found.total(0.5) - without.total(0.5), torch.tensor(2.0).log())
    gradient = torch.autograd.grad(found.total(1.0), given.go_on)[0]
    assert torch.allclose(gradient, torch.tensor([-0.5, 0.25, 0.0]))


def test_cells_that_are_not_asked_for_do_not_matter() -> None:
    predictions = torch.tensor([[0, 1, 2, 3], [3, 0, 0, 1], [0, 0, 0, 0]])
    assert correct_rows(predictions, LABELS).tolist() == [True, True, False]
    predictions[1, 3] = 0
    assert correct_rows(predictions, LABELS).tolist() == [True, False, False]


def test_bad_options_are_named() -> None:
    with pytest.raises(ValueError, match=r"^cross_entropy must be one of 'stablemax', 'softmax', got 'mse'$"):
        ReasoningLoss("mse")
    with pytest.raises(ValueError, match=r"^halt_weight must be a finite number of at least 0, got -1"):
        ReasoningLoss(halt_weight=-1)
    with pytest.raises(ValueError, match=r"^halt_weight must be .* got nan"):
        ReasoningLoss(halt_weight=float("nan"))
