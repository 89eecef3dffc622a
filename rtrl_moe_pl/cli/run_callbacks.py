"""The callbacks of a run: those that are given, and those that every run has."""

from __future__ import annotations

from jsonargparse import Namespace
from lightning.pytorch.callbacks import Callback, ProgressBar

from rtrl_moe_pl.modules import (
    GrowthWatch,
    IdleWatch,
    ManualModule,
    ReasoningModule,
    StalenessWatch,
    UpdateSizeWatch,
)
from rtrl_moe_pl.modules.puzzle_writer import PuzzleWriter
from rtrl_moe_pl.training.callbacks import Bar, PredictionWriter

WATCHES = (GrowthWatch, IdleWatch, UpdateSizeWatch, StalenessWatch)  # at most 3 % of a step together


def callbacks_of(config: Namespace, command: str, model: ManualModule) -> list[Callback]:
    """Those of a subcommand, whose configuration has its objects made; a given one stands for a default of its class.

    The order is theirs in every hook: what is given, watches, the best checkpoint, and the last one, which holds what
    the best has seen.
    """
    given = config.trainer.callbacks or []
    callbacks = [given] if isinstance(given, Callback) else list(given)
    if config.warnings and command == "fit":
        callbacks += [watch() for watch in WATCHES if not any(isinstance(c, watch) for c in callbacks)]
    if config.trainer.enable_checkpointing is not False:
        callbacks += [config.checkpoint, config.last_checkpoint]
    if config.trainer.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
        callbacks.append(Bar(refresh_rate=10))  # the same bar in every environment
    if command == "predict":
        callbacks.append(PuzzleWriter() if isinstance(model, ReasoningModule) else PredictionWriter())
    return callbacks
