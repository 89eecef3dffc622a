"""Optimizers against scalar references."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from rtrl_moe_pl.training.optimizers import AdamATan2, SignSGD
from tests.training.small_run import draws, equal, through_a_file


def steps_of(optimizer: type[Optimizer], scale: float, **options: Any) -> Tensor:
    """How a parameter [4] moves in five steps on fixed gradients times a scale."""
    p = nn.Parameter(torch.zeros(4))
    stepper = optimizer([p], lr=0.1, weight_decay=0.0, **options)  # type: ignore[call-arg]
    for grad in draws(5, 4):
        p.grad = grad * scale
        stepper.step()
    return p.detach()


# ---- AdamATan2


@pytest.mark.parametrize("scale", [1e3, 1e-12])
def test_steps_do_not_depend_on_the_scale_of_gradients(scale: float) -> None:
    torch.testing.assert_close(steps_of(AdamATan2, scale), steps_of(AdamATan2, 1.0), rtol=1e-5, atol=0)


def test_a_scale_that_is_a_power_of_two_leaves_steps_bit_identical() -> None:
    assert torch.equal(steps_of(AdamATan2, 2.0**10), steps_of(AdamATan2, 1.0))


def test_negative_control_the_epsilon_of_adam_breaks_scale_invariance() -> None:
    betas = (0.9, 0.95)
    assert steps_of(Adam, 1e-12, betas=betas).abs().max() < 0.01 * steps_of(Adam, 1.0, betas=betas).abs().min()


def test_adamatan2_is_its_scalar_formula() -> None:
    lr, beta1, beta2, decay, a, b = 0.03, 0.8, 0.9, 0.5, 1.1, 0.7
    p = nn.Parameter(torch.tensor([0.7], dtype=torch.float64))
    optimizer = AdamATan2([p], lr=lr, betas=(beta1, beta2), weight_decay=decay, a=a, b=b)
    expected, m, v = 0.7, 0.0, 0.0
    for t, grad in enumerate([0.3, -2.0, 0.0, 5.0], start=1):
        p.grad = torch.tensor([grad], dtype=torch.float64)
        optimizer.step()
        m, v = beta1 * m + (1 - beta1) * grad, beta2 * v + (1 - beta2) * grad**2
        expected *= 1 - lr * decay
        expected -= lr * a * math.atan2(m / (1 - beta1**t), b * math.sqrt(v / (1 - beta2**t)))
        assert p.item() == pytest.approx(expected, rel=1e-13)


def test_the_first_step_is_the_learning_rate_as_adams_is() -> None:
    p = nn.Parameter(torch.zeros(3))
    p.grad = torch.tensor([1e-6, -1.0, 1e6])
    AdamATan2([p], lr=0.1, weight_decay=0.0).step()
    torch.testing.assert_close(p.detach(), torch.tensor([-0.1, 0.1, -0.1]), rtol=0.01, atol=0)


def test_no_gradient_is_no_step_and_a_zero_gradient_no_move() -> None:
    absent, zero, moved = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = AdamATan2([absent, zero, moved], weight_decay=0.0)
    optimizer.step()  # nothing at all has a gradient
    zero.grad, moved.grad = torch.zeros(2), torch.ones(2)
    optimizer.step()
    assert torch.equal(absent, torch.ones(2))
    assert absent not in optimizer.state
    assert torch.equal(zero, torch.ones(2))
    assert (moved < 1).all()


def test_a_parameter_that_joins_late_counts_its_own_steps() -> None:
    early, late, alone = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    both, one = AdamATan2([early, late]), AdamATan2([alone])
    for step, grad in enumerate(draws(5, 2)):
        early.grad = grad
        if step >= 2:
            late.grad, alone.grad = grad, grad
            one.step()
        both.step()
    assert torch.equal(late, alone)
    assert not torch.equal(late, early)


@pytest.mark.parametrize("optimizer", [AdamATan2, SignSGD])
def test_a_run_resumed_from_a_state_dict_is_bit_identical(optimizer: type[Optimizer]) -> None:
    def step(p: nn.Parameter, stepper: Optimizer, grads: Tensor) -> None:
        for p.grad in grads:
            stepper.step()

    p = nn.Parameter(draws(3, 2))
    stepper = optimizer([p], lr=0.1)  # type: ignore[call-arg]
    step(p, stepper, draws(4, 3, 2))
    resumed = nn.Parameter(p.detach().clone())
    other = optimizer([resumed], lr=9.0)  # type: ignore[call-arg]
    other.load_state_dict(through_a_file(stepper.state_dict()))
    step(p, stepper, draws(4, 3, 2, seed=1))
    step(resumed, other, draws(4, 3, 2, seed=1))
    assert torch.equal(p, resumed)
    assert equal(stepper.state_dict(), other.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"^lr must be .* got -1.0$"),
        ({"lr": math.nan}, r"^lr must be .* got nan$"),
        ({"weight_decay": -0.1}, r"^weight_decay must be .* got -0.1$"),
        ({"betas": (0.9, 1.0)}, r"^betas must be .* got \(0.9, 1.0\)$"),
        ({"betas": (0.9,)}, r"^betas must be .* got \(0.9,\)$"),
        ({"a": 0.0}, r"^a must be .* got 0.0$"),
        ({"b": math.inf}, r"^b must be .* got inf$"),
    ],
)
def test_a_bad_option_is_named_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamATan2([nn.Parameter(torch.zeros(1))], **options)
    if options.keys() <= {"lr", "weight_decay"}:
        with pytest.raises(ValueError, match=message):
            SignSGD([nn.Parameter(torch.zeros(1))], **options)


@pytest.mark.parametrize("optimizer", [AdamATan2, SignSGD])
def test_a_yaml_file_can_name_it(optimizer: type[Optimizer]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--optimizer", type=OptimizerCallable)
    chosen = {
        "class_path": f"rtrl_moe_pl.training.optimizers.{optimizer.__name__}",
        "init_args": {"lr": 0.5, "weight_decay": 1},
    }
    made = parser.instantiate(parser.parse_object({"optimizer": chosen})).optimizer([nn.Parameter(draws(2))])
    assert type(made) is optimizer
    assert made.param_groups[0]["lr"] == 0.5


# ---- SignSGD


def test_only_rows_with_a_gradient_move_and_decay() -> None:
    before = draws(5, 3)
    p = nn.Parameter(before.clone())
    p.grad = torch.zeros(5, 3)
    p.grad[1] = torch.tensor([2.0, -1e-30, 0.0])
    p.grad[4] = torch.tensor([0.0, 0.0, 7.0])
    SignSGD([p], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(p[[0, 2, 3]], before[[0, 2, 3]])
    expected = before[[1, 4]] * 0.95 - 0.1 * torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 1.0]])
    torch.testing.assert_close(p[[1, 4]].detach(), expected)


def test_negative_control_the_decay_of_adamw_reaches_rows_without_a_gradient() -> None:
    p = nn.Parameter(torch.ones(2, 3))
    p.grad = torch.zeros(2, 3)
    AdamW([p], lr=0.1, weight_decay=0.5).step()
    assert (p < 1).all()


def test_a_vector_is_one_row_and_an_absent_gradient_no_step() -> None:
    vector, scalar, absent = (nn.Parameter(torch.ones(shape)) for shape in ((2,), (), (2, 2)))
    vector.grad, scalar.grad = torch.tensor([0.0, 3.0]), torch.tensor(-1.0)
    SignSGD([vector, scalar, absent], lr=0.5, weight_decay=1.0).step()
    assert vector.tolist() == [0.5, 0.0]
    assert scalar.item() == 1.0
    assert torch.equal(absent, torch.ones(2, 2))
