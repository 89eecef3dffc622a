"""The command line, from help to audit, and on two processes."""

import csv
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rtrl_moe_pl.cells import GRU
from rtrl_moe_pl.cli import main
from rtrl_moe_pl.gradients import RTRL, WindowResult
from rtrl_moe_pl.modules import SequenceModule
from rtrl_moe_pl.training.checkpoints import PER_RANK, shard_of

ROOT = Path(__file__).parents[1]
CONFIG = """
seed_everything: 3
model:
  class_path: SequenceModule
  init_args:
    cell: {class_path: GRU, init_args: {hidden_size: 5}}
    gradient: {class_path: RTRL, init_args: {window: 4}}
    optimizer: {class_path: Adam, init_args: {lr: 0.01}}
data:
  class_path: AnBnDataModule
  init_args: {n_max: 4, batch_size: 4, steps_per_batch: 12, batches_per_epoch: 5, validation_size: 16}
trainer:
  max_steps: 10
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with a configuration."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(CONFIG)
    return tmp_path


def run(command: str, *arguments: str) -> int:
    return main([command, "--config", "config.yaml", *arguments])


def checkpoint(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def python(
    *arguments: str, folder: Path, stderr: int = subprocess.PIPE, **environment: str
) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    options: dict = {"cwd": folder, "env": variables, "stdout": subprocess.PIPE, "stderr": stderr, "text": True}
    return subprocess.run([sys.executable, *arguments], timeout=240, **options)


def test_help_does_not_import_torch(tmp_path: Path) -> None:
    began = time.perf_counter()
    done = python("-X", "importtime", "-m", "rtrl_moe_pl", "--help", folder=tmp_path)
    assert time.perf_counter() - began < 3
    assert done.returncode == 0
    assert "torch" not in done.stderr
    assert "lightning" not in done.stderr
    for command in ("fit", "validate", "test", "predict", "audit", "forecast"):
        assert f"\n  {command} " in done.stdout


def test_fit_writes_logs_and_checkpoints(here: Path) -> None:
    assert run("fit") == 0
    [version] = (here / "lightning_logs").iterdir()
    assert version.name == "version_0"
    assert (version / "config.yaml").is_file()
    assert list(version.glob("events.out.tfevents.*"))
    names = {path.name for path in (version / "checkpoints").iterdir()}
    assert "last.ckpt" in names
    assert [name for name in names if name.startswith("best-step")]
    assert checkpoint(version / "checkpoints/last.ckpt")["global_step"] == 10


def test_nothing_is_recommended_or_left_empty(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert run("fit", "--trainer.max_steps", "1") == 0
    assert "GPU available" in caplog.text  # Lightning's messages are there
    assert "litlogger" not in caplog.text
    assert not list(here.rglob("hparams.yaml"))


def test_last_is_the_newest_whatever_the_accuracy(here: Path) -> None:
    """With one callback for both, last.ckpt would stay at the best."""
    assert run("fit", "--model.optimizer.lr", "0", "--trainer.max_steps", "12") == 0  # no validation is better
    folder = here / "lightning_logs/version_0/checkpoints"
    [best] = folder.glob("best-*.ckpt")
    assert checkpoint(best)["global_step"] == 5
    assert checkpoint(folder / "last.ckpt")["global_step"] == 12  # two steps into an epoch


def test_a_second_run_overwrites_nothing(here: Path) -> None:
    assert run("fit") == 0
    before = {path: path.read_bytes() for path in (here / "lightning_logs").rglob("*") if path.is_file()}
    assert run("fit") == 0
    assert run("validate", "--ckpt_path", "last") == 0
    assert {path: path.read_bytes() for path in before} == before
    assert (here / "lightning_logs/version_1/checkpoints/last.ckpt").is_file()


def test_without_a_logger_nothing_is_overwritten_either(here: Path) -> None:
    for _ in range(2):
        assert run("fit", "--trainer.logger", "false") == 0
    names = sorted(path.name for path in (here / "checkpoints").iterdir())
    last = [f"last-step{step}-batch{step}{again}.ckpt" for step in (10, 5) for again in ("-v1", "")]
    assert [name for name in names if name.startswith("last")] == [*last, "last.ckpt"]
    assert (here / "checkpoints/last.ckpt").resolve().name == "last-step10-batch10-v1.ckpt"  # a link, to the newest
    assert (here / "config.yaml").read_text() == CONFIG


def test_resumed_from_last_equals_unbroken(here: Path) -> None:
    assert run("fit", "--trainer.max_steps", "17") == 0
    unbroken = checkpoint(here / "lightning_logs/version_0/checkpoints/last.ckpt")
    elsewhere = str(here / "elsewhere")
    assert run("fit", "--trainer.max_steps", "8", "--trainer.default_root_dir", elsewhere) == 0
    resume = ("--ckpt_path", "last", "--trainer.default_root_dir", elsewhere)
    assert run("fit", "--trainer.max_steps", "17", *resume) == 0
    resumed = checkpoint(here / "elsewhere/lightning_logs/version_1/checkpoints/last.ckpt")
    assert resumed["global_step"] == 17
    for name, value in unbroken["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name])
    assert torch.equal(unbroken[PER_RANK]["carry"]["state"], resumed[PER_RANK]["carry"]["state"])


def test_the_seed_decides_everything(here: Path) -> None:
    for seed in ("3", "3", "4"):
        assert run("fit", "--seed_everything", seed) == 0
    one, two, other = (
        checkpoint(here / f"lightning_logs/version_{i}/checkpoints/last.ckpt")["state_dict"] for i in range(3)
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_evaluation_and_prediction(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fit") == 0
    for command in ("validate", "test"):
        assert run(command, "--ckpt_path", "last") == 0
    shown = capsys.readouterr().out
    assert "val/accuracy_4x" in shown
    assert "test/accuracy_2x" in shown
    assert run("predict", "--ckpt_path", "last") == 0
    [path] = here.rglob("predictions.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16  # one question a sequence
    assert {row["label"] for row in rows} == {"0", "1"}
    assert {row["prediction"] for row in rows} <= {"0", "1"}


def test_print_config_round_trips(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fit", "--print_config") == 0
    first = capsys.readouterr().out
    (here / "config.yaml").write_text(first)
    assert run("fit", "--print_config") == 0
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(first)
    assert run("fit") == 0
    assert not (here / "lightning_logs/version_1").exists()


def test_the_gradient_is_one_block(here: Path) -> None:
    for gradient in ('{"class_path": "TBPTT", "init_args": {"window": 3}}', "BPTT"):
        assert run("fit", "--model.gradient", gradient, "--data.layout", "sequences") == 0


def test_readouts_and_cells_of_all_kinds(here: Path) -> None:
    mlp = '{"class_path": "MLP", "init_args": {"input_size": 10, "hidden_size": 4}}'
    assert run("fit", "--model.cell", "LSTM", "--model.cell.hidden_size", "5", "--model.readout", mlp) == 0


class WrongRTRL(RTRL):
    """One gradient is off by a little."""

    def step(self, *arguments, **options) -> WindowResult:
        result = super().step(*arguments, **options)
        result.grads["cell.input.bias"] = result.grads["cell.input.bias"] * (1 + 1e-6)
        return result


@pytest.mark.parametrize(
    ("gradient", "status", "verdict"),
    [
        ('{"class_path": "RTRL", "init_args": {"window": 7}}', 0, "verdict: exact"),
        ('{"class_path": "TBPTT", "init_args": {"window": 7}}', 0, "verdict: approximate, as it claims"),
        (
            '{"class_path": "RTRL", "init_args": {"window": 7, "chunk": 7, "influence_dtype": "bfloat16"}}',
            0,
            "verdict: approximate, as it claims (it rounds the influence to bfloat16)",
        ),
        ('{"class_path": "tests.test_cli.WrongRTRL", "init_args": {"window": 7}}', 1, "verdict: OFF"),
    ],
)
def test_audit(here: Path, capsys: pytest.CaptureFixture[str], gradient: str, status: int, verdict: str) -> None:
    assert run("audit", "--model.gradient", gradient) == status
    shown = capsys.readouterr().out
    assert verdict in shown
    for part in (
        "cell.recurrent.weight",
        "readout.bias",
        "parameters without gradient: none",
        "\n       200 ",
        "memory: ",
        "time: ",
    ):
        assert part in shown
    assert not (here / "lightning_logs").exists()


def test_audit_of_whole_sequences(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("audit", "--model.gradient", "BPTT", "--data.layout", "sequences", "--steps", "30") == 0
    assert "4 lanes x 30 steps with" in capsys.readouterr().out


def test_threads(here: Path) -> None:
    before = torch.get_num_threads()
    try:
        assert run("fit", "--threads", "2") == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def tf32_flags() -> tuple[Any, Any]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_is_set_for_the_run_alone(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tf32: bool
) -> None:
    seen, before, start = [], tf32_flags(), SequenceModule.on_train_start
    of_cpu = getattr(torch.backends.mkldnn, "matmul", None)  # torch 2.9
    monkeypatch.setattr(
        SequenceModule,
        "on_train_start",
        lambda self: (start(self), seen.append((*tf32_flags(), getattr(of_cpu, "fp32_precision", None)))),
    )
    others = getattr(of_cpu, "fp32_precision", None)
    assert run("fit", *(["--tf32", "true"] if tf32 else [])) == 0
    assert seen == [(tf32, tf32, others)]  # a CPU's products are left alone
    assert tf32_flags() == before
    assert ("--tf32: there is no GPU here" in capsys.readouterr().out) == (tf32 and not torch.cuda.is_available())
    assert run("fit", "--tf32", "true", "--model.gradient.window", "0") == 1
    assert tf32_flags() == before


def test_debug_shows_the_traceback(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fit", "--model.gradient.window", "0", "--debug") == 1
    captured = capsys.readouterr().err
    assert "Traceback" in captured
    assert captured.splitlines()[-1].startswith("error: model.gradient.window must be")


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
def test_two_processes_equal_one_with_the_double_batch(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The bare flag: no strategy is named. Also interrupted and resumed, with the carry of both ranks."""
    alone = python(
        "-m", "rtrl_moe_pl", "fit", "--config", "config.yaml", "--trainer.default_root_dir", "alone", folder=here
    )
    assert alone.returncode == 0, alone.stderr[-3000:]
    two = ("--trainer.devices", "2", "--data.batch_size", "2", "--trainer.default_root_dir", "two")
    first = python("-m", "rtrl_moe_pl", "fit", "--config", "config.yaml", *two, "--trainer.max_steps", "7", folder=here)
    assert first.returncode == 0, first.stderr[-3000:]
    again = ("--ckpt_path", "last")
    second = python("-m", "rtrl_moe_pl", "fit", "--config", "config.yaml", *two, *again, folder=here)
    assert second.returncode == 0, second.stderr[-3000:]

    expected = checkpoint(here / "alone/lightning_logs/version_0/checkpoints/last.ckpt")
    folder = here / "two/lightning_logs/version_1/checkpoints"
    got, shard = checkpoint(folder / "last.ckpt"), checkpoint(shard_of(folder / "last.ckpt", 1))
    assert got["global_step"] == 10
    for name, value in expected["state_dict"].items():
        torch.testing.assert_close(got["state_dict"][name], value, rtol=1e-4, atol=1e-6)
    lanes = torch.cat([got[PER_RANK]["carry"]["state"], shard[PER_RANK]["carry"]["state"]])
    torch.testing.assert_close(lanes, expected[PER_RANK]["carry"]["state"], rtol=1e-4, atol=1e-6)

    alone_again = ("--data.batch_size", "4", "--trainer.default_root_dir", "two", "--ckpt_path", "last")
    assert run("fit", *alone_again, "--trainer.max_steps", "12") == 1
    assert (
        "error: --ckpt_path: the checkpoint was written by 2 processes, but 1 are running: set trainer.devices"
        in capsys.readouterr().err
    )

    shard_of(folder / "last.ckpt", 1).unlink()
    again = ("--ckpt_path", str(folder / "last.ckpt"))
    broken = python("-m", "rtrl_moe_pl", "fit", "--config", "config.yaml", *two, *again, folder=here)
    assert broken.returncode != 0
    assert "last.ckpt is incomplete: its shard last-step10-batch10.ckpt.rank1 does not exist" in broken.stderr


