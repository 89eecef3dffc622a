"""The update against hand calculations, and two processes against one."""

import copy
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from rtrl_moe_pl.training import GradientSums, NumericalFailure, update


def parameters(**values: list[float]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.tensor(value)) for name, value in values.items()}


def sums(weight: float, **grads: list[float]) -> GradientSums:
    result = GradientSums()
    result.add({name: torch.tensor(grad) for name, grad in grads.items()}, torch.tensor(weight))
    return result


class Counter:
    steps = 0

    def step(self) -> None:
        self.steps += 1


def test_divides_once_by_the_weight() -> None:
    p = parameters(a=[1.0, 2.0], b=[3.0])
    scheduler = Counter()
    result = update(p, sums(4.0, a=[4.0, -8.0], b=[12.0]), torch.optim.SGD(p.values(), lr=0.5), scheduler)
    assert p["a"].tolist() == [0.5, 3.0]  # 1 - 0.5 * 4/4, 2 + 0.5 * 8/4
    assert p["b"].tolist() == [1.5]  # 3 - 0.5 * 12/4
    assert result.stepped
    assert result.weight == 4.0
    assert result.grad_norm == pytest.approx((1 + 4 + 9) ** 0.5)
    assert scheduler.steps == 1


def test_sums_batches_before_dividing() -> None:
    p = parameters(a=[0.0])
    collected = sums(1.0, a=[1.0])
    collected.add({"a": torch.tensor([5.0])}, torch.tensor(2.0))
    assert collected.batches == 2
    update(p, collected, torch.optim.SGD(p.values(), lr=1.0))
    assert p["a"].tolist() == [-2.0]  # -(1 + 5) / (1 + 2), not the mean of the two means, -1.75
    assert collected.weight is None
    assert collected.batches == 0


@pytest.mark.parametrize(("clip", "expected"), [(2.5, [-1.5, -2.0]), (10.0, [-3.0, -4.0]), (None, [-3.0, -4.0])])
def test_clips_the_mean_gradient_by_its_norm(clip: float | None, expected: list[float]) -> None:
    p = parameters(a=[0.0], b=[0.0])
    result = update(p, sums(2.0, a=[6.0], b=[8.0]), torch.optim.SGD(p.values(), lr=1.0), gradient_clip=clip)
    assert [p["a"].item(), p["b"].item()] == pytest.approx(expected)
    assert result.grad_norm == pytest.approx(5.0)  # before clipping


def test_no_weight_means_no_step() -> None:
    """Adam moves on a zero gradient once it has momentum: the optimizer must not be called at all."""
    p = parameters(a=[1.0])
    optimizer, scheduler = torch.optim.Adam(p.values(), lr=0.1), Counter()
    update(p, sums(1.0, a=[1.0]), optimizer, scheduler)
    before = p["a"].item()
    result = update(p, sums(0.0, a=[0.0]), optimizer, scheduler)
    assert p["a"].item() == before
    assert not result.stepped
    assert scheduler.steps == 1
    update(p, sums(1.0, a=[0.0]), optimizer, scheduler)  # negative control: a zero gradient with weight moves it
    assert p["a"].item() != before


