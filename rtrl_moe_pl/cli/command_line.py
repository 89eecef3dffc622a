"""The command line: fit, validate, test, predict, audit and forecast, configured in YAML."""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

import rtrl_moe_pl.cells  # short class names in YAML are those of imported classes
import rtrl_moe_pl.data
import rtrl_moe_pl.gradients
import rtrl_moe_pl.reasoning  # noqa: F401
from rtrl_moe_pl.cli.checks import check_classes, check_options
from rtrl_moe_pl.cli.config_files import ConfigParser
from rtrl_moe_pl.cli.diagnosis import DiagnosisTrainer
from rtrl_moe_pl.cli.messages import Maker, of_trainer, one_line, place_of, shortened
from rtrl_moe_pl.cli.processes import LAST, require_no_restart, resolve_last, strategy_of, without_requeueing
from rtrl_moe_pl.cli.run_callbacks import callbacks_of
from rtrl_moe_pl.cli.streams import full_disk_in_one_line, printed, warnings_in_one_line, without_tips
from rtrl_moe_pl.cli.summary import SaveConfig
from rtrl_moe_pl.cli.tf32 import set_tf32, tf32_restored
from rtrl_moe_pl.modules import ManualModule, ReasoningModule
from rtrl_moe_pl.modules.base import refuse_half
from rtrl_moe_pl.modules.optimization import require_updates
from rtrl_moe_pl.modules.pretrained import load_pretrained
from rtrl_moe_pl.training.callbacks import BestCheckpoint
from rtrl_moe_pl.training.checkpoints import require_readable, require_writable
from rtrl_moe_pl.training.last_checkpoint import Interrupted, LastCheckpoint
from rtrl_moe_pl.training.run_folder import RunLogger

# Lightning's, about what is meant here: data made on the device, one folder per run, figures every few batches, saving
# after the step; callbacks that only training has. Of a figure that is not known when a checkpoint is due,
# `BestCheckpoint` warns at the end.
IGNORED_WARNINGS = (
    "does not have many workers",
    "The dirpath has changed from",
    "is smaller than the logging interval",
    "LeafSpec",
    "LightningCLI's args parameter",
    "Using ModelCheckpoint with manual optimization",
    "could not find the monitored key",
    "Be aware that when using `ckpt_path`",
    "torch.distributed.nn.functional.all_gather is deprecated",
)
LINKS = (
    ("data.input_size", "model.init_args.cell.init_args.input_size"),
    ("data.output_size", "model.init_args.output_size"),
    ("data.output_size", "model.init_args.readout.init_args.output_size"),
    ("data.shape", "model.init_args.shape"),
)
UNREAD = 128 + 13  # what a shell says of a process that was ended by SIGPIPE
MOST_THREADS = 1024  # a slip of the keyboard starts no million of them
WRITING = ("fit", "validate", "test", "predict")  # audit and forecast write nothing


