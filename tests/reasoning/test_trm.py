"""The recursive model: which passes there are, which of them carry gradients, and what it begins with."""

import math
from typing import Any

import pytest
import torch

from rtrl_moe_pl.reasoning import TRM
from rtrl_moe_pl.reasoning.trm import Latents
from rtrl_moe_pl.tasks.puzzles import PuzzleShape
from tests.reasoning.helpers import SHAPE, trm


def given(model: TRM) -> tuple[Latents, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    size = (2, model.prefix + SHAPE.cells, model.width)
    high, low = torch.randn(2, *size, dtype=torch.float64, generator=generator)
    context = torch.randn(2, model.prefix, model.width, dtype=torch.float64, generator=generator)
    return Latents(high, low), torch.randint(5, (2, SHAPE.cells), generator=generator), context


def gradients(model: TRM) -> dict[str, torch.Tensor]:
    _, answer = model(*given(model))
    loss = answer.logits.square().sum() + answer.halt.sum()
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@pytest.mark.parametrize("options", [{}, {"mixer": "mlp"}, {"positions": "learned"}, {"layers": 2}])
def test_gradients_are_those_of_the_last_rounds(options: dict[str, Any]) -> None:
    """Written out with a cut before the last round; without the cut they differ."""
    found = gradients(trm(**options))

    def written_out(cut: bool) -> dict[str, torch.Tensor]:
        model = trm(**options)
        (high, low), inputs, context = given(model)
        x = torch.cat([context, model.embedding(inputs)], 1)
        if model.position is not None:
            x = (x + model.position) / math.sqrt(2)
        x = x * math.sqrt(model.width)
        for number in range(2):
            for _ in range(2):
                low = model._net(low + high + x)
            high = model._net(high + low)
            if cut and number == 0:
                high, low = high.detach(), low.detach()
        loss = model.answer_head(high[:, model.prefix :]).square().sum() + model.halt_head(high[:, 0])[:, 0].sum()
        named = dict(model.named_parameters())
        return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))

    whole = written_out(cut=False)
    for name, grad in written_out(cut=True).items():
        assert torch.allclose(found[name], grad, rtol=1e-9, atol=1e-12), name
    assert any(not torch.allclose(found[name], grad, rtol=1e-3) for name, grad in whole.items())
    all_rounds = gradients(trm(**options, grad_cycles=2))
    for name, grad in whole.items():
        assert torch.allclose(all_rounds[name], grad, rtol=1e-9, atol=1e-12), name


def test_passes_through_the_network() -> None:
    model, calls = trm(h_cycles=3, l_cycles=4), []
    model.blocks[0].register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    model(*given(model))
    assert calls == [False] * 10 + [True] * 5


def test_size_of_the_model_that_is_timed() -> None:
    model = TRM(PuzzleShape(12, 9, 9), width=128, heads=4, layers=2)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(0.53e6, rel=0.01)


def test_initial_states_are_fixed_and_saved() -> None:
    model = trm()
    other = trm()
    torch.nn.init.zeros_(other.initial_high)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.initial(2).high, model.initial(2).high)
    assert not any(name.startswith("initial") for name, _ in model.named_parameters())
    assert not torch.equal(model.initial_high, model.initial_low)


def test_at_first_no_puzzle_is_believed_to_be_solved() -> None:
    model = trm()
    _, answer = model(*given(model))
    assert torch.equal(answer.halt, torch.full((2,), -5.0, dtype=torch.float64))
    assert torch.equal(answer.go_on, answer.halt)


def test_rows_are_independent() -> None:
    model = trm()
    latents, inputs, context = given(model)
    _, both = model(latents, inputs, context)
    _, one = model(Latents(latents.high[1:], latents.low[1:]), inputs[1:], context[1:])
    assert torch.allclose(both.logits[1:], one.logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"h_cycles": 0}, "h_cycles must be at least 1, got 0"),
        ({"l_cycles": 0}, "l_cycles must be at least 1, got 0"),
        ({"prefix": 0}, "prefix must be at least 1, got 0"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"grad_cycles": 3}, "grad_cycles must be at most h_cycles=2, got 3"),
        ({"mixer": "conv"}, "mixer must be one of 'attention', 'mlp', got 'conv'"),
        ({"positions": "none"}, "positions must be one of 'rotary', 'learned', got 'none'"),
        ({"heads": 0}, r"heads must divide the width \(8, decoder\.width .*\), got 0"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        trm(**options)