def test_frozen_and_absent_parameters_stay() -> None:
    p = parameters(a=[1.0], frozen=[1.0], absent=[1.0])
    p["frozen"].requires_grad_(False)
    update(p, sums(1.0, a=[1.0], frozen=[0.0]), torch.optim.SGD(p.values(), lr=0.5, weight_decay=0.5))
    assert [value.item() for value in p.values()] == [0.25, 1.0, 1.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_gradient_is_named_and_nothing_is_changed(bad: float) -> None:
    p = parameters(a=[1.0], b=[1.0, 1.0])
    with pytest.raises(NumericalFailure, match=r"^gradient of b holds .* of 2 values$"):
        update(p, sums(1.0, a=[1.0], b=[1.0, bad]), torch.optim.SGD(p.values(), lr=0.5))
    assert p["a"].tolist() == [1.0]
    assert p["b"].tolist() == [1.0, 1.0]


def test_overflowing_norm_is_a_failure() -> None:
    p = parameters(a=[1.0], b=[1.0])
    with pytest.raises(NumericalFailure, match="the gradient of all parameters is finite, but its norm overflows"):
        update(p, sums(1.0, a=[3e19], b=[3e19]), torch.optim.SGD(p.values(), lr=0.5))
    assert p["a"].tolist() == [1.0]


def test_bad_weight_stops_the_update() -> None:
    p = parameters(a=[1.0])
    with pytest.raises(NumericalFailure):
        update(p, sums(float("nan"), a=[1.0]), torch.optim.SGD(p.values(), lr=0.5))
    assert p["a"].tolist() == [1.0]


def test_bad_parameter_is_named() -> None:
    p = parameters(a=[1.0], b=[1.0])
    with pytest.raises(NumericalFailure, match=r"^parameter b holds 0 NaN and 1 infinite"):
        update(p, sums(1.0, a=[0.0], b=[1e18]), torch.optim.SGD(p.values(), lr=1e30))


def test_unknown_names_are_refused() -> None:
    p = parameters(a=[1.0])
    with pytest.raises(ValueError, match=r"unknown parameters \['z'\]"):
        update(p, sums(1.0, z=[0.0]), torch.optim.SGD(p.values(), lr=0.5))


def test_saved_sums_continue() -> None:
    half = sums(1.0, a=[1.0])
    restored = GradientSums()
    restored.load_state_dict(copy.deepcopy(half.state_dict()))
    restored.add({"a": torch.tensor([5.0])}, torch.tensor(2.0))
    p = parameters(a=[0.0])
    update(p, restored, torch.optim.SGD(p.values(), lr=1.0))
    assert p["a"].tolist() == [-2.0]


WORKER = """
import os, sys, torch, torch.distributed as dist
from torch import nn
from rtrl_moe_pl.training import GradientSums, NumericalFailure, update
rank = int(os.environ["RANK"])
dist.init_process_group("gloo")
p = {"a": nn.Parameter(torch.zeros(2)), "b": nn.Parameter(torch.zeros(1))}
optimizer = torch.optim.Adam(p.values(), lr=0.1)
data = torch.load(sys.argv[1])
for step in range(3):
    sums = GradientSums()
    sums.add({"a": data["a"][step, rank], "b": data["b"][step, rank]}, data["w"][step, rank])
    result = update(p, sums, optimizer, gradient_clip=0.5)
sums.add({"a": torch.ones(2), "b": torch.ones(1)}, torch.tensor(float("nan") if rank == 1 else 1.0))
try:
    update(p, sums, optimizer)
    failed = False
except NumericalFailure:
    failed = True
got = {"a": p["a"].detach(), "b": p["b"].detach(), "norm": result.grad_norm, "failed": failed}
torch.save(got, sys.argv[2] + str(rank))
"""


@pytest.mark.xdist_group("processes")
def test_two_processes_equal_one_with_both_batches(tmp_path: Path) -> None:
    """Also with a rank that has no weight at a step; and a failure on one rank stops both."""
    data = {
        "a": torch.randn(3, 2, 2),
        "b": torch.randn(3, 2, 1),
        "w": torch.tensor([[3.0, 5.0], [0.0, 2.0], [1.0, 1.0]]),
    }
    data["a"][1, 0], data["b"][1, 0] = 0, 0
    torch.save(data, tmp_path / "data.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", WORKER, str(tmp_path / "data.pt"), str(tmp_path / "out")]
    workers = [subprocess.Popen(command, env={**environment, "RANK": str(rank)}) for rank in range(2)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]

    p = {"a": nn.Parameter(torch.zeros(2)), "b": nn.Parameter(torch.zeros(1))}
    optimizer = torch.optim.Adam(p.values(), lr=0.1)
    for step in range(3):
        both = GradientSums()
        for rank in range(2):
            both.add({"a": data["a"][step, rank], "b": data["b"][step, rank]}, data["w"][step, rank])
        result = update(p, both, optimizer, gradient_clip=0.5)
    for rank in range(2):
        got = torch.load(tmp_path / f"out{rank}")
        torch.testing.assert_close(got["a"], p["a"].detach())
        torch.testing.assert_close(got["b"], p["b"].detach())
        assert got["norm"] == pytest.approx(result.grad_norm)
        assert got["failed"]
