"""A run that is killed at any instant and resumed with --ckpt_path last ends with the same bits as one that was not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRAINER = """
last_checkpoint: {minutes: 0.001}
trainer:
  max_epochs: 4
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  log_every_n_steps: 5
"""
SEQUENCE = f"""{TRAINER}
  val_check_interval: 7
model:
  class_path: SequenceModule
  init_args:
    cell: {{class_path: GRU, init_args: {{hidden_size: 8}}}}
    gradient: {{class_path: RTRL, init_args: {{window: 4}}}}
    lr_scheduler: {{class_path: Warmup, init_args: {{warmup_steps: 10, total_steps: 100, final_fraction: 0.1}}}}
    update_every: 2
data:
  class_path: HaystackDataModule
  init_args:
    length: 17
    curriculum: [9, 13]
    min_gap: 5
    promote_at: 0.01
    batch_size: 4
    steps_per_batch: 16
    batches_per_epoch: 20
    validation_size: 12
checkpoint: {{monitor: val/progress}}
"""
MIXTURE = f"""{TRAINER}
model:
  class_path: SequenceModule
  init_args:
    cell: {{class_path: RecurrentMoE, init_args: {{slot_size: 4, num_slots: 3, num_experts: 5, balance_rate: 0.03}}}}
    gradient: {{class_path: LazyExpertRTRL, init_args: {{window: 4, ring: 8}}}}
data:
  class_path: DelayedRecallDataModule
  init_args: {{batch_size: 4, steps_per_batch: 8, batches_per_epoch: 20, validation_size: 5}}
"""
REASONING = f"""{TRAINER}
  callbacks: [{{class_path: EMA}}]
model:
  class_path: ReasoningModule
  init_args:
    decoder: {{class_path: TRM, init_args: {{width: 16, heads: 2, layers: 1, h_cycles: 1, l_cycles: 2, prefix: 2}}}}
    encoder: {{class_path: LPNEncoder, init_args: {{layers: 1, heads: 2, latent_size: 4, variational: true}}}}
    halting: {{class_path: Halting, init_args: {{max_steps: 3, exploration: 0.3, q_continue: true}}}}
    mode: cached
data:
  class_path: PuzzleDemoDataModule
  init_args: {{size: 2, batch_size: 4, batches_per_epoch: 20, validation_size: 7}}
checkpoint: {{monitor: val/held_out/exact_accuracy}}
"""
# During a step, while a checkpoint is written, between epochs, and wherever the clock finds the run.
POINTS = {
    "sequence": "updated:9 writing:3 flushing:5 renaming:2 linking:3 rotating:1 epoch:3 time:0.35 time:0.75",
    "mixture": "updated:23 writing:5 renaming:4 linking:2 validating:3 epoch:2 time:0.5 time:0.85",
    "reasoning": "updated:31 writing:4 flushing:3 rotating:2 validating:2 epoch:4 time:0.45 time:0.7",
}
CONTROL = "spoiled:updated:14"
CONFIGS = {"sequence": SEQUENCE, "mixture": MIXTURE, "reasoning": REASONING}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path, name: str) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(CONFIGS[name])
    points = [*POINTS[name].split(), CONTROL]
    command = [sys.executable, "-m", "tests.kills.killer", str(config), str(tmp_path), *points]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=550)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr[-3000:]
    assert [result["point"] for result in results] == points
    assert all(result["killed"] for result in results), results
    *kept, spoiled = results
    assert all(result["differing"] == [] for result in kept), results
    assert spoiled["differing"], "the carry was lost, and nothing differs"
    assert sum(result["resumed"] for result in results) >= len(results) - 2, results  # else nothing was there yet
