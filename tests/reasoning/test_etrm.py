"""Supervision steps in every mode, and evaluation step by step."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from rtrl_moe_pl.reasoning import ReasoningLoss, Thoughts, supervise, think
from rtrl_moe_pl.reasoning.etrm import Supervision
from rtrl_moe_pl.reasoning.metrics import PuzzleMetrics
from rtrl_moe_pl.tasks.puzzles import IGNORED
from tests.reasoning.helpers import RULES, draw, encoder, lanes, trm

MODEL, ENCODER = trm(RULES.shape), encoder(RULES.shape)


def rows_reached(made: Supervision) -> torch.Tensor:
    """[n] bool: of the rows that were encoded, whose loss gives the encoder a gradient."""
    loss = ReasoningLoss("softmax")(made.answer, made.carry.puzzles.labels).total(0.5)
    return (torch.autograd.grad(loss, made.encoding.context)[0].flatten(1) != 0).any(1)


def second(mode: str, halted: list[bool]) -> Supervision:
    """The step after a first one, after which some lanes halted."""
    made = supervise(MODEL, ENCODER, lanes(MODEL), mode, 0)  # type: ignore[arg-type]
    carry = replace(made.carry, halted=torch.tensor(halted)).renew(MODEL, 4, draw)
    return supervise(MODEL, ENCODER, carry, mode, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["re_encode", "fixed_time"])
def test_every_lane_reaches_the_encoder_at_every_step(mode: str) -> None:
    made = second(mode, [True, False, False, False])
    assert made.encoded.all()
    assert rows_reached(made).tolist() == [True] * 4


def test_a_cached_context_starves_the_encoder() -> None:
    """Regression, the ablation: only lanes that have just begun reach the encoder, and with none of them nothing."""
    made = second("cached", [True, False, False, False])
    assert made.encoded.tolist() == [True, False, False, False]
    assert rows_reached(made).tolist() == [True]
    nobody = second("cached", [False] * 4)
    assert not nobody.context.requires_grad


def test_cached_encodes_the_lanes_that_have_begun_and_no_others() -> None:
    """Regression: the whole batch was encoded, to keep a few rows."""
    rows = []
    hook = ENCODER.register_forward_hook(lambda module, given, made: rows.append(len(given[0].inputs)))
    second("cached", [True, False, True, False])
    hook.remove()
    assert rows == [4, 2]


def test_contexts_are_the_same_in_all_modes() -> None:
    contexts = [second(mode, [True, False, False, True]).context for mode in ("re_encode", "cached")]
    assert torch.allclose(contexts[0], contexts[1])


def test_the_context_has_a_graph() -> None:
    """Regression: an encoder's context was detached, and no tensor of it got a gradient."""
    made = supervise(MODEL, ENCODER, lanes(MODEL), "re_encode", 0)
    loss = ReasoningLoss()(made.answer, made.carry.puzzles.labels).total(0.5)
    for (name, _), grad in zip(
        ENCODER.named_parameters(), torch.autograd.grad(loss, list(ENCODER.parameters())), strict=True
    ):
        assert grad.any(), name


def test_nothing_that_is_carried_has_a_graph() -> None:
    carry = second("cached", [True, False, False, False]).carry
    assert carry.context is not None
    assert not any(tensor.requires_grad for tensor in (*carry.latents, carry.context))
    assert carry.steps.tolist() == [1, 2, 2, 2]


def test_labels_belong_to_the_puzzles_that_lanes_hold() -> None:
    """Regression: a continuing lane was judged by the labels of the batch that had just arrived."""
    made = second("re_encode", [False, True, False, False])
    expected = draw(torch.tensor([0, 5, 2, 3])).labels
    assert torch.equal(made.carry.puzzles.labels, expected)
    assert not torch.equal(expected, draw(torch.tensor([4, 5, 6, 7])).labels)


def thoughts() -> Thoughts:
    """Three puzzles of two cells, all answered 1 1; four steps. The last is padding."""
    predictions = torch.tensor([[[1, 1], [0, 1], [0, 0]], [[1, 0], [0, 0], [0, 0]], [[0, 0], [1, 1], [0, 0]]])
    predictions = torch.cat([predictions, predictions[:1]])
    halt = torch.tensor([[1.0, -1.0, 1.0], [-1.0, -2.0, 1.0], [2.0, -3.0, 1.0], [-1.0, 3.0, 1.0]])
    return Thoughts(predictions, halt, halt)


LABELS = torch.tensor([[1, 1], [1, 1], [IGNORED, IGNORED]])


def test_ways_of_stopping_side_by_side() -> None:
    metrics = PuzzleMetrics(max_steps=3, at_steps=(2, 4))
    assert metrics.steps == 4
    metrics.update(thoughts(), LABELS)
    found = {name: float(value) for name, value in metrics.compute().items()}
    assert found == {
        "exact_accuracy": 1.0,  # at step 1, and at the last allowed, 3
        "exact_accuracy_max_steps": 0.5,
        "exact_accuracy_best_q": 0.0,  # steps 3 and 4
        "exact_accuracy_2_steps": 0.0,
        "exact_accuracy_4_steps": 0.5,
        "accuracy": 1.0,
        "q_halt_accuracy": 0.5,  # the second was right but not believed
        "q_halt_loss": pytest.approx((math.log1p(math.exp(-1)) + math.log1p(math.exp(3))) / 2),
        "steps": 2.0,
    }
    exact, halted = metrics.curves()
    assert exact.tolist() == [0.5, 0, 0.5, 0.5]
    assert halted.tolist() == [1, 0, 1]


def test_padding_counts_nowhere() -> None:
    """Regression: rows of padding counted as correct."""
    both, one = PuzzleMetrics(3, (4,)), PuzzleMetrics(3, (4,))
    both.update(thoughts(), LABELS)
    one.update(Thoughts(*(tensor[:, :2] for tensor in thoughts())), LABELS[:2])
    assert both.compute() == one.compute()
    assert both.count == 2


def test_batches_add_up() -> None:
    whole, parts = PuzzleMetrics(3, (4,)), PuzzleMetrics(3, (4,))
    whole.update(thoughts(), LABELS)
    for row in range(3):
        parts.update(Thoughts(*(t[:, row : row + 1] for t in thoughts())), LABELS[row : row + 1])
    assert whole.compute() == parts.compute()


def test_thinking_is_what_training_steps_do() -> None:
    carry = lanes(MODEL)
    found = think(MODEL, ENCODER, carry.puzzles, 3)
    for step in range(3):
        made = supervise(MODEL, ENCODER, carry, "re_encode", 0)
        carry = made.carry
        assert torch.equal(found.predictions[step], made.answer.logits.argmax(-1))
        assert torch.allclose(found.halt[step], made.answer.halt)
