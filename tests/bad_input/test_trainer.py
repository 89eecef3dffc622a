"""Options of Trainer, callbacks, loggers and checkpoints, and of the commands beside fit."""

from pathlib import Path

import pytest

from tests.bad_input.case import Case, run, table

DATA, GRADIENT = "--data", "--model.gradient"
STRATEGY = "trainer.strategy must be one of 'auto', 'broadcast', 'single_device', 'ddp'"
TIME = "trainer.max_time must be DD:HH:MM:SS, with minutes and seconds below 60, or keys such as {hours: 3}"
DEVICES = "trainer.devices: on CPUs needs a number above 0, or auto"
CASES = [
    # the trainer
    Case(
        "steps of trainer",
        ["--trainer.max_steps=-5"],
        ["trainer.max_steps: `max_steps` must be a non-negative integer or -1"],
    ),
    Case(
        "epochs", ["--trainer.max_epochs=-3"], ["trainer.max_epochs: `max_epochs` must be a non-negative integer or -1"]
    ),
    Case("logs", ["--trainer.log_every_n_steps=-1"], ["trainer.log_every_n_steps must be at least 0, got -1"]),
    Case("sanity", ["--trainer.num_sanity_val_steps=-5"], ["trainer.num_sanity_val_steps must be at least -1, got -5"]),
    Case(
        "interval 0",
        ["--trainer.val_check_interval=0"],
        ["trainer.val_check_interval must be above 0, got 0: to switch validation off"],
    ),
    Case(
        "epochs 0", ["--trainer.check_val_every_n_epoch=0"], ["trainer.check_val_every_n_epoch must be above 0, got 0"]
    ),
    Case(
        "interval 2.5",
        ["--trainer.val_check_interval=2.5"],
        ["trainer.val_check_interval must be a whole number of batches, at least 0, or a part", "got 2.5"],
    ),
    Case(
        "interval 100",
        ["--trainer.val_check_interval=100"],
        ["`val_check_interval` (100) must be less than or equal to"],
    ),
    Case(
        "limit",
        ["--trainer.limit_train_batches=-1"],
        ["trainer.limit_train_batches must be a whole number of batches, at least 0, or a part", "got -1"],
    ),
    Case(
        "devices 0",
        ["--trainer.devices=0"],
        [f"{DEVICES}, got 0"],
    ),
    Case("a list of CPUs", ["--trainer.devices=0,1"], [f"{DEVICES}, got 0,1"]),
    Case("devices below 0", ["--trainer.devices=-3"], [f"{DEVICES}, got -3"]),
    Case("none of devices", ["--trainer.devices=[]"], [f"{DEVICES}, got []"]),
    Case("barebones", ["--trainer.barebones=true"], ["trainer.barebones=true is not supported: it takes no logger, "]),
    Case("devices", ["--trainer.devices=9999"], ["trainer.devices=9999 is more than 8 processes for each of "]),
    Case("abbreviation", ["--trainer.max_step=5"], ["unknown key trainer.max_step: did you mean max_steps or "]),
    Case("no devices", ["--trainer.devices="], [f"{DEVICES}, got ''"]),
    Case("nodes", ["--trainer.num_nodes=0"], ["trainer.num_nodes: `num_nodes` must be a positive integer, but got 0"]),
    Case(
        "accelerator",
        ["--trainer.accelerator=abacus"],
        ["trainer.accelerator (of this machine) must be one of 'auto', 'cpu'", "got 'abacus'"],
    ),
    Case(
        "accelerator that is not there",
        ["--trainer.accelerator=tpu"],
        ["trainer.accelerator (of this machine) must be one of 'auto', 'cpu'", "got 'tpu'"],
    ),
    Case("strategy", ["--trainer.strategy=dppp"], [f"{STRATEGY}, got 'dppp'"]),
    Case("strategy of shards", ["--trainer.strategy=fsdp"], [f"{STRATEGY}, got 'fsdp'"]),
    Case("strategy of a notebook", ["--trainer.strategy=ddp_spawn"], [f"{STRATEGY}, got 'ddp_spawn'"]),
    Case(
        "precision",
        ["--trainer.precision=8"],
        ["trainer.precision: needs one of 32-true, 64-true, bf16-mixed, got 8"],
    ),
    Case(
        "precision of 8 bits",
        ["--trainer.precision=transformer-engine"],
        ["trainer.precision must be one of '32-true', '64-true', 'bf16-mixed', got 'transformer-engine'"],
    ),
    Case("time", ["--trainer.max_time=soon"], [f"{TIME}, got soon"]),
    Case("time in two parts", ["--trainer.max_time=00:99"], [f"{TIME}, got 00:99"]),
    Case("99 minutes", ["--trainer.max_time=00:00:99:99"], [f"{TIME}, got 00:00:99:99"]),
    Case("time of no unit", ["--trainer.max_time={hour: 3}"], [f"{TIME}, got {{'hour': 3}}"]),
    Case(
        "no time",
        ["--trainer.max_time=00:00:00:00"],
        ["trainer.max_time must be above 0, or null for no limit, got 00"],
    ),
    Case(
        "no time at all", ["--trainer.max_time={}"], ["trainer.max_time must be above 0, or null for no limit, got {}"]
    ),
    Case(
        "least steps", ["--trainer.min_steps=11"], ["trainer.min_steps must be at most trainer.max_steps (10), got 11"]
    ),
    Case(
        "least epochs",
        ["--trainer.min_epochs=3", "--trainer.max_epochs=2"],
        ["trainer.min_epochs must be at most trainer.max_epochs (2), got 3"],
    ),
    Case(
        "never an update",
        ["--trainer.max_steps=-1", "--trainer.max_epochs=2", "--model.update_every=11"],
        ["model.update_every=11 is more than the 10 batches of trainer.max_epochs=2: no update would come"],
    ),
    Case(
        "never an update of a part",
        ["--trainer.max_epochs=2", "--trainer.limit_train_batches=0.5", "--model.update_every=5"],
        ["model.update_every=5 is more than the 4 batches of trainer.max_epochs=2"],
    ),
    Case(
        "profiler",
        ["--trainer.profiler=xx"],
        ["trainer.profiler: ", "can only be one of ['simple', 'advanced', 'pytorch', 'xla']"],
    ),
    # callbacks, loggers and checkpoints
    Case(
        "a number for a callback",
        ["--trainer.callbacks=[3]"],
        ["trainer.callbacks: needs the name of a class, ", "got [3]"],
    ),
    Case(
        "a callback that is not added",
        ["--trainer.callbacks", "Freeze"],
        ["trainer.callbacks: part is missing: Freeze takes part, steps; --trainer.callbacks+=NAME adds one, "],
    ),
    Case(
        "an unknown one that is not added",
        ["--trainer.callbacks", "Freze"],
        ["trainer.callbacks: there is no class Freze for it: give Accuracy", "; --trainer.callbacks+=NAME adds one, "],
    ),
    Case(
        "tuner",
        ["--trainer.callbacks+=BatchSizeFinder"],
        ["trainer.callbacks: BatchSizeFinder does not work with hand-written"],
    ),
    Case(
        "cell without slots",
        ["--trainer.callbacks+=RoutingPicture"],
        ["RoutingPicture needs a cell that chooses slots, such as", "got GRU"],
    ),
    Case(
        "data without puzzles",
        ["--trainer.callbacks+=PuzzlePicture"],
        ["PuzzlePicture needs a PuzzleDataModule, got AnBnDataModule"],
    ),
    Case(
        "freeze of nothing",
        ["--trainer.callbacks+=Freeze", "--trainer.callbacks.part=x"],
        ["Freeze: no parameter's name begins with part='x'"],
    ),
    Case(
        "decay",
        ["--trainer.callbacks+=EMA", "--trainer.callbacks.decay=.nan"],
        ["trainer.callbacks.decay must be at least 0 and below 1, got nan"],
    ),
    Case(
        "logs beneath a file",
        ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=config.yaml/x"],
        ["trainer.logger.save_dir: cannot write to config.yaml/x: config.yaml is a file"],
    ),
    Case(
        "checkpoints beneath a file",
        ["--checkpoint.dirpath=config.yaml/x"],
        ["checkpoint.dirpath: cannot write to config.yaml/x: config.yaml is a file"],
    ),
    Case(
        "name of a checkpoint",
        ["--checkpoint.filename={x"],
        ["checkpoint.filename: '{x' is no name with {figure} or {figure:.2f} in it"],
    ),
    Case(
        "format of a figure",
        ["--checkpoint.filename={step:q}"],
        ["checkpoint.filename: '{step:q}' is no name", "Unknown format code 'q'"],
    ),
    Case(
        "best of none",
        ["--checkpoint.monitor=null", "--checkpoint.save_top_k=3"],
        ["checkpoint: ModelCheckpoint(save_top_k=3, monitor=None) is not"],
    ),
    # checkpoints to go on from
    Case(
        "a URL of nothing",
        ["--ckpt_path=file:///gone/a.ckpt"],
        ["--ckpt_path: Checkpoint file not found: file:///gone/a.ckpt"],
    ),
    Case("no name", ["--ckpt_path="], ["--ckpt_path: needs a file, or last for the newest one, got ''"]),
    Case("checkpoint of audit", ["--ckpt_path=last"], ["--ckpt_path last: no complete checkpoint below"], "audit"),
    Case("checkpoint of forecast", ["--ckpt_path=a.ckpt"], ["--ckpt_path: there is no file a.ckpt"], "forecast"),
    # other commands
    Case(
        "validation set", [f"{DATA}.validation_size=0"], ["data.validation_size must be at least 1, got 0"], "validate"
    ),
    Case("verbosity", ["--verbose=x"], ["verbose: needs bool, got x"], "test"),
    Case(
        "batches of prediction",
        [f"{DATA}.validation_batch_size=0"],
        ["data.validation_batch_size must be at least 1"],
        "predict",
    ),
    Case("steps of audit", ["--steps=many"], ["steps: needs int or null, got many"], "audit"),
    Case("no steps of audit", ["--steps=-5"], ["--steps must be at least 1, got -5"], "audit"),
    Case(
        "too few steps of audit",
        ["--steps=1"],
        ["--steps 1: nothing to compare, BPTT gives no parameter a gradient"],
        "audit",
    ),
    Case(
        "audit of an algorithm",
        [f"{GRADIENT}=BlockRTRL"],
        ["BlockRTRL needs a cell that chooses slots", "GRU is none"],
        "audit",
    ),
    Case("no steps of forecast", ["--steps=0"], ["--steps must be at least 1, got 0"], "forecast"),
]


@table(CASES)
def test_refused(here: Path, capsys: pytest.CaptureFixture[str], case: Case) -> None:
    run(case, here, capsys)
