"""Several processes against one with all their lanes: weights, optimizer state, figures, carry and collectives.

Relative differences are norms of differences over norms. Those of float32 are rounding: sums over lanes are made in
another order. Adam divides a gradient by its own size, so that it would blow up the rounding of one that is near zero;
these problems have none for long. A routed cell chooses by comparing scores: two within rounding of each other could
be chosen otherwise, which no run here comes to.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
RUNS = ("RTRL", "TBPTT", "BPTT", "BlockRTRL", "LazyExpertRTRL", "ETRM")
SEVERAL = (2, 4)
TOLERANCE = {32: 1e-6, 64: 1e-12}
Ranks = list[dict[tuple[str, int], dict[str, Any]]]

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("processes")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Ranks]:
    """Results of all runs on a number of processes, one entry per rank."""

    @cache
    def run(processes: int, *mode: str) -> Ranks:
        folder = tmp_path_factory.mktemp(f"on_{processes}")
        command = [sys.executable, str(Path(__file__).with_name("data_parallel_run.py")), str(folder), str(processes)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, *mode], env=environment, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return [torch.load(folder / f"rank_{rank}.pt", weights_only=True) for rank in range(processes)]

    return run


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=torch.finfo(expected.dtype).tiny))


def largest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(relative(found[name], value) for name, value in expected.items())


def moments(result: dict[str, Any]) -> dict[str, Tensor]:
    """Adam's moments of all parameters, each kind as one vector."""
    state = result["optimizer"].values()
    return {kind: torch.cat([of[kind].flatten() for of in state]) for kind in ("exp_avg", "exp_avg_sq")}


@pytest.mark.parametrize("bits", TOLERANCE)
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("processes", SEVERAL)
def test_several_processes_equal_one_with_all_lanes(trained: Callable[..., Ranks], processes: int, run: str, bits: int):
    [alone], ranks = trained(1), trained(processes)
    expected = alone[run, bits]
    assert expected["steps"] >= 50
    for rank in ranks:
        found = rank[run, bits]
        assert found["steps"] == expected["steps"]
        assert largest(found["weights"], expected["weights"]) < TOLERANCE[bits]
        assert largest(moments(found), moments(expected)) < TOLERANCE[bits]
        assert found["buffers"].keys() == expected["buffers"].keys()
        assert all(torch.equal(found["buffers"][name], value) for name, value in expected["buffers"].items())


@pytest.mark.parametrize("run", RUNS)
def test_without_the_collective_they_differ(trained: Callable[..., Ranks], run: str) -> None:
    """The negative control: ten steps of it are far beyond the tolerance."""
    first, second = trained(2, "control")
    assert largest(second[run, 32]["weights"], first[run, 32]["weights"]) > 1000 * TOLERANCE[32]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("processes", SEVERAL)
def test_every_rank_makes_the_same_collectives(trained: Callable[..., Ranks], processes: int, run: str) -> None:
    """One for the update, whatever the number of parameters; before it one of a cell with penalties; after it, where
    figures are logged, theirs."""
    results = [rank[run, 32] for rank in trained(processes)]
    assert all(result["collectives"] == results[0]["collectives"] for result in results)
    parameters = sum(value.numel() for value in results[0]["weights"].values())
    update = [f"all_reduce {parameters + 1}"]  # and the weight
    if run in ("BlockRTRL", "LazyExpertRTRL"):  # counts of 3 slots that are read or written, and of 5 experts
        update = ["all_reduce 2", f"all_reduce {parameters + 1 + 3 + 3 + 5}"]
    figures = ["all_reduce", *["all_gather"] * (2 if run == "ETRM" else 0)]
    for number, made in enumerate(results[0]["collectives"], 1):
        logged = [name.split()[0] for name in made[len(update) :]]
        assert made[: len(update)] == update
        assert logged == (figures if number == 1 or number % 5 == 0 else [])


def test_some_ranks_or_all_have_nothing_to_learn_from(trained: Callable[..., Ranks]) -> None:
    """Or the tests above would say nothing of it: of windows without a question, one is so in every lane."""
    weights = torch.tensor([rank["RTRL", 32]["weight"] for rank in trained(2)])  # [ranks, batches]
    silent = weights == 0
    assert (silent.any(0) & ~silent.all(0)).sum() > 5
    assert silent.all(0).sum() == len(weights[0]) - trained(2)[0]["RTRL", 32]["steps"] > 0


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("processes", SEVERAL)
def test_figures_are_those_of_all_processes(trained: Callable[..., Ranks], processes: int, run: str) -> None:
    """Also numbers of tokens and puzzles per second; on every rank, or callbacks would decide apart."""
    [alone], ranks = trained(1), trained(processes)
    expected = alone[run, 64]
    assert {"train/loss", "train/accuracy", "train/grad_norm"} <= expected["train"][-1].keys()
    for rank in ranks:
        for figures, wanted in zip(rank[run, 64]["train"], expected["train"], strict=True):
            assert figures == pytest.approx(wanted, rel=1e-5, abs=1e-12)
        assert rank[run, 64]["val"] == pytest.approx(expected["val"], rel=1e-5)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("processes", SEVERAL)
def test_the_carry_stays_local(trained: Callable[..., Ranks], processes: int, run: str) -> None:
    """Each rank has its own lanes' state and influence, and neither is among what is broadcast and saved as weights."""
    [alone], ranks = trained(1), trained(processes)
    assert all(name.startswith("evaluations.") for name in ranks[-1][run, 64]["new"])
    whole, parts = alone[run, 64]["carry"], [rank[run, 64]["carry"] for rank in ranks]
    if run == "BPTT":  # whole sequences: nothing is carried
        assert whole is None
        assert parts == [None] * processes
        return
    expected, *lanes = (of["lanes"]["latents"][0] if run == "ETRM" else of["state"] for of in (whole, *parts))
    torch.testing.assert_close(torch.cat(lanes), expected, rtol=1e-9, atol=1e-12)
    assert not any(torch.equal(lanes[0], other) for other in lanes[1:])
