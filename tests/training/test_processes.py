"""Starting several processes, losing one of them, and resuming on another number of them."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities import rank_zero_only

from rtrl_moe_pl.cli import main
from rtrl_moe_pl.cli.processes import LAST, count_processes, without_requeueing
from rtrl_moe_pl.training.checkpoints import PER_RANK, shard_of
from rtrl_moe_pl.training.strategy import BroadcastStrategy
from tests.test_cli import python

ROOT = Path(__file__).parents[2]
CONFIG = """
model:
  class_path: SequenceModule
  init_args:
    cell: {class_path: GRU, init_args: {hidden_size: 5}}
    gradient: {class_path: TBPTT, init_args: {window: 4}}
data:
  class_path: AnBnDataModule
  init_args: {n_max: 4, batch_size: 4, steps_per_batch: 8, batches_per_epoch: 3, validation_size: 6}
trainer:
  accelerator: cpu
  max_steps: 3
  enable_progress_bar: false
  enable_model_summary: false
"""
TWO = ("--trainer.devices", "2", "--data.batch_size", "2")
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m")
OTHERS = [name for name in StrategyRegistry.available_strategies() if name != "broadcast"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "config.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fit(*options: str) -> int:
    return main(["fit", "--config", "config.yaml", *options])


def start(*options: str, launcher: tuple[str, ...] = (), command: str = "fit") -> subprocess.CompletedProcess[str]:
    """A subcommand as a command, in the working directory."""
    return python("-m", *launcher, "rtrl_moe_pl", command, "--config", "config.yaml", *options, folder=Path.cwd())


def with_faults(*faults: str) -> list[str]:
    """Options for faults of the form "what rank", or "what rank batch"."""
    options = []
    for fault in faults:
        what, rank, *batch = fault.split()
        options += ["--trainer.callbacks+", "tests.training.faults.Fault"]
        options += ["--trainer.callbacks.rank", rank, "--trainer.callbacks.what", what]
        options += [argument for number in batch for argument in ("--trainer.callbacks.batch", number)]
    return options


def weights(folder: str) -> tuple[int, dict[str, torch.Tensor]]:
    newest = max(Path(folder).rglob("last.ckpt"), key=lambda path: path.stat().st_mtime)
    checkpoint = torch.load(newest, weights_only=True)
    return checkpoint["global_step"], checkpoint["state_dict"]


# ---- what is refused before a process is started


@pytest.mark.parametrize(
    ("devices", "given", "rank"),
    [
        (1, "RANK=1 and LOCAL_RANK=1", 1),
        (1, "LOCAL_RANK=1", 1),
        (1, "RANK=0 and LOCAL_RANK=0", 0),  # beside a WORLD_SIZE of 2
        (2, "LOCAL_RANK=0", 0),
    ],
)
@pytest.mark.parametrize("command", ["fit", "forecast"])
def test_a_rank_left_in_the_environment_is_refused(
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    devices: int,
    given: str,
    rank: int,
) -> None:
    """Of one process, nobody would write; of several, the first would wait for the others without end."""
    for setting in given.split(" and "):
        monkeypatch.setenv(*setting.split("="))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(rank_zero_only, "rank", rank)  # as it is read when Lightning is imported
    assert main([command, "--config", "config.yaml", f"--trainer.devices={devices}"]) == 1
    assert f": the environment has {given}, as of one process of several, but " in capsys.readouterr().err
    assert not (here / "lightning_logs").exists()


@pytest.mark.parametrize("name", [*OTHERS, "dp", "no_such_strategy"])
def test_other_strategies_are_refused(here: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert fit("--trainer.devices", "2", "--trainer.strategy", name) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: trainer.strategy={name} is not supported with 2 processes")
    assert "use broadcast" in captured.err.splitlines()[-1]
    assert not (here / "lightning_logs").exists()


def test_processes_that_would_train_alone_are_refused(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "GROUP_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert fit() == 1
    assert "trainer.devices times trainer.num_nodes is 1, but 2 processes were started" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
def test_the_strategy_ddp_of_one_process_changes_nothing(here: Path) -> None:
    done = start("--trainer.strategy", "ddp", "--trainer.default_root_dir", "ddp")
    assert done.returncode == 0, done.stderr[-3000:]
    assert fit("--trainer.default_root_dir", "one") == 0
    (steps, expected), (found_steps, found) = weights("one"), weights("ddp")
    assert steps == found_steps == 3
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


# ---- a user's own data


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
def test_rows_of_own_data_are_shared_out(here: Path) -> None:
    """Each to one process: as Lightning does it, which leaves streams alone."""
    model = CONFIG[: CONFIG.index("data:")]
    (here / "config.yaml").write_text(model + "data: tests.training.own_rows.Rows\ntrainer: {accelerator: cpu}\n")
    options = ("--trainer.devices=2", "--trainer.callbacks+=tests.training.own_rows.Seen")
    done = start(*options, "--trainer.max_epochs=1")
    assert done.returncode == 0, done.stderr[-3000:]
    seen = [set(Path(f"seen_{rank}.txt").read_text().split()) for rank in (0, 1)]
    assert [len(rows) for rows in seen] == [12, 12]
    assert not seen[0] & seen[1]


# ---- torchrun


def test_what_torchrun_starts_again_does_not_begin_from_scratch(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert fit() == 1
    assert "(TORCHELASTIC_RESTART_COUNT=1), and without --ckpt_path it would train from" in capsys.readouterr().err
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert fit() == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert fit("--ckpt_path=last", "--trainer.max_steps=5") == 0
    assert weights(".")[0] == 5


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
def test_torchrun_equals_one_process(here: Path) -> None:
    done = start(*TWO, "--trainer.default_root_dir", "two", launcher=TORCHRUN)
    assert done.returncode == 0, done.stderr[-3000:]
    assert fit("--trainer.default_root_dir", "one") == 0
    (steps, expected), (found_steps, found) = weights("one"), weights("two")
    assert steps == found_steps == 3
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_torchrun_within_a_job_of_slurm_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's requeueing is switched off for what srun starts; otherwise the environment is left to Lightning."""
    options: Any = SimpleNamespace(plugins=None, strategy="auto")
    assert without_requeueing(options) == []
    for name, value in {"NTASKS": "2", "NTASKS_PER_NODE": "2", "JOB_NAME": "train"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    [found] = without_requeueing(options)
    assert not found.auto_requeue
    own = SLURMEnvironment()
    assert without_requeueing(SimpleNamespace(plugins=own, strategy="auto")) == [own]
    strategy = BroadcastStrategy(cluster_environment=own)
    assert without_requeueing(SimpleNamespace(plugins=[], strategy=strategy)) == []
    for name in ("RANK", "GROUP_RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert without_requeueing(options) == []


@pytest.mark.parametrize(
    ("devices", "accelerator", "count"),
    [
        ("auto", "auto", 4),
        ("auto", "cpu", 1),
        ("-1", "gpu", 4),
        ("1", "cuda", 1),
        ("0,2", "auto", 2),
        ([0, 1, 3], "cuda", 3),
        ("3,", "cuda", 1),
        (2, "cpu", 2),
    ],
)
def test_processes_are_counted_before_they_are_started(
    monkeypatch: pytest.MonkeyPatch, devices: Any, accelerator: str, count: int
) -> None:
    """On two machines of four GPUs each."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert count_processes(SimpleNamespace(devices=devices, accelerator=accelerator, num_nodes=2)) == 2 * count


def srun(rank: int, port: int, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """A task of two on one node, in the environment that srun gives it; LOCAL_RANK is not in it."""
    fixed = {"NTASKS": "2", "NTASKS_PER_NODE": "2", "NNODES": "1", "NODEID": "0", "NODELIST": "127.0.0.1"}
    fixed |= {"JOB_ID": "4321", "JOB_NAME": "train", "PROCID": str(rank), "LOCALID": str(rank), "CPU_BIND": "none"}
    environment: Any = {f"SLURM_{name}": value for name, value in fixed.items()}
    return python(*arguments, folder=Path.cwd(), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **environment)


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
def test_slurm_starts_the_processes_and_a_run_goes_on_in_the_same_job(here: Path) -> None:
    for run, options in enumerate(([], ["--ckpt_path", "last", "--trainer.max_steps", "5"])):
        arguments = ["-m", "rtrl_moe_pl", "fit", "--config", "config.yaml", *TWO, *options]
        port = find_free_network_port()
        with ThreadPoolExecutor(2) as pool:
            tasks = [pool.submit(srun, rank, port, arguments) for rank in (0, 1)]
        for task in tasks:
            assert task.result().returncode == 0, task.result().stderr[-3000:]
            assert "requeueing" not in task.result().stderr  # Lightning's saves in the middle of an update
        assert weights(".")[0] == (5 if run else 3)
    assert sorted(path.name for path in Path("lightning_logs").iterdir()) == ["version_0", "version_1"]


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
def test_processes_that_find_different_checkpoints_are_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the second is told of one that the first, which looks for it, finds to be old."""
    last = ("--ckpt_path", "last", "--trainer.max_steps", "9")
    assert start(*TWO).returncode == 0
    monkeypatch.setenv(LAST, str(max(here.rglob("last-step3-batch3.ckpt"))))
    assert start(*TWO, *last, "--trainer.max_steps", "6").returncode == 0
    done = start(*TWO, *last, launcher=TORCHRUN)
    assert done.returncode == 1
    assert "--ckpt_path: one process found a checkpoint of batch 3, another of 6: name the file" in done.stderr


# ---- a lost process


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize(
    ("faults", "status", "lines"),
    [
        (["raise 1"], 1, ["error (rank 1): the data of rank 1 cannot be read", "error: another process of this run"]),
        (["raise 1 0"], 1, ["error (rank 1): the data of rank 1 cannot be read", "error: another process of this run"]),
        (["raise 0"], 1, ["error: the data of rank 0 cannot be read"]),  # the other's comes when this one is gone
        (["kill 1"], 1, ["error: another process of this run has ended"]),
        (["kill 0", "stall 1"], -9, ["error: the process that started this one has ended"]),
    ],
)
def test_a_lost_process_ends_the_run(here: Path, faults: list[str], status: int, lines: list[str]) -> None:
    """With the error of the one that was lost, and one line of the other's; none is left behind to wait for ever.

    `subprocess.run` returns when the last process has closed its output.
    """
    done = start(*TWO, *with_faults(*faults), "--trainer.max_steps", "-1", "--trainer.max_epochs", "1000")
    assert done.returncode == status, done.stderr[-3000:]
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(errors) <= 2
    for line, expected in zip(errors, lines, strict=False):
        assert line.startswith(expected)
    assert len(errors) >= len(lines)
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
def test_a_process_that_is_lost_while_it_starts_the_others_leaves_none_behind(here: Path) -> None:
    command = [sys.executable, "-m", "rtrl_moe_pl", "fit", "--config", "config.yaml", *TWO]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as first:
        assert first.stdout is not None
        assert any("MEMBER: 1/2" in line for line in first.stdout)  # the second is importing torch
        first.kill()
        first.stdout.read()  # until the second has closed it


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize(
    ("rank", "command", "options"),
    [
        (1, "fit", ()),  # in the check of validation before it
        (1, "validate", ()),
        (1, "fit", ("--trainer.enable_checkpointing", "false", "--trainer.num_sanity_val_steps", "0")),
        (0, "validate", ()),
    ],
)
def test_sigterm_to_one_process_ends_the_run_where_nothing_is_saved(
    here: Path, rank: int, command: str, options: tuple[str, ...]
) -> None:
    done = start(*TWO, *options, *with_faults(f"terminate {rank} 0"), command=command)
    assert done.returncode == (143 if rank == 0 else 1), done.stderr[-3000:]
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert "another process of this run has ended" in errors[0]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
def test_a_checkpoint_that_one_rank_did_not_finish_is_passed_over(here: Path) -> None:
    """Batches 4 and 5 are of the same optimizer step: a file of one and a shard of the other would be of none."""
    every = ("--model.update_every", "3", "--data.batches_per_epoch", "6", "--trainer.max_steps", "2")
    saving = ("--last_checkpoint.minutes", "1e-5", "--last_checkpoint.keep", "1")
    assert fit(*every, "--trainer.default_root_dir", "unbroken") == 0
    halves = (*every, *TWO, "--trainer.default_root_dir", "halves")
    assert start(*halves, *saving, *with_faults("kill_saving 1 4")).returncode != 0
    done = start(*halves, "--ckpt_path", "last")
    assert done.returncode == 0, done.stderr[-3000:]
    passed = "last-step1-batch5.ckpt is incomplete: its shard last-step1-batch5.ckpt.rank1 does not exist: passed over"
    assert passed in done.stderr
    (steps, expected), (found_steps, found) = weights("unbroken"), weights("halves")
    assert steps == found_steps == 2
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
def test_no_rank_saves_when_one_has_failed(here: Path) -> None:
    """The failure is in the second batch of three, before it reaches the others in the update."""
    every = ("--model.update_every", "3", "--data.batches_per_epoch", "6", "--last_checkpoint.minutes", "1e-5")
    done = start(*TWO, *every, *with_faults("nan 1 1"))
    assert done.returncode == 1, done.stderr[-3000:]
    assert "error (rank 1): training stopped at step 0: inputs holds" in done.stderr
    assert "error: training stopped at step 0: a tensor of another rank is not finite" in done.stderr
    names = sorted(path.name for path in here.glob("lightning_logs/version_0/checkpoints/*"))
    assert names == ["last-step0-batch1.ckpt", "last-step0-batch1.ckpt.rank1", "last.ckpt"]


# ---- another number of processes


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
def test_lanes_that_go_on_need_as_many_processes(here: Path) -> None:
    """From one to two; `tests.test_cli` has two to one."""
    assert fit() == 0
    done = start(*TWO, "--ckpt_path", "last", "--trainer.max_steps", "6")
    assert done.returncode == 1
    assert (
        "error: --ckpt_path: the checkpoint was written by 1 processes, but 2 are running: set trainer.devices"
        in done.stderr
    )
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
def test_whole_sequences_go_on_with_any_number_of_processes(here: Path) -> None:
    """One, two, one: as if it had been one all the time."""
    whole = ("--data.layout", "sequences", "--trainer.default_root_dir")
    again = ("--ckpt_path", "last", "--trainer.max_steps")
    assert fit(*whole, "unbroken", "--trainer.max_steps", "9") == 0
    assert fit(*whole, "changing") == 0
    done = start(*whole, "changing", *TWO, *again, "6")
    assert done.returncode == 0, done.stderr[-3000:]
    assert fit(*whole, "changing", *again, "9") == 0
    (steps, expected), (found_steps, found) = weights("unbroken"), weights("changing")
    assert steps == found_steps == 9
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_gradients_summed_so_far_need_as_many_processes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whole sequences, but in the middle of an update: each process has the sum of its own lanes."""
    every = ("--data.layout", "sequences", "--model.update_every", "2", "--trainer.max_steps", "-1")
    assert fit(*every, "--trainer.max_epochs", "1") == 0  # three batches: one update and a half
    path = max(here.rglob("last.ckpt"))
    checkpoint = torch.load(path, weights_only=True)
    checkpoint[PER_RANK]["world_size"] = 2
    torch.save(checkpoint, path)
    torch.save({PER_RANK: checkpoint[PER_RANK]}, shard_of(path, 1))
    assert fit(*every, "--trainer.max_epochs", "2", "--ckpt_path", "last") == 1
    assert "the checkpoint was written by 2 processes, but 1 are running" in capsys.readouterr().err


def test_processes_draw_their_own_numbers_and_go_on_with_them(here: Path) -> None:
    """A cell with dropout: lanes of two ranks have masks of their own, and a resumed run those of the unbroken one."""
    options = (*TWO, "--model.cell", "tests.training.faults.DropoutGRU", "--model.cell.hidden_size", "5")
    options += ("--trainer.callbacks+", "tests.training.faults.Draws")
    path = ("--trainer.default_root_dir",)
    unbroken, broken = (*options, *path, "unbroken"), (*options, *path, "broken")
    assert start(*unbroken).returncode == 0
    drawn = [Path(f"draws_{rank}.txt").read_text().split() for rank in (0, 1)]
    assert len(set(drawn[0] + drawn[1])) == 2 * 3
    assert start(*broken, "--trainer.max_steps", "2").returncode == 0
    assert start(*broken, "--ckpt_path", "last").returncode == 0
    steps, expected = weights("unbroken")
    again, found = weights("broken")
    assert steps == again == 3
    assert all(torch.equal(found[name], value) for name, value in expected.items())
