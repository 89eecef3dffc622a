"""Two processes share the stream and the validation sets of one process with the double batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rtrl_moe_pl.cli import main

ROOT = Path(__file__).parents[2]
CURRICULUM = """
model:
  class_path: SequenceModule
  init_args:
    cell: {class_path: GRU, init_args: {hidden_size: 5}}
    gradient: {class_path: RTRL, init_args: {window: 4}}
data:
  class_path: HaystackDataModule
  init_args:
    length: 16
    curriculum: [8, 12]
    promote_at: 0.15
    min_gap: 5
    batch_size: 4
    steps_per_batch: 8
    batches_per_epoch: 4
    validation_size: 21
    validation_window: 5
checkpoint: {monitor: val/progress}
trainer:
  max_epochs: 4
  accelerator: cpu
  enable_progress_bar: false
  callbacks: [{class_path: AccuracyByDistance}]
"""
BALANCED = """
model:
  class_path: SequenceModule
  init_args:
    cell: {class_path: RecurrentMoE, init_args: {slot_size: 4, num_slots: 3, num_experts: 5, balance_rate: 0.03}}
    gradient: {class_path: LazyExpertRTRL, init_args: {window: 4}}
data:
  class_path: DelayedRecallDataModule
  init_args: {batch_size: 4, steps_per_batch: 8, batches_per_epoch: 6, validation_size: 5}
trainer: {max_epochs: 1, accelerator: cpu, enable_progress_bar: false}
"""
REASONING = """
seed_everything: 0
model:
  class_path: ReasoningModule
  init_args:
    decoder: {class_path: TRM, init_args: {width: 16, heads: 2, layers: 1, h_cycles: 1, l_cycles: 2, prefix: 2}}
    encoder: {class_path: LPNEncoder, init_args: {layers: 1, heads: 2, latent_size: 4, variational: true}}
    halting: {class_path: Halting, init_args: {max_steps: 3, exploration: 0.3, q_continue: true}}
    mode: cached
    optimizer: {class_path: SGD, init_args: {lr: 0.1}}
    update_every: 2
data:
  class_path: PuzzleDemoDataModule
  init_args: {size: 2, batch_size: 4, batches_per_epoch: 12, validation_size: 7}
checkpoint: {monitor: val/held_out/exact_accuracy}
trainer:
  max_epochs: 1
  accelerator: cpu
  enable_progress_bar: false
  log_every_n_steps: 1
  callbacks: [{class_path: EMA}, {class_path: PuzzlePicture}]
