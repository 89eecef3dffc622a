"""The benchmarks' parts that nothing else runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import side_by_side
from benchmarks.common import RESULTS
from benchmarks.step_time import influence_update


def test_influence_update_is_measured() -> None:
    found = influence_update(hidden=4, batch=2, repetitions=1, device=torch.device("cpu"))
    assert found.keys() == {"n", "batch", "update_share_of_sgemm", "product_share_of_sgemm"}
    assert 0 < found["update_share_of_sgemm"]
    assert 0 < found["product_share_of_sgemm"]


@pytest.mark.slow
def test_side_by_side_separates_learning_from_chance() -> None:
    """One seed, and one of the forms of RTRL; the whole is three seeds of all."""
    last = {n: side_by_side.learn(n, seed=0, updates=60)["curve"][-1][1] for n in ("BPTT", "BlockRTRL", "TBPTT")}
    assert last["BPTT"] > 0.95
    assert last["BlockRTRL"] > 0.95
    assert last["TBPTT"] < side_by_side.CHANCE + 0.1


@pytest.mark.parametrize("name", side_by_side.ALGORITHMS)
def test_side_by_side_compares_gradients(name: str) -> None:
    found = side_by_side.compare(name, seed=0)
    if name == "TBPTT":
        assert found["cosine"] < 0.95
    else:
        assert found["relative_error"] < 1e-12


def test_side_by_side_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = json.loads((RESULTS / "side_by_side.json").read_text())["results"]
    assert len(side_by_side.table(found).splitlines()) == 2 + len(side_by_side.ALGORITHMS)
    monkeypatch.setattr(side_by_side, "RESULTS", tmp_path)
    side_by_side.draw(found)
    assert (tmp_path / "side_by_side.png").stat().st_size > 10_000


TRAINS = """
import subprocess
from benchmarks.command import train_all

def fit(name, seed):
    print("begun", flush=True)
    subprocess.run(["sleep", "60"])
    return {}

train_all("", "unused", ["a"], fit, str)
"""


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize(
    ("command", "shown"),
    [(["-m", "benchmarks.side_by_side"], "training and memory"), (["-c", TRAINS], "begun")],
    ids=["processes", "threads"],
)
def test_an_interrupt_ends_a_pool_at_once_and_quietly(command: list[str], shown: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(RESULTS.parent.parent)}
    out, err = subprocess.PIPE, subprocess.STDOUT
    command = [sys.executable, *command]
    with subprocess.Popen(command, stdout=out, stderr=err, env=environment, start_new_session=True) as run:
        try:
            assert run.stdout is not None
            said = ""
            while shown not in said:
                read = os.read(run.stdout.fileno(), 4096).decode()
                assert read, said
                said += read
            time.sleep(0.5)  # workers are at their imports
            begun = time.monotonic()
            os.killpg(run.pid, signal.SIGINT)  # as a terminal does
            said += run.communicate(timeout=15)[0].decode()  # ends with the last process that could write
            assert time.monotonic() - begun < 5
        finally:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode == 130
    assert "Traceback" not in said
