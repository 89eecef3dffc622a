"""Numbers that are none or out of range, and optimizers and schedules that cannot be used."""

from pathlib import Path

import pytest

from tests.bad_input.case import Case, run, table

CELL, DATA = "--model.cell", "--data"
SCHEDULE = "--model.lr_scheduler"
CYCLE = [f"{SCHEDULE}=OneCycleLR", f"{SCHEDULE}.total_steps=11"]
BIG = "1" + "0" * 400
HUGE = 10**12
CASES = [
    Case("empty value", [f"{CELL}.hidden_size="], ["model.cell.hidden_size: needs int, got ''"]),
    Case("a list for a number", [f"{CELL}.hidden_size=[5]"], ["model.cell.hidden_size: needs int, got [5]"]),
    Case("a truth for a number", [f"{CELL}.hidden_size=true"], ["model.cell.hidden_size: needs int, got True"]),
    Case("null for a number", [f"{CELL}.hidden_size=null"], ["model.cell.hidden_size: needs int, got None"]),
    Case("nan in words", ["--model.optimizer.lr=nan"], ["model.optimizer.lr: needs a finite number, got nan"]),
    Case(
        "inf in words", ["--model.gradient_clip=inf"], ["model.gradient_clip: needs a finite number or null, got inf"]
    ),
    Case("type of P", ["--model.gradient.influence_dtype=half"], ["needs one of 'bfloat16' or null, got half"]),
    Case("nan for a number", ["--trainer.max_steps=.nan"], ["trainer.max_steps: needs int, got nan"]),
    Case(
        "too large",
        [f"{CELL}.hidden_size={BIG}"],
        ["model.cell.hidden_size must be below 2^63, got 100000.. (401 digits)"],
    ),
    Case(
        "too many lanes",
        [f"{DATA}.batch_size={10**18}"],
        ["TB for the influence matrix", "are free: lower batch_size to "],
    ),
    Case(
        "too long",
        [f"{DATA}.validation_scales=[{10**30}]"],
        ["data.validation_scales must be below 2^63, got 100000.. (31 digits)"],
    ),
    Case(
        "too rare updates",
        [f"--model.update_every={BIG}"],
        ["model.update_every must be below 2^63, got 100000.. (401"],
    ),
    Case(
        "too large seed",
        [f"--seed_everything={BIG}"],
        ["seed_everything must be at least 0 and below 2^32, got 100000.. (401"],
    ),
    Case(
        "too many threads", ["--threads=1000000000"], ["threads must be at least 1 and at most 1024", "got 1000000000"]
    ),
    Case(
        "nan clip",
        ["--model.gradient_clip=.nan"],
        ["model.gradient_clip must be positive and finite, or null for none, got nan"],
    ),
    Case(
        "nan lr", ["--model.optimizer.lr=.nan"], ["model.optimizer.lr must be a finite number of at least 0, got nan"]
    ),
    Case("infinite lr", ["--model.optimizer.lr=.inf"], ["model.optimizer.lr must be finite, got inf"]),
    Case(
        "nan decay",
        ["--model.optimizer=SGD", "--model.optimizer.weight_decay=.nan"],
        ["model.optimizer.weight_decay must be finite, got nan"],
    ),
    Case(
        "nan lr of the embedding",
        ["--model.embedding_optimizer=SGD", "--model.embedding_optimizer.lr=.nan"],
        ["model.embedding_optimizer.lr must be finite, got nan"],
        config="table",
    ),
    Case(
        "negative decay",
        ["--model.optimizer.weight_decay=-1"],
        ["model.optimizer.weight_decay must be a finite number of at least 0"],
    ),
    Case(
        "betas", ["--model.optimizer.betas=[0.9, 2]"], ["model.optimizer.betas must be at least 0 and below 1, got 2.0"]
    ),
    Case(
        "etas",
        ["--model.optimizer=Rprop", "--model.optimizer.etas=[1.5, 0.9]"],
        ["model.optimizer.etas must be one in (0, 1) and one above 1, got 1.5, 0.9"],
    ),
    Case("negative seed", [f"{DATA}.seed=-1"], ["data.seed must be at least 0, got -1"]),
    Case("seed of puzzles", [f"{DATA}.seed=-1"], ["data.seed must be at least 0, got -1"], config="reasoning"),
    # batches that do not fit
    Case(
        "long window",
        [f"{DATA}.steps_per_batch={HUGE}"],
        [f"data: a training batch of 4 x {HUGE} steps", "lower data.batch_size or data.steps_per_batch"],
    ),
    Case(
        "many lanes of no influence",
        ["--model.gradient=TBPTT", f"{DATA}.batch_size={HUGE}"],
        [f"data: a training batch of {HUGE} x 12 steps", " takes about ", " are free: lower data.batch_size or "],
    ),
    Case(
        "long sequences",
        [f"{DATA}.n_max={HUGE}"],
        [f"data: a validation batch of 16 x {2 * HUGE + 1} steps, of AnBn(n_min=2, n_max={HUGE}, "],
    ),
    Case(
        "whole sequences",
        ["--model.gradient=BPTT", f"{DATA}.layout=sequences", f"{DATA}.n_max={HUGE}", "--trainer.limit_val_batches=0"],
        [f"a training batch of 4 x {2 * HUGE + 1} steps, ", "lower data.batch_size or the length of the sequences"],
    ),
    Case(
        "long scales",
        [f"{DATA}.validation_scales=[{HUGE}]"],
        [f"data: a test {HUGE}x batch of 16 x ", "lower data.validation_batch_size, validation_scales or the length"],
        "test",
    ),
    Case(
        "many puzzles",
        [f"{DATA}.batch_size={HUGE}"],
        [f"data: a training batch of {HUGE} puzzles takes about ", "lower data.batch_size"],
        config="reasoning",
    ),
    Case("no scales", [f"{DATA}.validation_scales=[]"], ["validation_scales needs at least one factor, got none"]),
    # optimizers and schedules
    Case(
        "LBFGS",
        ["--model.optimizer=LBFGS"],
        ["model.optimizer cannot be LBFGS: it computes the loss again within a step; use Adam"],
    ),
    Case(
        "SparseAdam",
        ["--model.optimizer=SparseAdam"],
        ["model.optimizer cannot be SparseAdam: it takes sparse gradients alone"],
    ),
    Case("Muon", ["--model.optimizer=Muon"], ["model.optimizer: Muon only supports 2D parameters"]),
    Case(
        "CombinedOptimizer",
        ["--model.optimizer=CombinedOptimizer"],
        ["model.optimizer: optimizers: CombinedOptimizer is made of optimizers"],
    ),
    Case(
        "optimizers offered",
        ["--model.optimizer=Adm"],
        ["give AdamATan2, SignSGD, ASGD, ", "NAdam, RAdam, RMSprop, Rprop, SGD, or the full path"],
    ),
    Case(
        "schedules offered",
        [f"{SCHEDULE}=Warm"],
        ["give Warmup, ConstantLR, ", "SWALR, StepLR, or the full path of another"],
    ),
    Case("no schedule", [f"{SCHEDULE}=LRScheduler"], ["model.lr_scheduler: NotImplementedError"]),
    Case(
        "step of 0",
        [f"{SCHEDULE}=StepLR", f"{SCHEDULE}.step_size=0"],
        ["model.lr_scheduler.step_size must be at least 1, got 0"],
    ),
    Case(
        "cosine of 0",
        [f"{SCHEDULE}=CosineAnnealingLR", f"{SCHEDULE}.T_max=0"],
        ["model.lr_scheduler.T_max must be at least 1, got 0"],
    ),
    Case(
        "cycle of nan",
        [*CYCLE, f"{SCHEDULE}.max_lr=.nan"],
        ["model.lr_scheduler: max_lr must be a finite number of at least 0, got nan"],
    ),
    Case(
        "cycle below 0",
        [*CYCLE, f"{SCHEDULE}.max_lr=-1"],
        ["model.lr_scheduler: max_lr must be a finite number of at least 0, got -1"],
    ),
    Case(
        "nan factor",
        [f"{SCHEDULE}=ExponentialLR", f"{SCHEDULE}.gamma=.nan"],
        ["model.lr_scheduler.gamma must be finite, got nan"],
    ),
    Case(
        "negative warm-up",
        [f"{SCHEDULE}=Warmup", f"{SCHEDULE}.warmup_steps=-1"],
        ["model.lr_scheduler.warmup_steps must be at least 0, got -1"],
    ),
]


@table(CASES)
def test_refused(here: Path, capsys: pytest.CaptureFixture[str], case: Case) -> None:
    run(case, here, capsys)
