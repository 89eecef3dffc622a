"""What lanes keep, what they take up, and when."""

from dataclasses import fields, replace

import pytest
import torch

from rtrl_moe_pl.reasoning import Carry, Halting
from rtrl_moe_pl.reasoning.trm import Answer, Latents
from tests.reasoning.helpers import draw, lanes, trm

MODEL = trm()


def moved(carry: Carry) -> Carry:
    """After a step: other states, one step more."""
    high, low = (torch.randn_like(latent) for latent in carry.latents)
    return replace(carry, latents=Latents(high, low), steps=carry.steps + 1)


def answer(halt: list[float], go_on: float = 0.0) -> Answer:
    q = torch.tensor(halt)
    return Answer(torch.zeros(len(q), 4, 5), q, torch.full_like(q, go_on))


def test_only_lanes_that_have_halted_take_up_another_puzzle() -> None:
    before = replace(moved(lanes(MODEL)), halted=torch.tensor([True, False, False, True]))
    asked = []

    def counted(index: torch.Tensor):
        asked.append(index.tolist())
        return draw(index)

    after = before.renew(MODEL, 4, counted)
    assert asked == [[4, 7]]
    assert after.index.tolist() == [4, 1, 2, 7]
    assert after.steps.tolist() == [0, 1, 1, 0]
    first = MODEL.initial(4)
    for new, old, initial in zip(after.latents, before.latents, first, strict=True):
        assert torch.equal(new[1:3], old[1:3])
        assert torch.equal(new[[0, 3]], initial[[0, 3]])
    for new, expected in zip(after.puzzles, draw(torch.tensor([4, 1, 2, 7])), strict=True):
        assert torch.equal(new, expected)


def test_no_puzzle_is_lost_or_given_twice() -> None:
    """Whatever lanes halt, in whatever order."""
    carry, seen = lanes(MODEL, 3), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        halted = torch.rand(3, generator=generator) < 0.4
        seen += carry.index[halted].tolist()
        carry = replace(moved(carry), halted=halted).renew(MODEL, 3, draw)
    assert len(seen) == len(set(seen))
    for lane in range(3):
        own = [index for index in seen if index % 3 == lane]
        assert own == list(range(lane, lane + 3 * len(own), 3))


def test_a_recurrent_encoder_starts_anew_with_its_puzzle() -> None:
    before = replace(lanes(MODEL), encoder_state=torch.ones(4, 2, 3), halted=torch.tensor([False, True, False, False]))
    state = before.renew(MODEL, 4, draw).encoder_state
    assert state is not None
    assert state.flatten(1).sum(1).tolist() == [6, 0, 6, 6]


def test_a_saved_carry_is_the_same() -> None:
    carry = replace(moved(lanes(MODEL)), context=torch.randn(4, 3, 8))
    again = Carry.from_state_dict(carry.state_dict()).to(torch.device("cpu"))
    for field in fields(Carry):
        one, two = getattr(carry, field.name), getattr(again, field.name)
        pairs = zip(one, two, strict=True) if isinstance(one, tuple) else [(one, two)]
        assert type(one) is type(two)
        assert all(a is b or torch.equal(a, b) for a, b in pairs)


def test_lanes_halt_when_they_believe_or_have_thought_long_enough() -> None:
    halting = Halting(max_steps=4, exploration=0)
    steps = torch.tensor([1, 1, 4, 3])
    assert halting(answer([0.1, -0.1, -9.0, 0.0]), steps, torch.arange(4), 0).tolist() == [True, False, True, False]


def test_with_q_continue_the_larger_decides() -> None:
    halting = Halting(max_steps=4, exploration=0, q_continue=True)
    assert halting(answer([0.1, 2.0], go_on=1.0), torch.ones(2), torch.arange(2), 0).tolist() == [False, True]
    assert halting(answer([-3.0], go_on=-4.0), torch.ones(1), torch.arange(1), 0).tolist() == [True]


def test_exploration_makes_sure_lanes_think_longer_now_and_then() -> None:
    index, first = torch.arange(20000), torch.ones(20000, dtype=torch.int64)
    sure = Answer(torch.zeros(1), torch.ones(20000), torch.zeros(20000))
    halted = Halting(max_steps=5, exploration=0.1)(sure, first, index, 0)
    assert 0.89 < halted.float().mean() < 0.91
    assert Halting(max_steps=5, exploration=0.0)(sure, first, index, 0).all()
    # least 2, 3, 4 or 5 steps alike: at step 3 half of those who explore may halt
    third = Halting(max_steps=5, exploration=1.0)(sure, 3 * first, index, 0)
    assert 0.48 < third.float().mean() < 0.52
    assert Halting(max_steps=5, exploration=1.0)(sure, 5 * first, index, 0).all()


def test_exploration_is_a_function_of_seed_puzzle_and_step() -> None:
    halting, sure = Halting(max_steps=5, exploration=0.5), answer([1.0] * 64)
    index, steps = torch.arange(64), torch.full((64,), 2)
    once = halting(sure, steps, index, 7)
    assert torch.equal(once, halting(sure, steps, index, 7))
    assert torch.equal(once[:5], halting(answer([1.0] * 5), steps[:5], index[:5], 7))
    assert not torch.equal(once, halting(sure, steps, index, 8))
    assert not torch.equal(once, halting(sure, steps, index + 64, 7))


def test_bad_options_are_named() -> None:
    with pytest.raises(ValueError, match=r"^max_steps must be at least 1, got 0$"):
        Halting(max_steps=0)
    with pytest.raises(ValueError, match=r"^exploration must be a probability, got 1\.5$"):
        Halting(exploration=1.5)
