"""Several optimizers stepped as one, alone and in Lightning."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.optimizer import _optimizer_to_device
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from rtrl_moe_pl.training.optimizers import AdamATan2, CombinedOptimizer, SignSGD
from tests.training.small_run import Tables, copied, draws, equal, through_a_file, trainer


def members() -> tuple[nn.Parameter, nn.Parameter, nn.Parameter, list[Optimizer]]:
    a, b, c = (nn.Parameter(draws(4, 2, seed=seed)) for seed in range(3))
    adam = AdamATan2([{"params": [a]}, {"params": [b], "lr": 0.2}], lr=0.1)
    return a, b, c, [adam, SignSGD([c], lr=0.3)]


def give_gradients(optimizer: Optimizer, seed: int) -> None:
    for index, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            p.grad = draws(*p.shape, seed=10 * seed + index)


def test_it_steps_its_members_as_they_would_alone() -> None:
    *alone, optimizers = members()
    *joint, others = members()
    combined = CombinedOptimizer(others)
    for seed in range(3):
        give_gradients(combined, seed)
        for p, q in zip(alone, joint, strict=True):
            assert q.grad is not None
            p.grad = q.grad.clone()
        for optimizer in (*optimizers, combined):
            optimizer.step()
    assert all(map(torch.equal, alone, joint))
    combined.zero_grad()
    assert all(p.grad is None for p in joint)


def test_groups_and_state_are_those_of_the_members() -> None:
    *_, optimizers = members()
    combined = CombinedOptimizer(optimizers)
    for _ in range(2):
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        assert [id(group) for group in combined.param_groups] == [id(group) for group in groups]
        assert all(optimizer.state is combined.state for optimizer in optimizers)
        give_gradients(combined, 0)
        combined.step()
        combined.load_state_dict(through_a_file(combined.state_dict()))  # makes new groups and a new state


def test_a_changed_learning_rate_reaches_the_members_also_after_loading() -> None:
    a, _, c, optimizers = members()
    combined = CombinedOptimizer(optimizers)
    combined.load_state_dict(combined.state_dict())
    before = [a.detach().clone(), c.detach().clone()]
    for group in combined.param_groups:
        group["lr"] = 0.0
    give_gradients(combined, 0)
    combined.step()
    assert torch.equal(a, before[0])
    assert torch.equal(c, before[1])


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (1 + step)),
        lambda optimizer: OneCycleLR(optimizer, max_lr=[0.1, 0.2, 0.3], total_steps=9, cycle_momentum=False),
    ],
)
def test_a_schedule_acts_on_all_members(schedule: Any) -> None:
    *_, optimizers = members()
    combined = CombinedOptimizer(optimizers)
    scheduler = schedule(combined)
    seen = set()
    for seed in range(3):
        give_gradients(combined, seed)
        combined.step()
        scheduler.step()
        rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
        assert rates == scheduler.get_last_lr()
        assert rates[2] == pytest.approx(3 * rates[0])
        seen.add(rates[0])
    assert len(seen) == 3


def test_the_closure_is_called_once() -> None:
    p, q = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    combined = CombinedOptimizer([SGD([p], lr=0.1), SignSGD([q], lr=0.1, weight_decay=0.0)])
    losses = []

    def closure() -> Tensor:
        losses.append((p * q).sum())
        losses[-1].backward()
        return losses[-1]

    assert combined.step(closure) is losses[0]
    assert len(losses) == 1
    assert [p.item(), q.item()] == pytest.approx([0.9, 0.9])


def test_lightning_can_move_its_state() -> None:
    a, *_, optimizers = members()
    combined = CombinedOptimizer(optimizers)
    give_gradients(combined, 0)
    combined.step()
    _optimizer_to_device(combined, torch.device("meta"))
    assert optimizers[0].state[a]["exp_avg"].device.type == "meta"
    assert optimizers[0].state[a]["step"] == 1


def test_a_copy_steps_its_own_members() -> None:
    a, *_, optimizers = members()
    combined = copy.deepcopy(CombinedOptimizer(optimizers))
    before = copy.deepcopy(combined.param_groups[0]["params"])
    give_gradients(combined, 0)
    combined.step()
    assert not torch.equal(combined.param_groups[0]["params"][0], before[0])
    assert torch.equal(a, before[0])


def test_what_could_not_be_stepped_is_refused() -> None:
    a, *_, optimizers = members()
    with pytest.raises(ValueError, match="at least one, got none"):
        CombinedOptimizer([])
    with pytest.raises(ValueError, match="more than one parameter group"):
        CombinedOptimizer([*optimizers, SGD([a], lr=0.1)])
    with pytest.raises(NotImplementedError, match="before combining"):
        CombinedOptimizer(optimizers).add_param_group({"params": [nn.Parameter(torch.ones(1))]})


def test_lightning_counts_one_step_and_resumes_bit_identically(tmp_path: Path) -> None:
    whole, first, second = Tables(), Tables(), Tables(seed=2)
    full, half, rest = (trainer(tmp_path, steps=steps, enable_checkpointing=False) for steps in (9, 6, 9))
    full.fit(whole)
    half.fit(first)
    assert half.global_step == 6
    half.save_checkpoint(tmp_path / "half.ckpt")
    rest.fit(second, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert rest.global_step == 9
    assert equal(copied(second), copied(whole))
    assert equal(rest.optimizers[0].state_dict(), full.optimizers[0].state_dict())
    assert not equal(copied(first), copied(whole))  # the last steps changed something