class CommandLine(LightningCLI):
    """LightningCLI with links from data to model, checkpoints of the last and the best, and ``--ckpt_path last``."""

    status = 0  # of the process

    def __init__(self, args: ArgsType) -> None:
        super().__init__(
            ManualModule,
            LightningDataModule,
            save_config_callback=SaveConfig,
            trainer_class=DiagnosisTrainer,
            trainer_defaults={"log_every_n_steps": 10},
            seed_everything_default=0,
            parser_class=ConfigParser,
            parser_kwargs={"exit_on_error": False, "allow_abbrev": False},
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=args,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {**LightningCLI.subcommands(), "audit": {"model", "datamodule"}, "forecast": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--threads",
            type=int | None,
            default=None,
            help="CPU threads of a tensor operation; null: torch's own.",
        )
        parser.add_argument(
            "--tf32",
            type=bool,
            default=False,
            help="Let a GPU round the factors of float32 products to 10 bits: faster, gradients exact to about 1e-3.",
        )
        parser.add_argument(
            "--warnings",
            type=bool,
            default=True,
            help="Watch training and warn early (GrowthWatch, IdleWatch, UpdateSizeWatch, StalenessWatch).",
        )
        parser.add_class_arguments(BestCheckpoint, "checkpoint")
        parser.add_class_arguments(LastCheckpoint, "last_checkpoint")
        parser.set_defaults(
            {
                "checkpoint.monitor": "val/accuracy",
                "checkpoint.mode": "max",
                "checkpoint.filename": "best-step{step}",
                "checkpoint.auto_insert_metric_name": False,
            }
        )
        for source, target in LINKS:
            parser.link_arguments(source, target, apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        super().parse_arguments(parser, args)
        config = self.config[self.config.subcommand]
        check_options(config)
        refuse_half(config.trainer.precision)  # before the Trainer, which on a CPU makes bfloat16 of it
        if not 0 <= config.seed_everything < 2**32:
            raise ValueError(f"seed_everything must be at least 0 and below 2^32, got {config.seed_everything}")
        if config.ckpt_path is None and self.config.subcommand == "fit":
            require_no_restart()
        root = str(config.trainer.default_root_dir or os.getcwd())
        remote = "://" in root
        if not remote:
            if self.config.subcommand in WRITING:
                require_writable(Path(root))
            if config.ckpt_path == "last":
                config.ckpt_path = resolve_last(Path(root), resumable=self.config.subcommand == "fit")
            elif config.ckpt_path is not None and "://" not in config.ckpt_path:
                require_readable(Path(config.ckpt_path))

    def audit(self, **arguments: Any) -> None:
        self.status = 0 if self.trainer.audit(**arguments) else 1  # type: ignore[attr-defined]

    def before_fit(self) -> None:
        require_updates(self.trainer, self.datamodule, cast(ManualModule, self.model).update_every)

    def after_fit(self) -> None:
        """Say so if nothing was there to train: a run that is complete is no error."""
        trainer, model = self.trainer, cast(ManualModule, self.model)
        trained = trainer.global_step > (model.resumed_at or 0)
        if not (trained or trainer.should_stop or trainer.fast_dev_run):  # type: ignore[attr-defined]
            limits = ", ".join(f"{name}={getattr(trainer, name)}" for name in ("max_steps", "max_epochs"))
            rank_zero_warn(
                f"nothing was trained: the weights are those of step {trainer.global_step}, with trainer: {limits}, "
                f"limit_train_batches={trainer.limit_train_batches}, and model.update_every={model.update_every}"
            )

    def before_validate(self) -> None:
        config = self.config_init[self.config.subcommand]
        self._verbose, config.verbose = config.verbose, False  # Lightning's table cuts names off

    def after_validate(self) -> None:
        """Print all figures, with full names."""
        if self._verbose and self.trainer.is_global_zero:
            figures = sorted(self.trainer.callback_metrics.items())
            width = max((len(name) for name, _ in figures), default=0)
            for name, value in figures:
                print(f"{name:{width}}  {float(value):.6g}")

    before_test, after_test = before_validate, after_validate

    def before_instantiate_classes(self) -> None:
        given = self.config[self.config.subcommand].clone()
        check_classes(given.model, given.data.class_path)
        for _, target in LINKS:
            given.pop(target, None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # as LightningCLI itself, for any jsonargparse 4
            self.parser.add_instantiator(Maker(given), object)
        threads = self.config[self.config.subcommand].threads
        if threads is not None:
            if not 1 <= threads <= MOST_THREADS:
                raise ValueError(
                    f"threads must be at least 1 and at most {MOST_THREADS}, or null for torch's own number, "
                    f"got {threads}"
                )
            torch.set_num_threads(threads)
        tf32 = self.config[self.config.subcommand].tf32
        set_tf32(tf32)
        if tf32 and not torch.cuda.is_available():
            print("--tf32: there is no GPU here, so that it has no effect")

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        self._require_weights()
        for source, target in LINKS:
            given = self.config[self.config.subcommand].get(target)
            used = getattr(self.datamodule, source.split(".")[1], None)
            if given is not None and given != used:
                key = target.replace("init_args.", "")
                print(f"{key}: {given} is not used: the data has {used}")

    def _require_weights(self) -> None:
        """Evaluation without a checkpoint takes pretrained weights; without these there is nothing to predict with."""
        command = self.config.subcommand
        if command not in ("validate", "test", "predict") or self.config[command].ckpt_path is not None:
            return
        untrained = "model"
        if isinstance(self.model, ReasoningModule) and self.model.pretrained is not None:
            untrained = "" if load_pretrained(self.model, Path(self.model.pretrained)) else "encoder"
        if untrained and command == "predict":
            raise ValueError(
                f"predict needs trained weights, and those of the {untrained} are not: give --ckpt_path PATH, or last "
                "for the newest checkpoint"
            )
        if untrained:
            print(f"no --ckpt_path: these are the weights of an untrained {untrained}")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config_init[self.config.subcommand]
        kwargs["callbacks"] = callbacks_of(config, self.config.subcommand, cast(ManualModule, self.model))
        kwargs["plugins"] = without_requeueing(config.trainer)
        kwargs["strategy"] = strategy_of(config.trainer)
        if config.trainer.logger in (None, True):
            root = config.trainer.default_root_dir or os.getcwd()
            kwargs["logger"] = RunLogger(root)
        try:
            return super().instantiate_trainer(**kwargs)
        except Exception as error:
            raise ValueError(of_trainer(str(error), self.config[self.config.subcommand].trainer)) from error


def main(argv: list[str] | None = None) -> int:
    """Run a command line; prints one ``error:`` line and returns a non-zero status if it cannot be done.

    Args:
        argv: what comes after ``python -m rtrl_moe_pl``; by default the process's own. Several devices need the
            default: the other processes are started with it.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    debug = "--debug" in arguments or os.environ.get("RTRL_MOE_PL_DEBUG") == "1"
    arguments = [argument for argument in arguments if argument != "--debug"]
    for ignored in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message=f".*{ignored}")
    without_tips()
    with warnings_in_one_line():
        status = _run(arguments, debug)
    os.environ.pop(LAST, None)  # was for the processes of this run
    return status if printed() else UNREAD


def _run(arguments: list[str], debug: bool) -> int:
    try:
        with tf32_restored(), full_disk_in_one_line(debug):
            return CommandLine(arguments).status
    except SIGTERMException:  # before training, or without checkpoints
        return 128 + signal.SIGTERM
    except SystemExit as stop:  # --help, --print_config; Lightning's, after a KeyboardInterrupt
        return 130 if isinstance(stop.__context__, KeyboardInterrupt) else int(stop.code or 0)
    except KeyboardInterrupt:
        return 130
    except Interrupted as stop:
        if rank_zero_only.rank == 0:
            print(stop, file=sys.stderr)
        return 128 + stop.number
    except Exception as error:
        if isinstance(error, BrokenPipeError) and not printed("\n"):  # a broken pipe of workers is another matter
            return UNREAD
        if debug:
            traceback.print_exc()
        try:
            message = one_line(error) + place_of(error)
        except Exception:  # the parser has other words than those that are known
            message = shortened(" ".join(str(error).split()))
        rank = rank_zero_only.rank
        print(f"error (rank {rank}): {message}" if rank else f"error: {message}", file=sys.stderr, flush=True)
        return 1