"""


def run(folder: Path, processes: int, batch_size: int, *checkpoint: str) -> list[dict[str, list[torch.Tensor]]]:
    folder.mkdir()
    script = Path(__file__).with_name("two_process_run.py")
    command = [sys.executable, str(script), str(folder), str(processes), str(batch_size), *checkpoint]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=True) for rank in range(processes)]


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
def test_two_processes_see_what_one_sees(tmp_path: Path):
    [alone] = run(tmp_path / "alone", 1, 4)
    ranks = run(tmp_path / "ranks", 2, 2)
    assert len(alone["train"]) == 8
    for whole, first, second in zip(alone["train"], ranks[0]["train"], ranks[1]["train"], strict=True):
        assert torch.equal(whole, torch.cat([first, second]))

    # Validation: 3 sets of 5 sequences, in batches of 4 on one process and of 2 + 2 on two.
    assert [len(batch) for batch in alone["validation"]] == [4, 1] * 3
    assert [len(batch) for batch in ranks[0]["validation"]] == [2, 1] * 3
    assert [len(batch) for batch in ranks[1]["validation"]] == [2, 1] * 3
    assert [float(weight) for weight in ranks[1]["weights"]] == [2, 0] * 3  # the sixth sequence does not exist
    for scale in range(3):
        full, last = alone["validation"][2 * scale : 2 * scale + 2]
        shares = [rank["validation"][2 * scale : 2 * scale + 2] for rank in ranks]
        assert torch.equal(full, torch.cat([shares[0][0], shares[1][0]]))
        assert torch.equal(last, shares[0][1])

    # Resumed in mid-epoch, from a checkpoint that rank 0 wrote alone.
    resumed = run(tmp_path / "resumed", 2, 2, str(tmp_path / "ranks" / "step=3.ckpt"))
    for unbroken, continued in zip(ranks, resumed, strict=True):
        assert len(continued["train"]) == 5
        for a, b in zip(unbroken["train"][3:], continued["train"], strict=True):
            assert torch.equal(a, b)


def fit_alone_and_together(folder: Path, config: str) -> list[Path]:
    """Train on one process and on two with half the batch each; the two folders of logs."""
    (folder / "config.yaml").write_text(config)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name, options in (("alone", ()), ("both", ("--trainer.devices", "2", "--data.batch_size", "2"))):
        command = [sys.executable, "-m", "rtrl_moe_pl", "fit", "--config", "config.yaml", *options]
        command += ["--trainer.default_root_dir", str(folder / name)]
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
    return [folder / name / "lightning_logs" / "version_0" for name in ("alone", "both")]


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
def test_two_processes_are_promoted_together(tmp_path: Path):
    """As one process with the double batch: the same lengths, weights and best checkpoint, evaluated in windows."""
    versions = fit_alone_and_together(tmp_path, CURRICULUM)
    assert all((version / "val_accuracy_by_distance.png").is_file() for version in versions)
    [best], [best_of_two] = [list((version / "checkpoints").glob("best-*.ckpt")) for version in versions]
    alone, both = [torch.load(version / "checkpoints" / "last.ckpt", weights_only=True) for version in versions]
    assert best.name == best_of_two.name
    assert alone["HaystackDataModule"]["curriculum"] == both["HaystackDataModule"]["curriculum"]
    assert alone["HaystackDataModule"]["curriculum"]["length"] == 16
    assert alone["global_step"] == both["global_step"]
    for name, value in alone["state_dict"].items():
        torch.testing.assert_close(both["state_dict"][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
def test_two_processes_balance_together(tmp_path: Path):
    """Experts and slots are balanced by what all lanes chose, not by a process's own: the same biases as alone."""
    versions = fit_alone_and_together(tmp_path, BALANCED)
    alone, both = [torch.load(version / "checkpoints" / "last.ckpt", weights_only=True) for version in versions]
    biases = [name for name in alone["state_dict"] if name.endswith("_bias") and name.startswith("cell.")]
    assert {"cell.read_bias", "cell.write_bias", "cell.expert_bias"} <= set(biases)
    assert all(alone["state_dict"][name].any() for name in biases)
    for name, value in alone["state_dict"].items():
        torch.testing.assert_close(both["state_dict"][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
def test_two_processes_reason_as_one_with_the_double_batch(tmp_path: Path):
    """Lanes that halt at different times on each, in a mode in which a rank may have none to encode."""
    versions = fit_alone_and_together(tmp_path, REASONING)
    alone, both = [torch.load(version / "checkpoints" / "last.ckpt", weights_only=True) for version in versions]
    assert alone["global_step"] == both["global_step"] == 6
    for part in ("state_dict", "current_model_state"):
        for name, value in alone[part].items():
            torch.testing.assert_close(both[part][name], value, rtol=1e-5, atol=1e-6)
    figures = [scalars(version) for version in versions]
    for tag in ("val/held_out/exact_accuracy", "val/train_rules/q_halt_loss", "train/grad_norm"):
        assert figures[1][tag] == pytest.approx(figures[0][tag], rel=1e-4), tag


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
def test_two_processes_answer_one_puzzle(tmp_path: Path):
    """One of them has nothing to answer."""
    (tmp_path / "config.yaml").write_text(REASONING)
    pair = {"input": [[0, 1], [2, 3]], "output": [[1, 2], [3, 4]]}
    (tmp_path / "puzzle.json").write_text(json.dumps({"train": [pair], "test": [pair]}))
    command = [sys.executable, "-m", "rtrl_moe_pl", "predict", "--config", "config.yaml", "--trainer.devices", "2"]
    command += ["--data.puzzle", "puzzle.json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    options = ["--config", str(tmp_path / "config.yaml"), "--trainer.default_root_dir", str(tmp_path)]
    assert main(["fit", *options, "--trainer.max_steps", "1", "--trainer.devices", "1"]) == 0
    command += ["--ckpt_path", "last"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = [json.loads(path.read_text()) for path in sorted(tmp_path.rglob("predictions_rank*.json"))]
    assert [len(answer) for answer in answers] == [1, 0]
    assert "correct" in answers[0][0]


def scalars(version: Path) -> dict[str, float]:
    """The last value of every figure."""
    events = EventAccumulator(str(version)).Reload()
    return {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
