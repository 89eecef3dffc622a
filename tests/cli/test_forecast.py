"""The command forecast: what it shows, what it recommends, and whether its bytes are those that are taken."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rtrl_moe_pl.cli import forecast as command
from rtrl_moe_pl.cli import trial
from rtrl_moe_pl.cli.forecast import Row, recommend
from rtrl_moe_pl.data import Batch
from rtrl_moe_pl.gradients import BPTT, RTRL, TBPTT, Forecast, GradientAlgorithm, graph_bytes
from rtrl_moe_pl.gradients.graph_memory import RECORD_BYTES
from rtrl_moe_pl.modules import SequenceModule
from rtrl_moe_pl.modules.reasoning_audit import TrialRun
from rtrl_moe_pl.reasoning.etrm import Mode
from tests.modules.reasoning_helpers import data as reasoning_data
from tests.modules.reasoning_helpers import module as reasoning_module
from tests.test_cli import here, python, run  # noqa: F401
from tests.test_reasoning_cli import run as run_puzzles

MOE = '{"class_path": "RecurrentMoE", "init_args": {"slot_size": 3, "num_slots": 3, "num_experts": 4}}'
CLOSE = 1.2  # RTRL of all kinds; 1.5 for the others, whose records of operations differ in size


def lines(text: str) -> dict[str, list[str]]:
    """The table: cells by algorithm."""
    rows = [line.removeprefix("*").split("  ") for line in text.splitlines()]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    return {row[0]: row[1:] for row in cells if len(row) > 3}


def test_a_row_for_every_algorithm_that_can_train_the_cell(
    here: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = sorted(here.rglob("*"))
    assert run("forecast") == 0
    shown = capsys.readouterr().out
    table = lines(shown)
    assert set(table) - {"algorithm"} == {
        "RTRL(window=4)",
        "BPTT()",
        "TBPTT(window=4)",
        "RTRL(window=1)",
        "RTRL(window=5)",
    }
    assert "* RTRL(window=4)" in shown
    assert "GRU, 150 parameters, state 5, 4 lanes x 12 steps a batch, sequences of up to 9 steps" in shown
    exact, influence, _, grows, *_ = table["RTRL(window=4)"]
    assert (exact, influence, grows) == ("yes", "12 kB", "no")  # 4 lanes x 5 x 150 x 4 bytes
    exact, influence, _, grows, *_, note = table["BPTT()"]
    assert (exact, influence, grows, note) == ("yes", "0 B", "yes", "needs data.layout: sequences")
    assert table["TBPTT(window=4)"][0] == "no"
    assert "\nrecommended: " in shown
    assert sorted(here.rglob("*")) == before  # nothing is written


def test_routed_cells_have_two_more(here: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    gradient = '{"class_path": "LazyExpertRTRL", "init_args": {"window": 3, "ring": 4}}'
    assert run("forecast", "--model.cell", MOE, "--model.gradient", gradient, "--steps", "6") == 0
    shown = capsys.readouterr().out
    assert {"BlockRTRL(window=9)", "LazyExpertRTRL(window=9, ring=16, catch_up='walk')"} <= set(lines(shown))
    assert "* LazyExpertRTRL(window=3, ring=4, catch_up='walk')" in shown


def test_a_curriculum_is_judged_by_its_last_length(
    here: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its first batches would be whole sequences, without influence."""
    data = {"length": 32, "curriculum": [12], "min_gap": 3, "steps_per_batch": 12, "batch_size": 2}
    chosen = json.dumps({"class_path": "HaystackDataModule", "init_args": data})
    assert run("forecast", "--data", chosen, "--checkpoint.monitor", "val/progress") == 0
    shown = capsys.readouterr().out
    assert "2 lanes x 12 steps a batch, sequences of up to 32 steps" in shown
    assert "needs data.layout: sequences" in shown