def test_a_linked_option_that_is_overruled_is_said(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fit", "--trainer.max_steps", "1", "--model.cell.input_size", "7") == 0
    assert "model.cell.input_size: 7 is not used: the data has 3" in capsys.readouterr().out
    assert run("fit", "--trainer.max_steps", "1", "--trainer.callbacks", "ModelSummary") == 0
    assert "is not used" not in capsys.readouterr().out


def test_an_error_begins_a_line_of_its_own(here: Path) -> None:
    bad = ["--model.optimizer.lr", "1e30", "--model.gradient_clip", "null", "--trainer.enable_progress_bar", "true"]
    done = python("-m", "rtrl_moe_pl", "fit", "--config", "config.yaml", *bad, folder=here, stderr=subprocess.STDOUT)
    assert done.returncode == 1
    assert "Epoch 0" in done.stdout
    assert "\nerror: training stopped at step" in done.stdout


class Faulty(GRU):
    """A cell of a user's own."""

    def __init__(self, input_size: int, kind: str) -> None:
        super().__init__(input_size, 4)
        self.kind = kind

    def forward(self, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        if self.kind == "raises":
            raise ValueError("my own trouble")
        return super().forward(x, s) / 0


@pytest.mark.parametrize(
    ("command", "kind", "said"),
    [
        ("fit", "raises", f"error: my own trouble (in forward, {__file__}, line "),
        ("forecast", "raises", "error: no algorithm runs on Faulty: my own trouble"),
        ("audit", "infinite", "error: audit: the state of Faulty becomes NaN or infinite within 200 steps: "),
    ],
)
def test_a_fault_of_an_own_cell_is_laid_to_it(
    here: Path, capsys: pytest.CaptureFixture[str], command: str, kind: str, said: str
) -> None:
    options = ["--model.cell", "tests.test_cli.Faulty", "--model.cell.kind", kind]
    assert main([command, "--config", "config.yaml", *options]) == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert line.startswith(said)


@pytest.mark.slow
def test_a_notebook_decides_nothing_about_pictures(here: Path) -> None:
    done = python("-m", "rtrl_moe_pl", "audit", "--config", "config.yaml", folder=here, MPLBACKEND="module://none")
    assert done.returncode == 0, done.stderr[-2000:]
