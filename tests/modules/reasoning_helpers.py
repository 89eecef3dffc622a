"""Small runs of ReasoningModule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from rtrl_moe_pl.data import PuzzleDemoDataModule
from rtrl_moe_pl.modules import ReasoningModule
from rtrl_moe_pl.reasoning import TRM, Encoder, Halting, PairTokenEncoder, PuzzleEmbedding, ReasoningLoss
from tests.modules.helpers import Figures, trainer


def data(**options: Any) -> PuzzleDemoDataModule:
    small = {"size": 2, "colors": 3, "train_rules": 4, "held_out_rules": 2, "demos": 2, "batch_size": 5}
    sizes = {"batches_per_epoch": 4, "validation_size": 7, "validation_batch_size": 3}
    return PuzzleDemoDataModule(**{**small, **sizes, **options})


def module(encoder: type[Encoder] = PairTokenEncoder, seed: int = 1, **options: Any) -> ReasoningModule:
    torch.manual_seed(seed)
    small: dict[str, Any] = {"heads": 2, "layers": 1}
    chosen = {} if encoder is PuzzleEmbedding else small
    defaults: dict[str, Any] = {
        "halting": Halting(max_steps=3, exploration=0.3),
        "loss": ReasoningLoss("softmax"),
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    }
    return ReasoningModule(
        data().shape,
        lambda shape: TRM(shape, width=8, h_cycles=1, l_cycles=1, prefix=2, expansion=0.5, **small),
        lambda shape, width, prefix: encoder(shape, width, prefix, **chosen),
        **{**defaults, **options},
    )


def run(folder: Path, model: ReasoningModule, steps: int = 6, **options: Any) -> tuple[Trainer, list[dict[str, float]]]:
    figures = Figures()
    made = trainer(folder, max_steps=steps, callbacks=[figures], **options.pop("trainer", {}))
    made.fit(model, datamodule=options.pop("datamodule", data()), **options)
    return made, figures.logged