def test_what_does_not_fit_is_not_run(
    here: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timed: list[str] = []

    def spy(model: Any, algorithm: GradientAlgorithm, data: Any) -> tuple[float, int]:
        timed.append(repr(algorithm))
        return 1.0, 0

    monkeypatch.setattr(command, "seconds_per_step", spy)
    assert run("forecast", "--memory", "0.0002", "--data.n_max", "40", "--model.gradient.window", "1") == 0
    shown = capsys.readouterr().out
    assert "BPTT()" not in timed
    assert lines(shown)["BPTT()"][-1] == "not run: does not fit in 200 kB"
    assert run("forecast", "--memory", "1e-8") == 0
    shown = capsys.readouterr().out
    assert "recommended: none fits in 10 B: make data.batch_size or the cell smaller" in shown


@pytest.mark.parametrize("chosen", [(), ("--model.gradient.chunk", "3")])
def test_where_the_default_chunk_does_not_fit_the_longest_that_does_is_tried(
    here: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    chosen: tuple[str, ...],
) -> None:
    """P takes 192 kB, and each step of a chunk 33.6 kB. Once it is what is configured, it is shown once."""

    def seconds(model: Any, algorithm: GradientAlgorithm, data: Any) -> tuple[float, int]:
        return {1: 20.0, 4: 3.0, 5: 4.0}[algorithm.window or 1] if algorithm.exact else 1.0, 0

    monkeypatch.setattr(command, "seconds_per_step", seconds)
    batch = "--data.batch_size", "64"
    assert run("forecast", "--memory", "3e-4", *batch, *chosen) == 0
    shown = capsys.readouterr().out
    table = lines(shown)
    assert table["RTRL(window=4)"][-1] == "not run: does not fit in 300 kB"
    assert table["RTRL(window=4, chunk=3)"][:3] == ["yes", "192 kB", "101 kB"]
    assert [name for name in table if "chunk" in name] == [f"RTRL(window={window}, chunk=3)" for window in (4, 5)]
    assert shown.count("RTRL(window=4, chunk=3) ") == 1
    assert "recommended: RTRL(window=4, chunk=3): exact, 3.0 times TBPTT(window=4), in memory that " in shown
    assert run("forecast", "--memory", "2.257e-4", *batch) == 0
    assert "recommended: RTRL(window=4, chunk=1): exact, 3.0 times" in capsys.readouterr().out
    assert run("forecast", "--memory", "2.255e-4", *batch) == 0  # less than P and a step
    shown = capsys.readouterr().out
    assert "chunk" not in shown
    assert "recommended: TBPTT(window=4): no exact algorithm fits; biased" in shown


def test_shorter_chunks_are_tried_of_routed_cells_too(
    here: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command, "seconds_per_step", lambda *_: (1.0, 0))
    assert run("forecast", "--memory", "1.2e-4", "--model.cell", MOE) == 0
    shown = capsys.readouterr().out
    assert "  BlockRTRL(window=9, chunk=4) " in shown
    assert "  LazyExpertRTRL(window=9, chunk=3, ring=16, catch_up='walk') " in shown


class Slow(nn.Module):
    """Of a given time a step."""

    state_size = 3

    def __init__(self, input_size: int = 3) -> None:
        super().__init__()
        self.input_size, self.mix, self.steps = input_size, nn.Linear(input_size + 3, 3), 0

    def initial_state(self, batch_size: int) -> torch.Tensor:
        return torch.zeros(batch_size, 3)

    def forward(self, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        time.sleep(0.002)
        self.steps += 1
        return torch.tanh(self.mix(torch.cat([x, s], -1)))


@pytest.mark.parametrize(("steps", "chunk"), [(16, 4000), (4000, 16)])
def test_what_takes_long_is_estimated_from_fewer_steps(steps: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a period of many batches, and of one long batch: 8 s each."""
    monkeypatch.setattr(trial, "LONGEST", 0.2)
    algorithm = RTRL(window=8, chunk=chunk)
    cell = Slow()
    model = SequenceModule(cell, 3, algorithm)
    starts = torch.zeros(2, steps, dtype=torch.bool)
    labels = torch.zeros(2, steps, dtype=torch.long)
    data = [Batch(torch.randn(2, steps, 3), (labels, torch.ones(2, steps)), starts)]
    seconds, estimated_from = trial.seconds_per_step(model, algorithm, data)
    assert 8 <= estimated_from < 400
    assert cell.steps < 1500
    assert 0.002 < seconds < 0.02
    monkeypatch.setattr(trial, "LONGEST", 30.0)
    assert trial.seconds_per_step(model, RTRL(window=8, chunk=16), [trial.first_steps(iter(data), 16)])[1] == 0


def test_an_estimate_is_said(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(command, "seconds_per_step", lambda *_: (1.0, 8))
    assert run("forecast") == 0
    table = lines(capsys.readouterr().out)
    assert table["RTRL(window=1)"][-1] == "time estimated from 8 steps"
    assert table["BPTT()"][-1] == "needs data.layout: sequences; time estimated from 8 steps"


def test_a_cell_that_an_algorithm_refuses_is_said(here: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    assert run("forecast", "--model.cell", "tests.cli.test_forecast.Normalised") == 0
    table = lines(capsys.readouterr().out)
    assert table["RTRL(window=1)"][-1].startswith("not run: ")
    assert "TBPTT(window=4)" in table


class Normalised(nn.Module):
    """Over the batch, so that lanes are not alone."""

    state_size = 3

    def __init__(self, input_size: int = 3) -> None:
        super().__init__()
        self.input_size, self.mix, self.norm = input_size, nn.Linear(input_size + 3, 3), nn.BatchNorm1d(3)

    def initial_state(self, batch_size: int) -> torch.Tensor:
        return torch.zeros(batch_size, 3)

    def forward(self, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.norm(self.mix(torch.cat([x, s], -1))))


def row(algorithm: GradientAlgorithm, seconds: float | None) -> Row:
    return Row(algorithm, Forecast(0, 1000, 1.0), seconds)


@pytest.mark.parametrize(
    ("times", "configured", "said"),
    [
        (
            (1.2, 1.0, 3.0),
            RTRL(window=2),
            "BPTT(): exact, 1.2 times TBPTT(window=8), and whole sequences of 100 steps fit",
        ),
        ((None, 1.0, 3.0), RTRL(window=8), "RTRL(window=8): exact, 3.0 times TBPTT(window=8), in memory that does not"),
        (
            (3.1, 1.0, 3.2),
            RTRL(window=8),
            "RTRL(window=8): exact, 3.2 times TBPTT(window=8)",
        ),  # as configured, within noise
        (
            (None, 1.0, 11.0),
            RTRL(window=8),
            "TBPTT(window=8): exact ones take over 10 times as long; biased, it gives no ",
        ),
        (
            (None, 1.0, None),
            RTRL(window=8),
            "TBPTT(window=8): no exact algorithm fits; biased, it gives no credit beyond 8",
        ),
        (
            (1.0, None, 3.0),
            TBPTT(window=8),
            "BPTT(): exact, the cheapest, and whole sequences of 100 steps fit (1 kB); lo",
        ),
        ((None, None, None), BPTT(), "none fits in 5 kB: make data.batch_size or the cell smaller"),
    ],
)
def test_recommendation(times: tuple[float | None, ...], configured: GradientAlgorithm, said: str) -> None:
    rows = [row(a, t) for a, t in zip((BPTT(), TBPTT(window=8), RTRL(window=8)), times, strict=True)]
    assert recommend(rows, configured, 100, 5000).startswith(said)


def test_puzzles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_puzzles("forecast") == 0
    shown = capsys.readouterr().out
    for part in ("* re_encode", "  cached", "1 of 2", "2 of 2", "recommended: re_encode: every lane's loss reaches"):
        assert part in shown
    assert run_puzzles("forecast", "--memory", "1e-6") == 0
    shown = capsys.readouterr().out
    assert shown.count("not run: does not fit in 1 kB") == 3
    assert shown.endswith("recommended: none fits in 1 kB: make the model smaller\n")
    assert run_puzzles("forecast", "--memory", "4e-4") == 0
    shown = capsys.readouterr().out
    assert "recommended: re_encode with data.batch_size at most about " in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", ["re_encode", "cached"])
def test_the_forecast_of_puzzles_from_two_lanes_is_that_of_all(mode: Mode) -> None:
    """Operations: those that torch counts of all lanes together."""
    stream: Any = reasoning_data(batch_size=24).on_after_batch_transfer("train", 0)
    trial_run = TrialRun(reasoning_module(mode=mode), stream)
    found = trial.forecast_reasoning(trial_run.model, trial_run.stream)
    with FlopCounterMode(display=False) as counter:
        kept = graph_bytes(trial_run.step)
    assert found.total_bytes == pytest.approx(kept, rel=0.02)
    assert found.operations_per_token * 24 * trial_run.model.shape.cells == pytest.approx(counter.get_total_flops())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", "0"), "error: --steps must be at least 1, got 0"),
        (("--memory", "-1"), "error: --memory must be a finite number above 0, got -1"),
        (("--memory", "much"), "error: memory: needs "),
        (("--ckpt_path", "last"), "error: --ckpt_path last: no complete checkpoint below"),
    ],
)
def test_bad_options_are_refused_in_a_line(
    here: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    assert run("forecast", *arguments) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("error:") == 1
    assert "recommended" not in captured.out


def test_what_autograd_keeps_is_counted_once() -> None:
    x = torch.randn(1000, requires_grad=True)
    assert graph_bytes(lambda: x.exp()) == 4000 + RECORD_BYTES
    assert graph_bytes(lambda: x + 1) == 0
    assert graph_bytes(lambda: x * x) == 4000 + 2 * RECORD_BYTES


def peaks(folder: Path, cases: list[str]) -> dict[str, tuple[int, int]]:
    """Forecast and measured bytes of cases; of all, if none are named."""
    done = python("-m", "tests.cli.peak_run", *cases, folder=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def is_close(case: str, forecast: int, measured: int) -> bool:
    return abs(math.log(forecast / measured)) < math.log(CLOSE if "RTRL" in case else 1.5)


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
def test_forecast_bytes_are_those_that_are_taken(tmp_path: Path) -> None:
    """Peaks of processes, of runs large enough that what else a process takes is small: the least of three, because
    freed memory that an allocator could not use again comes on top now and then."""
    found = peaks(tmp_path, [])
    for _ in range(2):
        off = [case for case, figures in found.items() if not is_close(case, *figures)]
        for case, (forecast, measured) in (peaks(tmp_path, off) if off else {}).items():
            found[case] = forecast, min(measured, found[case][1])
    for case, figures in found.items():
        assert figures[1] > 50e6, case
        assert is_close(case, *figures), (case, figures)
