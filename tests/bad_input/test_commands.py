"""Real commands: what main does in process, a process does too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rtrl_moe_pl.cli.command_line import UNREAD
from tests.bad_input.case import CONFIGS, ROOT, Case, contents, require_one_line, table
from tests.test_cli import python

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("processes")]

CASES = [
    Case("fit", ["--trainer.maximum_steps", "3"], ["unknown key trainer.maximum_steps"]),
    Case("validate", ["--ckpt_path", "gone.ckpt"], ["--ckpt_path: there is no file gone.ckpt"], "validate"),
    Case("test", ["--data.batch_size", "0"], ["data.batch_size must be at least 1, got 0"], "test"),
    Case("predict", [], ["predict needs trained weights", "give --ckpt_path PATH, or last"], "predict"),
    Case("audit", ["--steps", "0"], ["--steps must be at least 1, got 0"], "audit"),
]


@table(CASES)
def test_refused(here: Path, case: Case) -> None:
    before = contents(here)
    done = python("-m", "rtrl_moe_pl", case.command, *CONFIGS[case.config], *case.arguments, folder=here)
    assert done.returncode == 1
    [line] = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    require_one_line(line, done.stderr + done.stdout, case.parts)
    assert contents(here) == before


def test_debug_shows_the_traceback_before_the_line(here: Path) -> None:
    case = CASES[2]
    done = python("-m", "rtrl_moe_pl", case.command, "--debug", *CONFIGS[case.config], *case.arguments, folder=here)
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert done.stderr.splitlines()[-1] == f"error: {case.parts[0]}"


def test_an_output_that_nobody_reads_ends_quietly(here: Path) -> None:
    command = f"{sys.executable} -m rtrl_moe_pl fit --config config.yaml --print_config | true"
    done = subprocess.run(
        ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"],
        cwd=here,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        timeout=240,
    )
    assert done.returncode == UNREAD
    assert done.stderr == ""


def test_a_warning_is_one_line_without_code(here: Path) -> None:
    done = python("-m", "rtrl_moe_pl", "fit", *CONFIGS["sequence"], "--trainer.max_steps=0", folder=here)
    assert done.returncode == 0
    [line] = [line for line in done.stderr.splitlines() if "nothing was trained" in line]
    assert line.startswith("warning: nothing was trained: the weights are those of step 0, with trainer: max_steps=0, ")
    assert "Warning" not in done.stderr
    assert "rank_zero_warn" not in done.stderr
