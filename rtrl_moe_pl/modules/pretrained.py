"""Weights of another run to begin with."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from rtrl_moe_pl.modules.architecture import ARCHITECTURE, check_architecture
from rtrl_moe_pl.modules.base import ManualModule
from rtrl_moe_pl.training.checkpoints import require_readable

OPTION = "model.pretrained"


def load_pretrained(module: ManualModule, path: Path) -> bool:
    """Take the decoder of a checkpoint of a `ReasoningModule`, and its encoder if it is of the module's class.

    A table of puzzle embeddings of another size is replaced by the mean of its rows: its puzzles are others.

    Returns:
        whether the encoder was taken.
    Raises:
        FileNotFoundError, ValueError: if it cannot be read, is of another kind of module, or a part that is taken is
            of another architecture.
    """
    require_readable(path, OPTION)
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if "decoder" not in checkpoint.get(ARCHITECTURE, {}):
        raise ValueError(f"{OPTION}: {path} is not a checkpoint of a ReasoningModule: name one, or leave it out")
    check_architecture(module, checkpoint, "decoder", OPTION)
    ours, saved = module.state_dict(), checkpoint["state_dict"]
    encoder = module.encoder
    assert isinstance(encoder, nn.Module)
    whole = checkpoint[ARCHITECTURE]["encoder"] == type(encoder).__name__
    if whole:
        table, mine = saved.get("encoder.table"), ours.get("encoder.table")
        if table is not None and mine is not None and table.shape[1:] == mine.shape[1:] and len(table) != len(mine):
            saved["encoder.table"] = table.mean(0).expand_as(mine)
        check_architecture(module, checkpoint, "encoder", OPTION)
    else:
        saved = {name: value for name, value in saved.items() if name.startswith("decoder")}
    module.load_state_dict({**ours, **saved})
    rank_zero_info(f"{OPTION}: begins with the decoder{' and the encoder' * whole} of {path}")
    return whole
