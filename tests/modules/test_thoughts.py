"""Evaluation stops as training does, and figures of the context say what they claim."""

from __future__ import annotations

import pytest
import torch

from rtrl_moe_pl.modules.reasoning_figures import context_figures
from rtrl_moe_pl.randomness import bits
from rtrl_moe_pl.reasoning import Carry, Halting, supervise
from rtrl_moe_pl.reasoning.trm import Answer
from tests.modules.reasoning_helpers import data, module


@pytest.mark.parametrize("q_continue", [False, True])
def test_evaluation_halts_as_training_does(q_continue: bool) -> None:
    model = module(halting=Halting(max_steps=3, exploration=0, q_continue=q_continue))
    with torch.no_grad():
        model.decoder.halt_head.weight.normal_()
        model.decoder.halt_head.bias.zero_()
    puzzles, index = data().task.draw("train", 0, torch.arange(64)), torch.arange(64)
    with torch.no_grad():  # about half of the puzzles halt at once
        model.decoder.halt_head.bias[0] -= model(puzzles).margin[0].median()
    thoughts, carry = model(puzzles), Carry.first(model.decoder, index, puzzles)
    at = torch.full((64,), -1)
    for step in range(3):
        made = supervise(model.decoder, model.encoder, carry, "re_encode", 0)
        carry = made.carry
        halted = model.halting(made.answer, carry.steps, index, 0)
        at = torch.where((at < 0) & halted, step, at)
    assert torch.equal(thoughts.halted_at(3), at)
    assert len(at.unique()) > 1, at


def test_contexts_that_say_nothing_of_the_rule_vary_as_much_within_a_rule_as_across() -> None:
    torch.manual_seed(0)
    context, identity = torch.randn(64, 4, 32), torch.arange(64) // 2
    found = context_figures(context, identity)
    within, across = (float(found[f"train/context_{name}_variance"]) for name in ("within_group", "cross_sample"))
    assert within == pytest.approx(across, rel=0.1)
    told = context_figures(identity[:, None, None] + 0.01 * context, identity)
    assert told["train/context_within_group_variance"] < 1e-3 < told["train/context_cross_sample_variance"]


def test_exploration_does_not_depend_on_what_the_puzzle_looks_like() -> None:
    """Regression: the least number of steps was drawn from the same bits as a cell of the query."""
    index = torch.arange(4000)
    colour = data(size=4, colors=5).task.draw("train", 0, index).inputs  # [B, 16]
    sure = Answer(torch.zeros(1), torch.ones(4000), torch.zeros(4000))
    for step in (2, 3):
        halted = Halting(max_steps=5, exploration=1.0)(sure, torch.full_like(index, step), index, 0)
        for cell in range(6):
            shares = [halted[colour[:, cell] == token].float().mean() for token in colour.unique()]
            assert max(shares) - min(shares) < 0.15
    assert not torch.equal(bits(0, 1, index), bits(0, 1001, index))
