"""The callbacks of a run: those that are given, and those that every run has."""

from __future__ import annotations

from itertools import compress

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
    given = [given] if isinstance(given, Callback) else list(given)
    defaults: list[Callback] = []
    if config.warnings and command == "fit":
        defaults += [watch() for watch in WATCHES]
    if config.trainer.enable_checkpointing is not False:
        defaults += [config.checkpoint, config.last_checkpoint]
    if config.trainer.enable_progress_bar is not False:
        defaults.append(Bar(refresh_rate=10))  # the same bar in every environment
    if command == "predict":
        defaults.append(PuzzleWriter() if isinstance(model, ReasoningModule) else PredictionWriter())
    replaced = [ProgressBar if isinstance(callback, Bar) else type(callback) for callback in defaults]
    kept = [not any(isinstance(callback, kind) for callback in given) for kind in replaced]
    return [*given, *compress(defaults, kept)]
